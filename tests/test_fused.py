"""Fused attention: where there is a kernel, and that it computes what the plain one does."""

import dataclasses
import importlib.util
import subprocess
import sys
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import ARCH, VOCAB

from cosup_jax import sharding
from cosup_jax.config import MeshConfig
from cosup_jax.errors import UserError
from cosup_jax.model import attention, fused
from cosup_jax.model.transformer import Transformer


class Gpu(NamedTuple):
    compute_capability: str = "9.0"
    platform: str = "gpu"


@pytest.mark.parametrize(
    ("device", "tokens", "head_dim", "dtype", "there"),
    [
        (Gpu(), 64, 64, "bfloat16", True),
        (Gpu("8.0"), 64, 128, "bfloat16", True),
        (Gpu("7.5"), 64, 64, "bfloat16", False),
        (Gpu("gfx90a"), 64, 64, "bfloat16", False),
        (Gpu(), 64, 64, "float32", False),
        (Gpu(), 63, 64, "bfloat16", False),
        (Gpu(), 64, 60, "bfloat16", False),
        (Gpu(), 64, 256, "bfloat16", False),
        (jax.devices("cpu")[0], 64, 64, "bfloat16", False),
    ],
)
def test_where_cudnn_has_a_kernel(device, tokens, head_dim, dtype, there):
    """Bug: a run that ends in cuDNN's traceback; or all scores in memory where none need be."""
    arch = dataclasses.replace(ARCH, head_dim=head_dim, dtype=dtype)
    assert fused.has_cudnn(arch, tokens, device) == there


@pytest.mark.parametrize(
    ("causal", "rows", "tokens", "kv_heads", "head_dim", "kind"),
    [
        (True, 8, 256, 4, 64, "splash"),
        (True, 8, 256, 4, 128, "splash"),
        (False, 8, 256, 4, 64, "xla"),  # an encoder
        (True, 6, 256, 4, 64, "xla"),  # rows that four devices do not divide
        (True, 8, 96, 4, 64, "xla"),
        (True, 8, 256, 1, 64, "xla"),  # a kv head for two devices
        (True, 8, 256, 4, 80, "xla"),
    ],
)
def test_where_splash_has_a_kernel(monkeypatch, causal, rows, tokens, kv_heads, head_dim, kind):
    """Bug: a compiler's fault for a shape the kernel does not take; or [T, T] for one it does."""
    shape = {"data": 2, "fsdp": 2, "tensor": 2}
    device = SimpleNamespace(platform="tpu")
    mesh = SimpleNamespace(empty=False, shape=shape, abstract_device=device)
    monkeypatch.setattr(fused.jax.sharding, "get_abstract_mesh", lambda: mesh)
    arch = dataclasses.replace(ARCH, kv_heads=kv_heads, head_dim=head_dim)
    assert fused.kernel(arch, causal, rows, tokens) == kind
    plain = dataclasses.replace(arch, attention="xla")
    assert fused.kernel(plain, causal, rows, tokens) == "xla"


def test_a_cpu_mesh_beside_a_gpu_takes_no_kernel_of_the_gpu(monkeypatch, devices):
    """Bug: towers on the CPU of a GPU's host that are compiled for cuDNN."""
    mesh = sharding.make_mesh(MeshConfig(8, 1, 1), devices)
    monkeypatch.setattr(fused.jax, "devices", lambda: [Gpu()])
    arch = dataclasses.replace(ARCH, dtype="bfloat16", head_dim=64)
    with jax.set_mesh(mesh):
        assert fused.kernel(arch, True, 8, 64) == "xla"
    described = SimpleNamespace(empty=False, abstract_device=SimpleNamespace(platform="gpu"))
    monkeypatch.setattr(fused.jax.sharding, "get_abstract_mesh", lambda: described)
    assert fused.kernel(arch, True, 8, 64) == "cudnn"
    assert fused.kernel(arch, False, 8, 64) == "xla"


@pytest.mark.parametrize(("kind", "needs"), [("cudnn", "a GPU"), ("splash", "a TPU")])
def test_a_kernel_that_is_not_there_is_told(kind, needs):
    """Bug: a traceback out of JAX; or another kernel than the one asked for."""
    model = Transformer(dataclasses.replace(ARCH, attention=kind), VOCAB)
    x = jnp.ones((2, 128), jnp.int32)
    with pytest.raises(UserError, match=f"attention={kind} needs a causal family, {needs}"):
        jax.eval_shape(lambda key: model.hidden(model.init(key), x, x, x), jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 70])
def test_splash_equals_xla(window, devices):
    """Bugs: packed examples, windows or padding seen through, forwards or backwards; heads of
    another group; rows or heads of another device."""
    T, E = 256, 64
    runs = [[60, 100, 60, 6, 30], [1, 200, 20, 20, 15], [256, 0, 0, 0, 0], [128, 64, 32, 8, 24]]
    segments = np.stack([np.repeat([1, 2, 3, -3, 0], run) for run in runs]).astype(np.int32)
    rng = np.random.default_rng(0)
    normal = lambda heads: rng.normal(size=(4, T, heads, E)).astype(np.float32)
    q, k, v, back = normal(4), normal(2), normal(2), normal(4)
    seen = (segments != 0)[:, :, None, None]
    mask = attention.mask(jnp.asarray(segments), True, window)

    def both(attend):
        out, vjp = jax.vjp(attend, q, k, v)
        return jnp.isfinite(out).all(), out * seen, *vjp(back * seen)

    mesh = sharding.make_mesh(MeshConfig(2, 2, 2), devices)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda: both(lambda *x: fused.splash(*x, segments, window, True)))()
    wanted = jax.jit(lambda: both(lambda *x: attention.attend(*x, mask, "xla", window)))()
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


ON_A_GPU = """
import jax, jax.numpy as jnp, numpy as np
from cosup_jax.model import attention

segments = np.ones((2, 64), np.int32) * np.repeat([0, 1, 2, 3, -3, 0], [4, 16, 13, 17, 4, 10])
keys, seen = jax.random.split(jax.random.key(0), 4), jnp.asarray(segments != 0)[:, :, None, None]
normal = lambda key, heads: jax.random.normal(key, (2, 64, heads, 64), jnp.bfloat16)
q, k, v, back = (normal(key, heads) for key, heads in zip(keys, (4, 2, 2, 4)))
for window in (0, 9):
    mask, found = attention.mask(jnp.asarray(segments), True, window), {}
    for kind in ("cudnn", "xla"):
        out, vjp = jax.vjp(lambda *parts: attention.attend(*parts, mask, kind, window), q, k, v)
        assert jnp.isfinite(out).all()
        found[kind] = [np.asarray(x, np.float32) for x in (out * seen, *vjp(back * seen))]
    for one, other in zip(*found.values()):
        np.testing.assert_allclose(one, other, atol=2e-2 * np.abs(other).max())
"""


@pytest.mark.slow
def test_cudnn_equals_xla():
    """Bug: packed examples, windows or padding seen through, forwards or backwards."""
    run = lambda code: subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if run("import jax; print(jax.devices()[0].platform)").stdout.strip() != "gpu":
        pytest.skip("no GPU")
    done = run(ON_A_GPU)
    assert done.returncode == 0, done.stderr[-2000:]


ON_A_SLICE = """
import re, sys
from cosup_jax import assemble, config_files, preflight
from cosup_jax.rehearsal import Rehearsal

keys = dict(flag.split("=") for flag in sys.argv[1:])
devices = preflight.devices_of("v5e:2x2")
config = assemble.resolve(config_files.frozen("configs/base.py", keys), shape_only=True)
job = Rehearsal(config, assemble.mesh_for(config, devices))
text = job.compile()[0].as_text()
print(len(set(re.findall(r"%(splash_\\w+)", text))), len(re.findall(r"\\[[\\d,]*256,256\\]", text)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu (tpu extra)")
def test_a_tpu_keeps_no_scores():
    """Bug: scores [T, T] of every head in a TPU's memory, as the kernel is not taken."""
    keys = {"gen.arch.layers": 2, "gen.arch.width": 128, "gen.arch.heads": 4, "mesh.tensor": 2}
    keys |= {"gen.arch.kv_heads": 2, "gen.arch.head_dim": 64, "gen.arch.mlp_width": 384}
    found = {}
    for kind in ("auto", "xla"):
        flags = [f"{key}={value}" for key, value in keys.items()]
        flags += [f"{tower}.arch.attention={kind}" for tower in ("gen", "ctx")]
        command = [sys.executable, "-c", ON_A_SLICE, *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found[kind] = tuple(map(int, done.stdout.split()))
    (kernels, scores), (none, some) = found["auto"], found["xla"]
    assert kernels >= 3 and scores == 0 and none == 0 and some > 0
