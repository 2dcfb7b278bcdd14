"""--mode=preflight: what it finds out about a step, on this machine and for slices elsewhere."""

import dataclasses
import functools
import importlib.util
import json
import sys

import batches
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cosup_jax import preflight, rehearsal
from cosup_jax.costs import roofline
from cosup_jax.data.batch import batch_shape, empty_batch
from cosup_jax.errors import UserError
from cosup_jax.main import main

CHIP = roofline.Chip("toy", 1e12, 1e12, 1e9, ((1.0, 1e10),), 1e9)
TINY = {
    "gen.arch.layers": 1,
    "gen.arch.width": 32,
    "gen.arch.heads": 4,
    "gen.arch.kv_heads": 4,
    "gen.arch.head_dim": 8,
    "gen.arch.mlp_width": 64,
    "gen.arch.tie_embeddings": False,
    "data.vocab_size": 251,  # 256 with the control tokens
    "mesh.data": 1,
    "mesh.fsdp": 4,
    "mesh.tensor": 2,
}


def tiny(**keys):
    return batches.config(**{name.replace(".", "__"): v for name, v in (TINY | keys).items()})


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """preflight.json of a run on the eight devices, and what it printed."""
    patch = pytest.MonkeyPatch()
    patch.setattr(roofline, "measured", lambda device: CHIP)
    path = tmp_path_factory.mktemp("preflight")
    preflight.preflight(tiny(), str(path), steps=1)
    patch.undo()
    return json.loads((path / "preflight.json").read_text())


def test_parameters_and_memory_are_those_of_the_state(found):
    """Bug: memory of all devices for one's, or donated arguments counted twice."""
    gen = 2 * 256 * 32 + 4 * 32 * 32 + 3 * 32 * 64 + 3 * 32
    ctx = gen - 256 * 32  # no head
    assert found["parameters"] == gen + ctx
    memory = found["memory"]
    state = 3 * 4 * found["parameters"]  # with two moments, float32
    split = sum(leaf["bytes"] for leaf in found["replicated"])
    assert state / 8 < memory["arguments"] < state / 8 + split + 20_000  # and the batch
    parts = sum(memory[k] for k in ("arguments", "temporaries", "output", "code"))
    assert memory["total"] == parts - memory["reused"]
    assert memory["reused"] > 0.9 * memory["output"]


def test_flops_agree_with_the_formula(found):
    """Bug: a loop counted once, one device's FLOPs for the step's, a factor of 6 for 2."""
    assert found["flops_by_formula"] == preflight_formula()
    assert 0.9 < found["flops"] / found["flops_by_formula"] < 1.3
    assert found["loops_counted_at_most"]


def test_a_frozen_tower_costs_its_forward_pass_alone():
    """Bug: MFU of a run with a frozen Ctx counted with gradients that nobody computes."""
    job = job_of(**{"ctx.freeze": True})
    found = rehearsal.model_flops(job.config, job.towers, job.state)
    assert found == preflight_formula(ctx_factor=2)


def test_the_memory_of_a_chip_decides_whether_it_fits():
    """Bug: everything fits."""
    job, compiled = job_of(), jax.jit(lambda x: x + 1).lower(1.0).compile()
    for capacity, fits in ((1.0, False), (1e9, True)):
        chip = dataclasses.replace(CHIP, capacity=capacity)
        assert preflight.account(job, compiled, chip)["fits"] is fits


def test_a_step_that_does_not_fit_is_not_run(tmp_path, monkeypatch):
    """Bug: --steps=1 runs out of the memory that it was to ask about, with a traceback."""
    compiled = jax.jit(lambda x: x + 1).lower(1.0).compile()
    monkeypatch.setattr(rehearsal.Rehearsal, "compile", lambda self: (compiled, ""))
    monkeypatch.setattr(rehearsal.Rehearsal, "run", lambda *_: pytest.fail("was run"))
    monkeypatch.setattr(roofline, "measured", lambda _: dataclasses.replace(CHIP, capacity=1.0))
    with pytest.raises(UserError, match=r"does not fit host: 0\.0 GiB; change gen\."):
        preflight.preflight(tiny(), str(tmp_path), steps=1)


def test_a_cpu_pays_for_its_temporaries_and_mfu_is_of_all_chips(monkeypatch):
    """Bugs: MFU of one chip for that of all, or by the peak of another dtype; a prediction without
    the time until a CPU's system has given the memory."""
    job, compiled = job_of(), jax.jit(lambda x: x + 1).lower(1.0).compile()
    monkeypatch.setattr(preflight, "_memory", lambda _: {"temporaries": 2e3, "total": 0})
    chip = dataclasses.replace(CHIP, f32_flops=5e11, fresh=((1.0, 1e3),))
    found = preflight.account(job, compiled, chip)
    assert found["estimate"]["step_s"] == pytest.approx(2.0)
    assert job.config.gen.arch.dtype == "float32"
    assert found["mfu"] == pytest.approx(preflight_formula() / (2.0 * 8 * 5e11))


def test_only_want_of_memory_is_an_answer(monkeypatch):
    """Bugs: a compiler's fault told as too little memory; its pages of buffers for a line."""

    class Step:
        def lower(self, *_):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError(f"{told}\nbuffers:\n ...")

    monkeypatch.setattr(rehearsal.step_lib, "compile_step", lambda *_, **__: Step())
    told = "RESOURCE_EXHAUSTED: Used 20G of 16G"
    assert job_of().compile() == (None, told)
    told = "INTERNAL: a fault"
    with pytest.raises(jax.errors.JaxRuntimeError):
        job_of().compile()


def test_micro_batches_that_are_advised_divide_the_rows():
    """Bug: advice that the config's check then refuses."""
    job = job_of(**{"batch_size": 24, "data.ctx_rows": 24, "mesh.fsdp": 8, "mesh.tensor": 1})
    advice = preflight._advice({"problem": "too much"}, job.config, job.mesh)
    assert "micro_batches=3 or more, 3 at most" in advice


@functools.cache
def job_of(**keys):
    config = preflight.assemble.resolve(tiny(**keys), shape_only=True)
    return rehearsal.Rehearsal(config, preflight.assemble.mesh_for(config))


def preflight_formula(ctx_factor=6):
    shape = batch_shape(tiny())
    kernels = 4 * 32 * 32 + 3 * 32 * 64
    total = 0
    for rows, length, factor in ((shape.B, shape.T, 6), (shape.U, shape.L, ctx_factor)):
        total += factor * rows * length * (kernels + 2 * 32 * length)
    total += 6 * shape.B * shape.T * 32 * 256
    return total + 6 * shape.B * shape.R * shape.U * shape.P * 32


def test_no_large_leaf_is_whole_on_every_device(found):
    """Bug: an optimizer moment that lies on all devices, which multiplies its memory."""
    for leaf in found["replicated"]:
        assert leaf["axes"] == ["tensor"], leaf  # norms, which fsdp splits
        assert "norm" in leaf["leaf"] and leaf["bytes"] <= 4 * 32


def test_predicted_and_measured_are_told(found):
    """Bug: a prediction that nothing holds to account."""
    assert found["devices"] == 8 and found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
    assert found["estimate"]["step_s"] > 0 and found["measured"]["step_s"] > 0
    assert found["mfu"] == pytest.approx(
        found["flops_by_formula"] / (8 * 1e12 * found["estimate"]["step_s"])
    )
    reached = found["flops_by_formula"] / (8 * 1e12 * found["measured"]["step_s"])
    assert found["measured"]["mfu"] == pytest.approx(reached)
    assert found["collective_bytes"]["all-gather"] > 0
    assert found["largest_buffers"][0]["bytes"] >= found["largest_buffers"][-1]["bytes"]
    assert found["fits"] and found["config"]["batch_size"] == 16


def test_random_batch_is_a_batch():
    """Bug: shapes or types of another batch than training's, which compiles another program; a
    query whose passage is no candidate, which has no loss."""
    config = tiny()
    towers = preflight.assemble.make_towers(config, rehearsal.vocabularies(config))
    shape = batch_shape(config)
    batch = rehearsal.random_batch(config, towers)
    empty = empty_batch(shape, shape.B, shape.U)
    for name, one, other in zip(batch._fields, batch, empty, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype), name
    ids = {tuple(i) for i in batch.passage_ids_UxPx2.reshape(-1, 2)}
    assert {tuple(i) for i in batch.ret_positives_BxRxSx2[:, :, 0].reshape(-1, 2)} <= ids
    rows = np.arange(shape.U)[:, None]
    numbers = np.arange(1, shape.P + 1)[None]
    assert (batch.ctx_segments_UxL[rows, batch.passage_ends_UxP] == numbers).all()


def test_a_step_that_does_not_fit_says_what_to_change(tmp_path, monkeypatch):
    """Bug: "does not fit" with exit code 0, or without a way out."""
    problem = "RESOURCE_EXHAUSTED: Used 20.1G of 15.7G hbm"
    monkeypatch.setattr(rehearsal.Rehearsal, "compile", lambda self: (None, problem))
    config = tiny(**{"ctx.arch.remat": "full", "mesh.fsdp": 8, "mesh.tensor": 1})
    with pytest.raises(UserError) as error:
        preflight.preflight(config, str(tmp_path))
    text = str(error.value)
    assert "does not fit host: RESOURCE_EXHAUSTED: Used 20.1G" in text
    assert "gen.arch.remat=full" in text
    assert "ctx.arch.remat" not in text
    assert "micro_batches=2 or more, 2 at most" in text
    assert "mesh.fsdp (now 8)" in text
    assert json.loads((tmp_path / "preflight.json").read_text())["fits"] is False


def test_a_topology_without_libtpu_is_told_in_a_line(tmp_path, monkeypatch, capsys):
    """Bug: an ImportError's traceback, or a run that compiles for the host instead."""
    monkeypatch.setitem(sys.modules, "libtpu", None)
    flags = ["--mode=preflight", "--config=configs/base.py:smoke", f"--workdir={tmp_path}"]
    assert main([*flags, "--topology=v5e:2x4"]) == 2
    error = capsys.readouterr().err
    assert "needs libtpu" in error and "pip install -e '.[tpu]'" in error and error.count("\n") == 1


def test_what_is_no_topology_is_not_blamed_on_libtpu(monkeypatch):
    """Bug: a typo in "host" sends the user to install libtpu."""
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(UserError, match="=hst must be host or a TPU slice such as v5e:16x16"):
        preflight.devices_of("hst")


def test_steps_are_refused_for_a_slice_that_is_not_here(tmp_path):
    """Bug: --steps with a TPU's name fails after minutes of compiling."""
    with pytest.raises(UserError, match="--topology=host alone"):
        preflight.preflight(tiny(), str(tmp_path), "v5e:2x4", steps=3)


def test_a_model_from_the_hub_without_network_is_told_in_a_line(tmp_path, monkeypatch):
    """Bug: minutes of retries, or weights downloaded for their shape."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(rehearsal.weights.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no such directory, and not to be had from the hub"):
        preflight.preflight(tiny(**{"gen.init": "nobody/nothing"}), str(tmp_path))


def test_llama2_7b_has_the_size_of_llama2_7b():
    """Bug: the variant that preflight uses offline describes another model than the paper's."""
    from cosup_jax.config_files import load
    from cosup_jax.freeze import freeze

    for variant, gen, ctx in (("shape", 6.738e9, 6.607e9), ("shape_70b", 68.98e9, 6.607e9 + 34e6)):
        config = preflight.assemble.resolve(freeze(load(f"configs/llama2_7b.py:{variant}")))
        towers = preflight.assemble.make_towers(config, rehearsal.vocabularies(config))
        for tower, size in ((towers.gen, gen), (towers.ctx, ctx)):
            leaves = flatten_dict(jax.eval_shape(tower.init, jax.random.key(0))).values()
            assert sum(x.size for x in leaves) == pytest.approx(size, rel=0.006)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu (tpu extra)")
def test_compiles_for_a_slice_that_is_not_here(tmp_path):
    """Bug: a mesh, a topology or a TPU's HLO that none of the above has seen."""
    import subprocess

    keys = {**TINY, "batch_size": 16, "data.ctx_rows": 16}
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    run = [sys.executable, "-m", "cosup_jax.main", "--mode=preflight"]
    run += ["--config=configs/base.py:smoke", f"--workdir={tmp_path}", *flags]
    done = subprocess.run([*run, "--topology=v5e:2x4"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "preflight.json").read_text())
    assert found["devices"] == 8 and found["chip"]["name"] == "v5e" and found["fits"]
    assert 0.9 < found["flops"] / found["flops_by_formula"] < 1.4
    assert "8 x TPU v5 lite" in done.stdout
    done = subprocess.run([*run, "--topology=v5e:3x5x7"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "no TPU slice that libtpu knows" in done.stderr
