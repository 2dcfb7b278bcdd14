"""What compiling leaves behind."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import towns

from cosup_jax import sharding
from cosup_jax import step as step_lib
from cosup_jax.config import Config, MeshConfig
from cosup_jax.data.batch import BatchShape, empty_batch
from cosup_jax.runtime import compiling


@pytest.fixture
def kept_in(monkeypatch):
    """What JAX is told by an environment."""
    told = {}
    monkeypatch.setattr(compiling.jax.config, "update", told.__setitem__)

    def kept(**environ):
        compiling.keep_programs(environ)
        return told["jax_compilation_cache_dir"]

    return kept


def test_programs_are_kept_where_the_user_keeps_caches(kept_in, tmp_path, monkeypatch):
    """Bug: a directory of our own beside the one that JAX or the system was told of; no way to
    turn it off; an empty variable taken for the working directory."""
    expected = tmp_path / "cosup_jax" / "programs"
    assert kept_in(XDG_CACHE_HOME=str(tmp_path)) == str(expected) and expected.is_dir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert kept_in() == str(tmp_path / "home/.cache/cosup_jax/programs")
    assert kept_in(JAX_COMPILATION_CACHE_DIR="gs://b/d", XDG_CACHE_HOME="/") == "gs://b/d"
    assert kept_in(JAX_COMPILATION_CACHE_DIR="") is None


def test_no_place_to_keep_programs_is_no_error(kept_in, tmp_path, monkeypatch):
    """Bug: a run that fails, or warns of every program, where the home is a read-only or full disk;
    programs that only the first of several processes finds."""
    given = {"XDG_CACHE_HOME": str(tmp_path)}
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert kept_in(**given) is None and kept_in(JAX_COMPILATION_CACHE_DIR="d") == "d"
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(compiling, "_LEAST_FREE", 1 << 62)
    assert kept_in(**given) is None
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert compiling._default(given) is None
    (tmp_path / "file").write_text("")
    assert compiling._default({"XDG_CACHE_HOME": str(tmp_path / "file")}) is None


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_freed_memory_goes_back(monkeypatch):
    """Bug: what the compiler freed counts for the rest of the run; a C library without such a
    function ends it."""
    if hasattr(ctypes.CDLL(None), "malloc_trim") and sys.platform == "linux":
        blocks = [bytes(1000) for _ in range(200_000)]
        last, held = blocks[-1], _resident_mib()  # the last one keeps the others from the top
        del blocks
        compiling.release_memory()
        assert _resident_mib() < held - 100 and last
    monkeypatch.setattr(compiling.ctypes, "CDLL", lambda _: object())
    compiling.release_memory()


def test_rows_of_several_lengths_have_a_program_each(monkeypatch):
    """Bug: the program of other Ctx rows is taken where Gen rows are as long: without packing a run
    ends at its second batch; or each step compiles anew; or memory of compiling stays."""
    seen, released = [], []

    def train_step(state, batch, factors, config):
        seen.append((batch.gen_tokens_BxT.shape[1], batch.ctx_tokens_UxL.shape[1]))
        return state + 1, {"tokens": jnp.size(batch.gen_tokens_BxT)}

    monkeypatch.setattr(step_lib, "train_step", train_step)
    monkeypatch.setattr(step_lib, "release_memory", lambda: released.append(len(seen)))
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    whole, state = sharding.replicated(mesh), jnp.int32(0)
    step = step_lib.compile_step(mesh, whole, config=Config())
    for T, L in ((4, 8), (8, 8), (4, 4), (4, 8), (8, 8)):
        shape = BatchShape(B=2, T=T, R=1, S=1, U=2, L=L, P=1)
        batch = jax.device_put(empty_batch(shape, 2, 2), sharding.rows(mesh))
        state, metrics = step(state, batch)
        assert metrics["tokens"] == 2 * T
    assert state == 5 and seen == [(4, 8), (8, 8), (4, 4)] and released == [1, 2, 3]


@pytest.mark.slow
def test_a_program_from_disk_computes_the_same(tmp_path):
    """Bug: a run resumed with programs that an earlier process compiled is not the run without
    them, bit for bit; they are never found again; they are kept although that is turned off."""
    few = {"generate__examples": 0, "eval__examples": 4, "eval__every_steps": 3}
    # By any other schedule a longer run is another program.
    config = towns.write_config(tmp_path, num_steps=6, optim__schedule="constant", **few)
    kept = tmp_path / "kept"
    root, common = Path(__file__).parent.parent, os.environ | {"JAX_PLATFORMS": "cpu"}
    off = common | {"JAX_COMPILATION_CACHE_DIR": "", "XDG_CACHE_HOME": str(tmp_path / "none")}
    on = common | {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(kept),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(name, environ, steps):
        command = [sys.executable, "-m", "cosup_jax.main", f"--config={config}"]
        command += [f"--workdir={tmp_path / name}", f"--config.num_steps={steps}"]
        subprocess.run(command, check=True, cwd=root, env=environ, capture_output=True)
        return set(kept.glob("*train_step*-cache"))

    def lines(name):
        found = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in found]

    assert not run("off", off, 6)
    first, again = run("on", on, 3), run("on", on, 6)
    assert first == again and len(first) == 1
    assert lines("on") == lines("off") and lines("on")[-1]["step"] == 6
    assert not (tmp_path / "none/cosup_jax").exists()
