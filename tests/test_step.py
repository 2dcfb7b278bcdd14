"""The train step as a whole: it learns, it shards what it should, and it resumes bit by bit."""

import dataclasses
import functools
import math
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from batches import ARCH, assert_close, config, lookups, random_batch, towers

from cosup_jax import bank as bank_lib
from cosup_jax import cosup, optim, sharding
from cosup_jax import step as step_lib
from cosup_jax.checkpoint import Checkpointer
from cosup_jax.config import MeshConfig
from cosup_jax.cosup import Factors
from cosup_jax.data.batch import batch_shape
from cosup_jax.errors import UserError
from cosup_jax.probe import Probe


@functools.cache
def _program(c, mesh_shape, t):
    """A compiled step on a mesh, and what makes a fresh state."""
    mesh = sharding.make_mesh(MeshConfig(*mesh_shape), jax.devices()[: math.prod(mesh_shape)])
    tx = optim.make(c, c.num_steps, steps_per_epoch=5)

    def fresh():
        params = step_lib.init_params(jax.random.key(0), t, c)
        return step_lib.init_state(params, jax.random.key(1), tx, c)

    places = step_lib.state_shardings(jax.eval_shape(fresh), mesh, t, c)
    step = step_lib.compile_step(mesh, places, towers=t, tx=tx, config=c)
    return step, jax.jit(fresh, out_shardings=places), mesh


TRANSFORMERS, LOOKUPS = towers(), lookups()
EVERYTHING = config(  # that a state can hold: one program for the tests of it
    bank__kind="dual",
    bank__size=96,
    bank__queries=96,
    bank__ema_decay=0.9,
    optim__weight_decay=0.1,
)


def _compiled(c, mesh_shape=(2, 2, 2), t=TRANSFORMERS):
    """A step, a fresh state, a mesh."""
    step, fresh, mesh = _program(c, mesh_shape, t)
    # Waits: on few cores, what is sent to fake devices while a step runs there can block it.
    return (lambda *args: jax.block_until_ready(step(*args))), fresh(), mesh


def _batches(c, mesh, count: int):
    shape = batch_shape(c)
    return [jax.device_put(random_batch(seed, shape), sharding.rows(mesh)) for seed in range(count)]


@pytest.mark.slow
def test_overfits_a_batch():
    """Bug: a gradient that points nowhere, targets off by one, an optimizer that skips a tower."""
    c = config(
        num_steps=150,
        optim__gen_learning_rate=0.01,
        optim__ctx_learning_rate=0.01,
        optim__warmup_steps=5,
    )
    step, state, mesh = _compiled(c, (1, 1, 1))
    (batch,) = _batches(c, mesh, 1)
    before = jax.tree.map(np.array, state.params)
    for _ in range(c.num_steps):
        state, metrics = step(state, batch)
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(state.params), strict=True
    ):
        assert np.any(old != new), f"never trained: {jax.tree_util.keystr(path)}"
    assert metrics["ntp/nats_per_token"] < 0.05
    assert metrics["nsp/top1"] == 1.0 and metrics["nsp/nats_per_ret"] < 0.05


def test_everything_lies_where_it_should():
    """Bug: optimizer moments or the bank copied to every device."""
    _, state, _ = _compiled(EVERYTHING)
    P = jax.sharding.PartitionSpec
    expected = {
        "embed/table": P("tensor", "fsdp"),
        "head/kernel": P("fsdp", "tensor"),
        "blocks/attn/q": P(None, "fsdp", "tensor", None),
        "blocks/attn/k": P(None, "fsdp", "tensor", None),
        "blocks/attn/o": P(None, "tensor", None, "fsdp"),
        "blocks/mlp/gate": P(None, "fsdp", "tensor"),
        "blocks/mlp/down": P(None, "tensor", "fsdp"),
        "blocks/attn_norm/scale": P(None, "fsdp"),
    }
    mu = next(s.mu for s in jax.tree.leaves(state.opt_state, is_leaf=_is_adam) if _is_adam(s))
    for tree in (state.params, mu):
        for name, spec in expected.items():
            leaf = tree["gen"]
            for key in name.split("/"):
                leaf = leaf[key]
            wanted = jax.sharding.NamedSharding(leaf.sharding.mesh, spec)
            assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (name, leaf.sharding.spec)
    for ring in (state.bank.passages, state.bank.queries):
        assert (
            ring.vector_KxCxD.addressable_shards[0].data.shape[1] * 4
            == (ring.vector_KxCxD.shape[1])
        )


def test_the_bank_is_filled_once_a_step():
    """Bug: a slot written twice or by another step; padding remembered as a passage."""
    step, state, mesh = _compiled(EVERYTHING)
    batches = _batches(EVERYTHING, mesh, 4)
    for batch in batches:
        state, _ = step(state, batch)
    rings = state.bank.passages, state.bank.queries
    written = [[set(np.unique(slot)) - {-1} for slot in np.asarray(r.step_KxC)] for r in rings]
    assert written[1] == [{2}, {3}]  # two slots of 48 queries, the oldest overwritten
    assert written[0] == [{3}, {1}, {2}]  # three slots of 32 passages
    valid_C = np.asarray(batches[3].passage_valid_UxP).reshape(-1)
    assert not (np.asarray(state.bank.passages.step_KxC)[0] == 3)[~valid_C].any()


def _is_adam(node) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def test_a_mesh_that_would_copy_the_parameters_is_refused():
    """Bug: a tensor axis that divides nothing, silently."""
    c = config()
    t = towers(dataclasses.replace(ARCH, heads=3, kv_heads=3, mlp_width=100))
    mesh = sharding.make_mesh(MeshConfig(1, 1, 8))
    tx = optim.make(c, 10, 10)
    params = jax.eval_shape(lambda: step_lib.init_params(jax.random.key(0), t, c))
    state = jax.eval_shape(lambda p: step_lib.init_state(p, jax.random.key(1), tx, c), params)
    with pytest.raises(UserError, match=r"mesh\.tensor would leave"):
        step_lib.state_shardings(state, mesh, t, c)


def test_resume_is_bit_equal(tmp_path):
    """Bug: something that a step changes is not in the checkpoint; donation that corrupts it."""
    step, state, mesh = _compiled(EVERYTHING)
    batches = _batches(EVERYTHING, mesh, 4)
    unbroken, broken = [], []
    checkpointer = Checkpointer(tmp_path, keep=2)
    for k, batch in enumerate(batches):
        if k == 2:
            checkpointer.save(2, state, {"fingerprint": {}})
        state, metrics = step(state, batch)
        unbroken.append(jax.device_get(metrics))
    checkpointer.wait()
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    restored = checkpointer.restore(abstract, {})
    again = restored.state
    for batch in batches[restored.step :]:
        again, metrics = step(again, batch)
        broken.append(jax.device_get(metrics))
    checkpointer.close()
    assert broken == unbroken[2:]
    raw = lambda x: (
        jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    )
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(np.asarray(raw(a)), np.asarray(raw(b)))


def test_clipping_sees_both_towers():
    """Bug: the official code's clipping, which leaves Ctx and the output head alone."""
    params = {"gen": {"blocks": jnp.zeros(2), "head": jnp.zeros(2)}, "ctx": {"x": jnp.zeros(1)}}
    grads = {"gen": {"blocks": jnp.array([3.0, 0]), "head": jnp.array([0, 4.0])}}
    grads["ctx"] = {"x": jnp.array([12.0])}  # 3, 4, 12: norm 13
    scaled = {}
    for compat in ("", "official"):
        c = config(compat=compat, optim__clip_norm=1.0)
        clip = optim.make(c, 10, 10)
        first = optax.chain(clip)  # the whole chain is Adam; its first moment shows what it was fed
        state = first.update(grads, first.init(params), params)[1]
        mu = next(s.mu for s in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(s))
        scaled[compat] = jax.tree.map(lambda m: 10 * m, mu)  # b1 = 0.9
    assert_close(scaled[""], jax.tree.map(lambda g: g / 13, grads))
    expected = grads | {"gen": grads["gen"] | {"blocks": grads["gen"]["blocks"] / 3}}
    assert_close(scaled["official"], expected)


def test_clipping_by_tower():
    """Bug: a tower whose gradient is small scaled down for the sake of the other."""
    params = {"gen": {"x": jnp.zeros(2)}, "ctx": {"x": jnp.zeros(1)}}
    grads = {"gen": {"x": jnp.array([3.0, 4])}, "ctx": {"x": jnp.array([0.5])}}
    chain = optim.make(config(optim__clip="tower", optim__clip_norm=1.0), 10, 10)
    state = chain.update(grads, chain.init(params), params)[1]
    mu = next(s.mu for s in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(s))
    expected = {"gen": {"x": jnp.array([0.6, 0.8])}, "ctx": {"x": jnp.array([0.5])}}
    assert_close(jax.tree.map(lambda m: 10 * m, mu), expected)


def _raw(state):
    """Leaves as NumPy, keys as their data, by path."""
    is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    return {
        jax.tree_util.keystr(path): np.asarray(jax.random.key_data(x) if is_key(x) else x)
        for path, x in jax.tree_util.tree_leaves_with_path(state)
    }


def _poisoned(tree, value):
    """A copy with one number of Gen's embedding table replaced."""
    table = tree["gen"]["embed"]["table"].at[0, 0].set(value)
    return tree | {"gen": tree["gen"] | {"embed": {"table": table}}}


def test_a_bad_step_changes_nothing():
    """Bug: a NaN in the moments, the bank or the moving average for good; a count that a good step
    does not end, or that hides the steps before."""
    step, state, mesh = _compiled(EVERYTHING)
    batches = _batches(EVERYTHING, mesh, 3)
    state, _ = step(state, batches[0])
    good = jax.tree.map(jnp.copy, state.params)
    places = jax.tree.map(lambda x: x.sharding, state.params)
    for bad in (1, 2):
        state = state.replace(params=jax.device_put(_poisoned(state.params, jnp.nan), places))
        before = _raw(state)
        state, metrics = step(state, batches[bad])
        after = _raw(state)
        assert (metrics["skipped/total"], metrics["skipped/in_a_row"]) == (bad, bad)
        for path in before:
            if not path.startswith((".step", ".skipped")):
                np.testing.assert_array_equal(after[path], before[path], err_msg=path)
        assert state.step == bad + 1
    state, metrics = step(state.replace(params=good), batches[0])
    assert (metrics["skipped/total"], metrics["skipped/in_a_row"]) == (2, 0)
    assert all(np.isfinite(x).all() for x in _raw(state).values())
    assert _raw(state)[".bank.passages.step_KxC"].max() == 3


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_either_alone_makes_a_step_bad(what, monkeypatch):
    """Bug: only the loss watched, or only the gradient: one may be finite without the other."""
    loss = cosup.loss

    def spoilt(params, *rest):
        total, found = loss(params, *rest)
        x = params["gen"]["embed"]["table"][0, 0]
        extra = jnp.sqrt(x - x) if what == "gradient" else jax.lax.stop_gradient(x / 0)
        return total + extra, found  # the root's slope at zero is infinite, its value is not

    monkeypatch.setattr(cosup, "loss", spoilt)
    c = config(seed=len(what))  # a program of its own
    step, state, mesh = _compiled(c, (1, 1, 1), LOOKUPS)
    before = _raw(state.params)
    state, metrics = step(state, *_batches(c, mesh, 1))
    assert metrics["skipped/total"] == 1
    for path, leaf in _raw(state.params).items():
        np.testing.assert_array_equal(leaf, before[path])


def test_what_decays_and_how_fast():
    """Bug: temperature, bias or norms that decay; a tower that learns at the other's rate."""
    keys = {"optim__gen_learning_rate": 0.1, "optim__ctx_learning_rate": 0.2}
    tx = optim.make(config(optim__weight_decay=0.5, **keys), 10, 10)
    params = {
        "gen": {"kernel": jnp.ones(2), "scale": jnp.ones(2)},
        "ctx": {"kernel": jnp.ones(2)},
        "nsp": {"log_temperature": jnp.ones(()), "bias": jnp.ones(())},
    }
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    expected = {
        "gen": {"kernel": jnp.full(2, -0.05), "scale": jnp.zeros(2)},
        "ctx": {"kernel": jnp.full(2, -0.1)},
        "nsp": {"log_temperature": jnp.zeros(()), "bias": jnp.zeros(())},
    }
    assert_close(updates, expected)


@pytest.mark.parametrize("tower", ["gen", "ctx"])
def test_a_frozen_tower_stays(tower):
    """Bug: a frozen tower that decays or drifts, that has optimizer state, or whose gradient is in
    the clipping norm."""
    c = config(optim__weight_decay=0.1, **{f"{tower}__freeze": True})
    step, state, mesh = _compiled(c, (1, 1, 1), LOOKUPS)
    before = jax.tree.map(np.array, state.params)
    mu = next(s.mu for s in jax.tree.leaves(state.opt_state, is_leaf=_is_adam) if _is_adam(s))
    assert tower not in mu
    state, metrics = step(state, *_batches(c, mesh, 1))
    assert f"grad/norm_{tower}" not in metrics
    other = {"gen": "ctx", "ctx": "gen"}[tower]
    assert_close(state.params[tower], before[tower], 0)
    with pytest.raises(AssertionError):
        assert_close(state.params[other], before[other], 0)


@pytest.mark.parametrize("loss,missing", [("ntp", "nsp"), ("nsp", "ntp")])
def test_one_loss_alone(loss, missing):
    """Bug: a loss without weight that still costs its forward pass, decays a tower that it does
    not train, or is reported without being measured."""
    keys = {f"loss__{missing}_weight": 0.0, "loss__learn_temperature": True}
    c = config(optim__weight_decay=0.1, **keys)
    step, state, mesh = _compiled(c, (1, 1, 1), LOOKUPS)
    before = jax.tree.map(np.array, state.params)
    batch = _batches(c, mesh, 1)[0]
    state, metrics = step(state, batch)
    assert not [name for name in metrics if name.startswith(f"{missing}/")]
    assert (
        metrics["loss/total"]
        == metrics[{"ntp": "ntp/nats_per_token", "nsp": "nsp/nats_per_ret"}[loss]]
    )
    if loss == "ntp":
        assert_close(state.params["ctx"], before["ctx"], 0)
        mu = next(s.mu for s in jax.tree.leaves(state.opt_state, is_leaf=_is_adam) if _is_adam(s))
        assert mu.keys() == {"gen"}
    else:  # Gen's output head predicts tokens and nothing else
        head, start = (params["gen"]["head"]["kernel"] for params in (state.params, before))
        assert_close(head, start, 0)
        mu = next(s.mu for s in jax.tree.leaves(state.opt_state, is_leaf=_is_adam) if _is_adam(s))
        assert "head" not in mu["gen"]


def test_a_learned_temperature_stays_in_its_range():
    """Bug: an update takes it out, to where a clamp leaves it no gradient to come back by."""
    c = config(loss__learn_temperature=True)
    step, state, mesh = _compiled(c, (1, 1, 1), LOOKUPS)
    state = state.replace(params=state.params | {"nsp": {"log_temperature": jnp.log(0.005)}})
    state, _ = step(state, *_batches(c, mesh, 1))
    low = float(state.params["nsp"]["log_temperature"])
    assert low == pytest.approx(math.log(0.01))


BASE = Path(__file__).parent.parent / "configs" / "base.py"
BASE_VARIANTS = runpy.run_path(str(BASE))["VARIANTS"]
OBJECTIVES = sorted(BASE_VARIANTS.keys() - {"smoke"})


@pytest.mark.parametrize(
    "make", [lookups, pytest.param(towers, marks=pytest.mark.slow)], ids=["lookup", "transformer"]
)
@pytest.mark.parametrize("variant", OBJECTIVES)
def test_every_objective_of_base_learns(variant, make):
    """Bug: a variant that builds and does not train: no gradient, a lost tower, a bank unused."""
    keys = {key.replace(".", "__"): value for key, value in BASE_VARIANTS[variant].items()}
    c = config(**keys, bank__size=96, bank__queries=96, loss__temperature=0.1)
    tied = c.tie_ctx_to_gen
    step, state, mesh = _compiled(c, (1, 1, 1), make(tied=tied))
    assert ("ctx" in state.params) != tied
    first, last, (batch,) = {}, {}, _batches(c, mesh, 1)
    for _ in range(8):
        state, metrics = step(state, batch)
        first, last = first or metrics, metrics
    watched = {"ntp/nats_per_token", "nsp/nats_per_ret"} & metrics.keys()
    assert watched and all(float(last[name]) < float(first[name]) for name in watched)
    assert np.isfinite(list(map(float, metrics.values()))).all()


def test_the_weight_of_nsp_moves():
    """Bug: a ramp off by one, or one that never ends."""
    c = config(loss__nsp_weight=2.0, loss__nsp_ramp_steps=4, loss__nsp_ramp_from=0.5).loss
    weights = [float(cosup.nsp_weight(jnp.int32(step), c)) for step in range(6)]
    np.testing.assert_allclose(weights, [0.5, 0.875, 1.25, 1.625, 2.0, 2.0])
    assert float(cosup.nsp_weight(jnp.int32(0), config().loss)) == 1.0


def test_the_moving_average_feeds_the_bank():
    """Bug: a bank filled by Ctx itself, an average that runs ahead of Ctx or starts at zero."""
    c = config(bank__kind="passage", bank__size=96, bank__ema_decay=0.75, optim__clip_norm=0.0)
    step, state, mesh = _compiled(c, (1, 1, 1), LOOKUPS)
    t, first = LOOKUPS, jax.tree.map(np.array, state.params["ctx"])
    batches = _batches(c, mesh, 2)
    state, _ = step(state, batches[0])
    average = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * np.asarray(b), first, state.params["ctx"])
    assert_close(state.ema_ctx, average)
    average = jax.tree.map(jnp.copy, state.ema_ctx)
    state, _ = step(state, batches[1])
    live = jax.jit(lambda p: cosup.condense(p, batches[1], 1, t, c))(average)
    stored, there_C = bank_lib.stored(state.bank, jnp.int32(1))
    assert there_C.any()
    assert_close(stored, live.vector_KxCxD[0])


def test_what_is_frozen_is_not_averaged():
    """Bug: an average of equal numbers in bfloat16, which is another number each time: the bank is
    filled by a Ctx that nobody trained; or frozen weights that are kept twice."""
    keys = {
        "ctx__arch__frozen_layers": 1,
        "ctx__init": "weights",
        "ctx__arch__frozen_dtype": "bfloat16",
    }
    c = config(bank__kind="passage", bank__size=96, bank__ema_decay=0.99, **keys)
    frozen = towers(dataclasses.replace(ARCH, frozen_layers=1))
    state = jax.eval_shape(_program(c, (1, 1, 1), frozen)[1])
    assert state.params["ctx"]["frozen_blocks"]
    assert state.ema_ctx.keys() == state.params["ctx"].keys() - {"frozen_blocks"}


def test_runs_that_differ_in_weights_or_temperature_share_a_program():
    """Bug: every run of a sweep over them compiles a step of its own; or it trains with the numbers
    of another one."""
    varied = {"ntp_weight": 0.5, "nsp_weight": 0.25, "nsp_ramp_from": 2.0, "temperature": 0.2}
    runs = [
        config(loss__nsp_ramp_steps=2),
        config(loss__nsp_ramp_steps=2, **{f"loss__{name}": x for name, x in varied.items()}),
    ]
    texts = set()
    for c in runs:
        step, state, mesh = _compiled(c, (1, 1, 1), LOOKUPS)
        (batch,) = _batches(c, mesh, 1)
        probe, given = Probe(mesh, LOOKUPS, c, 0, None), (state, batch, Factors.of(c.loss))
        with jax.set_mesh(mesh):
            texts.add(_program(c, (1, 1, 1), LOOKUPS)[0].lower(state, batch).as_text())
            texts.add(probe._losses.lower(*given).as_text())
    assert len(texts) == 2
    for weight in (2.0, 1.125, 0.25, 0.25):
        state, metrics = step(state, batch)
        found = jax.tree.map(float, metrics)
        assert found["loss/nsp_weight"] == weight
        assert found["nsp/temperature"] == pytest.approx(0.2)
        total = 0.5 * found["ntp/nats_per_token"] + weight * found["loss/nsp"]
        assert found["loss/total"] == pytest.approx(total)


@pytest.mark.slow
def test_slices_save_memory():
    """Bug: activations of all slices kept. Eight slices: at most a quarter of the temporary memory
    of one, gradients aside (they are temporaries too, as large as the parameters)."""
    keys = {"batch_size": 64, "data__ctx_rows": 64, "data__max_gen_tokens": 128}
    keys |= {"data__ctx_row_tokens": 128, "data__max_ctx_tokens": 64}
    temporary = []
    for slices in (1, 8):
        c = config(micro_batches=slices, loss__tile_mib=0.25, **keys)
        step, fresh, mesh = _program(c, (1, 1, 1), TRANSFORMERS)
        state = jax.eval_shape(fresh)
        batch = jax.eval_shape(lambda c=c: random_batch(0, batch_shape(c)))
        with jax.set_mesh(mesh):
            compiled = step.lower(state, batch).compile()
        gradients = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
        temporary.append(compiled.memory_analysis().temp_size_in_bytes - gradients)
    print(f"temporary MiB but gradients: {[round(x / 2**20, 1) for x in temporary]}")
    assert 0 < temporary[1] <= 0.25 * temporary[0]


@pytest.mark.parametrize(
    "kind,expected",
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1]),
        ("epoch", [1 / 3, 2 / 3, 1, 1, 0.85, 0.85, 0.85]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.1 + 0.45 * (1 + np.cos(np.pi / 8)), None, None, None]),
    ],
)
def test_schedules(kind, expected):
    """Bug: a warm-up that starts at zero, a decay that starts a step early."""
    c = config(optim__schedule=kind, optim__warmup_steps=2)
    rate = optim.schedule(c.optim, 1.0, num_steps=10, steps_per_epoch=4)
    for step, value in enumerate(expected):
        if value is not None:
            np.testing.assert_allclose(rate(jnp.int32(step)), value, rtol=1e-6, err_msg=str(step))
