"""Save, resume, reshard, and step back from damage."""

import gc
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cosup_jax import checkpoint
from cosup_jax.checkpoint import Checkpointer, check_readable, restore_params
from cosup_jax.errors import UserError
from cosup_jax.runtime import quiet

# What Orbax leaves behind after an error: threads of TensorStore that call an event loop it has
# closed, and coroutines that it never started; the tests that provoke them collect them.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s).*(Event loop is closed|never awaited):pytest.PytestUnraisableExceptionWarning",
    "ignore:coroutine .* was never awaited:RuntimeWarning",
)
FINGERPRINT = {"seed": 1, "tokenizer": "abc"}
META = {"fingerprint": FINGERPRINT, "config": {"seed": 1}}


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: Any
    bank: Any
    ema_ctx: Any
    key: jax.Array


def make_state(mesh, seed: int = 0, width: int = 1024) -> State:
    w = jax.random.normal(jax.random.key(seed), (8, width))
    params = {"gen": {"w": w, "half": w.astype(jnp.bfloat16)}, "ctx": {"w": w + 1}, "nsp": {}}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = State(
        step=jnp.int32(seed),
        params=params,
        opt_state=tx.init(params),
        bank=(jnp.arange(16, dtype=jnp.uint32).reshape(8, 2), jnp.ones(8, bool)),
        ema_ctx=None,
        key=jax.random.key(seed),
    )
    return jax.device_put(state, shardings(state, mesh))


def shardings(state, mesh):
    split = P(tuple(mesh.axis_names))
    return jax.tree.map(lambda x: NamedSharding(mesh, split if x.ndim else P()), state)


def abstract(state, mesh):
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(place, state, shardings(state, mesh))


def make_mesh(devices, *sizes):
    names = ("data", "fsdp", "tensor")[: len(sizes)]
    auto = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(sizes, names, auto, devices=devices[: int(np.prod(sizes))])


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def saved(directory, mesh, *steps, keep=3):
    checkpointer = Checkpointer(directory, keep)
    for step in steps:
        checkpointer.save(step, make_state(mesh, step), META)
    checkpointer.wait()
    return checkpointer


def damage(directory, step):
    """Flips one bit in the middle of the arrays' bytes."""
    files = (directory / str(step) / "state").glob("ocdbt.process_*/d/*")
    largest = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


@pytest.mark.parametrize("sizes", [(8,), (1,), (2,), (2, 2), (2, 1, 4)])
def test_restored_bit_equal_on_any_mesh(tmp_path, devices, sizes):
    """Bug: a leaf is lost, cast or shuffled where the mesh is another than the one that saved."""
    mesh = make_mesh(devices, *sizes)
    with_8 = make_state(make_mesh(devices, 4, 2), 5)
    checkpointer = Checkpointer(tmp_path, 1)
    checkpointer.save(5, with_8, META)
    wanted = abstract(with_8, mesh)
    checkpointer.wait()
    found = checkpointer.restore(wanted, FINGERPRINT)
    checkpointer.close()
    assert (found.step, found.meta) == (5, META)
    assert_same(found.state, with_8)
    for leaf, like in zip(jax.tree.leaves(found.state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)


def test_key_of_another_kind_comes_back(tmp_path, devices):
    """Bug: a typed key is rebuilt as the default kind and the randomness changes."""
    mesh = make_mesh(devices, 2)
    key = jax.device_put(jax.random.key(3, impl="rbg"), NamedSharding(mesh, P()))
    with_key = {"key": key}
    checkpointer = Checkpointer(tmp_path, 1)
    checkpointer.save(1, with_key, META)
    checkpointer.wait()
    found = checkpointer.restore(abstract(with_key, mesh), FINGERPRINT).state["key"]
    checkpointer.close()
    assert found.dtype == key.dtype
    assert jax.random.bits(found) == jax.random.bits(key)


def test_state_may_be_donated_at_once(tmp_path, devices):
    """Bug: the save still reads buffers that the next step has overwritten."""
    mesh = make_mesh(devices, 8)
    state, before = make_state(mesh, 1), make_state(mesh, 1)
    negate = jax.jit(lambda w: -w, donate_argnums=0)
    checkpointer = Checkpointer(tmp_path, 1)
    checkpointer.save(1, state, META)
    jax.block_until_ready(negate(state.params["gen"]["w"]))
    checkpointer.wait()
    found = checkpointer.restore(abstract(before, mesh), FINGERPRINT)
    checkpointer.close()
    assert_same(found.state, before)


def test_keeps_the_newest(tmp_path, devices):
    """Bug: the disk fills up, or the newest checkpoint is the one that is deleted."""
    checkpointer = saved(tmp_path, make_mesh(devices, 1), 1, 2, 10, keep=2)
    assert checkpointer.steps() == [2, 10]
    checkpointer.save(10, make_state(make_mesh(devices, 1), 10), META)  # there already
    checkpointer.close()
    assert sorted(os.listdir(tmp_path)) == ["10", "2"]


def test_nothing_saved_is_a_fresh_start(tmp_path, devices):
    """Bug: a run killed before its first checkpoint is complete cannot start again."""
    state = make_state(make_mesh(devices, 1))
    (tmp_path / "7.orbax-checkpoint-tmp").mkdir()
    assert check_readable(tmp_path / "absent") is None
    assert check_readable(tmp_path) is None
    checkpointer = Checkpointer(tmp_path, 1)
    assert checkpointer.restore(abstract(state, make_mesh(devices, 1)), FINGERPRINT) is None
    checkpointer.close()


def test_other_data_is_refused_by_name(tmp_path, devices):
    """Bug: a run goes on with another tokenizer or seed than it began with, or what differs is told
    by digests where the user has changed a key."""
    mesh = make_mesh(devices, 1)
    checkpointer = saved(tmp_path, mesh, 1)
    wanted = abstract(make_state(mesh), mesh)
    with pytest.raises(UserError, match=r"made with tokenizer='abc' \(now 'xyz'\)") as caught:
        checkpointer.restore(wanted, FINGERPRINT | {"tokenizer": "xyz"}, {"seed": 1, "new": 5})
    assert "seed" not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"data: made with seed=1 \(now 0\); restore") as caught:
        checkpointer.restore(wanted, FINGERPRINT | {"tokenizer": "xyz"}, {"seed": 0})
    checkpointer.close()


def test_other_shape_is_refused_by_name(tmp_path, devices):
    """Bug: another architecture ends in Orbax's traceback, or is cut to fit."""
    mesh = make_mesh(devices, 1)
    checkpointer = saved(tmp_path, mesh, 1)
    wider = abstract(make_state(mesh, width=32), mesh)
    with pytest.raises(
        UserError, match=r"params/ctx/w is float32\[8, 32\] here, float32\[8, 1024\]"
    ):
        checkpointer.restore(wider, FINGERPRINT)
    wanted = abstract(make_state(mesh), mesh)
    with pytest.raises(UserError, match=r"bank/0 is uint32.* here, nothing there"):
        stateless = Checkpointer(tmp_path / "b", 1)
        stateless.save(1, make_state(mesh).replace(bank=None), META)
        stateless.wait()
        stateless.restore(wanted, FINGERPRINT)
    stateless.close()
    with pytest.raises(UserError, match="it also holds bank/0"):
        checkpointer.restore(wanted.replace(bank=None), FINGERPRINT)
    checkpointer.close()


def test_steps_back_from_a_flipped_bit(tmp_path, devices, caplog):
    """Bug: a damaged array is trained on, stops the run, or blocks every later save."""
    mesh = make_mesh(devices, 4)
    checkpointer = saved(tmp_path, mesh, 1, 2)
    damage(tmp_path, 2)
    (tmp_path / "2.damaged" / "state").mkdir(parents=True)  # of an earlier time
    with caplog.at_level(logging.WARNING, "cosup_jax"):
        found = checkpointer.restore(abstract(make_state(mesh), mesh), FINGERPRINT)
    assert found.step == 1
    assert_same(found.state, make_state(mesh, 1))
    assert f"{tmp_path}/1;" in caplog.text and f"{tmp_path}/2.damaged" in caplog.text
    checkpointer.save(2, make_state(mesh, 2), META)
    checkpointer.close()
    assert check_readable(tmp_path) == 2 and checkpointer.steps() == [1, 2]


def _damaged(data: bytes):
    """A file's bytes as they may come back from a bad disk; None: not at all."""
    middle = len(data) // 2
    return None, data[:middle], data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def test_any_damage_is_noticed_or_does_no_harm(tmp_path, devices, monkeypatch, caplog, capfd):
    """Bugs: a lost, cut or flipped file of any kind that changes what is restored, stops the run,
    or fills the screen with Orbax's tracebacks."""
    # Handlers of tests before this one, whose streams are closed, would print tracebacks of theirs.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    mesh, stepped_back, sound = make_mesh(devices, 1), set(), tmp_path / "sound"
    saved(sound, mesh, 1, 2).close()
    wanted = abstract(make_state(mesh), mesh)
    states = {step: make_state(mesh, step) for step in (1, 2)}
    names = [p.relative_to(sound) for p in sorted(sound.glob("2/**/*")) if p.is_file()]
    for name in names:
        for number, bad in enumerate(_damaged((sound / name).read_bytes())):
            copy = tmp_path / f"{len(stepped_back)}{name.name}{number}"
            shutil.copytree(sound, copy)
            (copy / name).unlink()
            if bad is not None:
                (copy / name).write_bytes(bad)
            caplog.clear()
            checkpointer = Checkpointer(copy, 3)
            found = checkpointer.restore(wanted, FINGERPRINT)
            checkpointer.close()
            assert found.meta == META
            assert_same(found.state, states[found.step])
            told = f"{copy}/1;" in caplog.text and f"{copy}/2.damaged" in caplog.text
            assert told == (found.step == 1), f"{name} {number}: {caplog.text}"
            if found.step == 1:
                stepped_back.add(str(name.parent))
            shutil.rmtree(copy)
    gc.collect()
    assert {"2/meta", "2/state", "2/state/d", "2/state/ocdbt.process_0/d"} <= stepped_back
    told = capfd.readouterr().err
    assert "Traceback" not in told and "Exception ignored" not in told


def test_what_one_process_cannot_read_is_damaged_for_all(monkeypatch):
    """Bug: of several processes one steps back, and the others go on from the newest."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    seen = lambda mine: np.stack([mine, np.asarray(False)])
    monkeypatch.setattr(multihost_utils, "process_allgather", seen)
    with pytest.raises(checkpoint._DamagedError, match="another process cannot read its part"):
        checkpoint._agree_on(lambda: "sound")


def test_a_changed_word_of_the_metadata_is_damage(tmp_path, devices):
    """Bug: a digit of the config, the contract or the plan that changed on the disk is believed."""
    mesh = make_mesh(devices, 1)
    saved(tmp_path, mesh, 1, 2).close()
    path = tmp_path / "2" / "meta" / "metadata"
    path.write_text(path.read_text().replace('"tokenizer": "abc"', '"tokenizer": "abd"'))
    assert check_readable(tmp_path) == 1


def test_all_damaged_is_one_line_and_stays(tmp_path, devices):
    """Bug: a run whose checkpoints are all lost starts again at step 0, unasked."""
    mesh = make_mesh(devices, 1)
    checkpointer = saved(tmp_path, mesh, 1, 2)
    for step in (1, 2):
        damage(tmp_path, step)
    assert check_readable(tmp_path) == 2  # the metadata is sound
    for _ in range(2):
        with pytest.raises(
            UserError, match=rf"^none of the checkpoints in {tmp_path} can"
        ) as error:
            checkpointer.restore(abstract(make_state(mesh), mesh), FINGERPRINT)
    checkpointer.close()
    for step in (1, 2):
        shutil.rmtree(tmp_path / str(step) / "meta")
    with pytest.raises(UserError, match="can be read") as early:
        check_readable(tmp_path)
    assert str(early.value) == str(error.value) and "\n" not in str(early.value)


def test_params_alone(tmp_path, devices):
    """Bug: reading weights for an export needs the optimizer's memory, or hides damage."""
    mesh = make_mesh(devices, 2)
    state = make_state(mesh, 2)
    saved(tmp_path, mesh, 1, 2).close()
    found = restore_params(tmp_path, abstract(state.params, mesh))
    assert (found.step, found.meta) == (2, META)
    assert_same(found.state, state.params)
    damage(tmp_path, 2)
    with pytest.raises(UserError, match="2 is damaged"):
        restore_params(tmp_path, abstract(state.params, mesh))
    with pytest.raises(UserError, match="holds no checkpoint"):
        restore_params(tmp_path / "absent", abstract(state.params, mesh))


def test_only_echoes_go_unreported(monkeypatch):
    """Bug: an error of ours is hidden with what Orbax leaves behind one that we have told."""
    told = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: told.append(str(error)))
    monkeypatch.setattr(sys, "unraisablehook", lambda found: told.append(str(found.exc_value)))
    quiet.drop_echoes.__wrapped__()
    for line in ("Event loop is closed", "a fault of ours"):
        error = RuntimeError(line)
        sys.excepthook(RuntimeError, error, None)
        sys.unraisablehook(SimpleNamespace(exc_value=error, object=None))
    assert told == ["a fault of ours"] * 2


def test_full_disk_surfaces(tmp_path, devices, capfd):
    """Bugs: a save that failed in the background is heard of at the next save only, or never; the
    step that failed is listed; tracebacks of Orbax beside the one line."""
    mesh = make_mesh(devices, 1)
    checkpointer = saved(tmp_path, mesh, 1)
    state = {"w": jax.random.normal(jax.random.key(0), (256, 256))}
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot save .* check permissions and free space"):
            checkpointer.save(2, state, META)
            while checkpointer._manager.is_saving_in_progress():
                time.sleep(0.01)  # it fails within a step
            checkpointer.check()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    gc.collect()
    assert check_readable(tmp_path) == 1 and checkpointer.steps() == [1]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot open"):
        Checkpointer(tmp_path / "file" / "checkpoints", 1)
    assert not capfd.readouterr().err


KILLED = """
import os, sys, threading
import jax, jax.numpy as jnp
jax.config.update("jax_platforms", "cpu")
from cosup_jax.checkpoint import Checkpointer
checkpointer = Checkpointer(sys.argv[1], 2)
state = {"w": jnp.arange(1024.0 * 1024).reshape(1024, 1024)}
checkpointer.save(1, state, {"fingerprint": {}})
checkpointer.wait()
print("ready", flush=True)
sys.stdin.readline()
for step in range(2, 10_000):
    checkpointer.save(step, state, {"fingerprint": {}})
"""


def test_kill_during_a_save_leaves_the_one_before(tmp_path, devices):
    """Bug: kill -9 in the middle of a save leaves a half-written newest checkpoint."""
    mesh = make_mesh(devices, 1)
    wanted = {"w": jax.ShapeDtypeStruct((1024, 1024), "float32", sharding=NamedSharding(mesh, P()))}
    run = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert run.stdout.readline() == "ready\n"
        run.stdin.write("\n")
        run.stdin.flush()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:  # looked at while it stands still
            os.kill(run.pid, signal.SIGSTOP)
            assert os.WIFSTOPPED(os.waitpid(run.pid, os.WUNTRACED)[1]), "it ended by itself"
            if list(tmp_path.glob("*tmp*")):
                break
            os.kill(run.pid, signal.SIGCONT)
            time.sleep(0.001)
    finally:
        run.kill()
        run.wait()
        run.stdin.close()
        run.stdout.close()
    assert list(tmp_path.glob("*tmp*")), "killed between two saves"
    newest = check_readable(tmp_path)
    checkpointer = Checkpointer(tmp_path, 2)
    found = checkpointer.restore(wanted, {})
    assert found.step == newest
    np.testing.assert_array_equal(found.state["w"], np.arange(1024 * 1024).reshape(1024, 1024))
    checkpointer.save(newest + 2, found.state, {"fingerprint": {}})
    checkpointer.close()
    assert check_readable(tmp_path) == newest + 2
    assert not list(tmp_path.glob("*tmp*"))
