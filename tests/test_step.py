"""The train step as a whole: it learns, it shards what it should, and it resumes bit by bit."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from batches import ARCH, assert_close, config, random_batch, towers

from cosup_jax import optim, sharding
from cosup_jax import step as step_lib
from cosup_jax.checkpoint import Checkpointer
from cosup_jax.config import MeshConfig
from cosup_jax.data.batch import batch_shape
from cosup_jax.errors import UserError


def _compiled(c, mesh_shape=(2, 2, 2), seed: int = 0):
    """A compiled step on a mesh, and a fresh state."""
    t = towers()
    mesh = sharding.make_mesh(MeshConfig(*mesh_shape), jax.devices()[: math.prod(mesh_shape)])
    tx = optim.make(c, c.num_steps, steps_per_epoch=5)

    def fresh():
        params = step_lib.init_params(jax.random.key(seed), t, c)
        return step_lib.init_state(params, jax.random.key(1), tx, c)

    places = step_lib.state_shardings(jax.eval_shape(fresh), mesh, t, c)
    state = jax.jit(fresh, out_shardings=places)()
    return step_lib.compile_step(mesh, places, towers=t, tx=tx, config=c), state, mesh


def _batches(c, mesh, count: int):
    shape = batch_shape(c)
    return [jax.device_put(random_batch(seed, shape), sharding.rows(mesh)) for seed in range(count)]


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
        state, metrics = jax.block_until_ready(step(state, batch))
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(state.params), strict=True
    ):
        assert np.any(old != new), f"never trained: {jax.tree_util.keystr(path)}"
    assert metrics["ntp/nats_per_token"] < 0.05
    assert metrics["nsp/top1"] == 1.0 and metrics["nsp/nats_per_ret"] < 0.05


def test_everything_lies_where_it_should():
    """Bug: optimizer moments or the bank copied to every device."""
    c = config(bank__kind="dual", bank__size=96, bank__queries=96)
    _, state, _ = _compiled(c)
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
    c = config(bank__kind="dual", bank__size=96, bank__queries=96)
    step, state, mesh = _compiled(c)
    batches = _batches(c, mesh, 4)
    for batch in batches:
        state, _ = jax.block_until_ready(step(state, batch))
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
    c = config(bank__kind="dual", bank__size=96, bank__queries=96)
    step, state, mesh = _compiled(c)
    batches = _batches(c, mesh, 4)
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
