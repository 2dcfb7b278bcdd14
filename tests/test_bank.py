"""The memory bank: what is stored, what counts, what it costs, and that a mesh moves none of it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import assert_close, config

from cosup_jax import bank as bank_lib
from cosup_jax import cosup, sharding
from cosup_jax.checkpoint import Checkpointer
from cosup_jax.config import MeshConfig
from cosup_jax.contrast import EMPTY, Candidates, Queries, Scale, in_float32
from cosup_jax.data.batch import BatchShape
from cosup_jax.errors import UserError

SHAPE = BatchShape(B=4, T=9, R=2, S=2, U=4, L=9, P=2)  # 8 queries and 8 passages a step
Q = C = 8
D, SLOTS = 5, 3


def _config(kind="dual", **keys):
    sizes = {"bank__size": SLOTS * C, "bank__queries": SLOTS * Q}
    return config(bank__kind=kind, **(sizes | keys))


def _step_data(step: int, ids=None, valid=None):
    """Live candidates of a step, identities 8 * step + 1 ... unless given, and queries for them."""
    rng = np.random.default_rng(step)
    ids = np.arange(C) + C * step + 1 if ids is None else np.asarray(ids)
    pairs = np.stack([ids, np.ones(C)], 1).astype(np.uint32)
    valid = np.ones(C, bool) if valid is None else np.asarray(valid)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    live = Candidates(
        draw(1, C, D),
        jnp.asarray(pairs)[None],
        jnp.where(valid, step, EMPTY)[None],
        since=jnp.int32(0),
    )
    positives = np.zeros((Q, SHAPE.S, 2), np.uint32)
    positives[:, 0] = pairs[rng.permutation(C)]
    return live, Queries(draw(Q, D), positives, jnp.asarray(valid))


_store = jax.jit(bank_lib.fill)


def _fill(bank, step: int, keep: bool = True, **data):
    return _store(bank, *_step_data(step, **data), jnp.int32(step), jnp.bool_(keep))


def _counted(bank, live, step, c):
    """Identities of the stored columns that count at `step`."""
    (found,) = bank_lib.candidates(bank, live, jnp.int32(step), c.bank)
    newer = {tuple(pair) for pair in np.asarray(found.newer_Nx2).tolist()}
    fresh = np.asarray(found.step_KxC) >= int(found.since)
    ids = [tuple(pair) for pair in np.asarray(found.id_KxCx2)[fresh].tolist()]
    return sorted(first for first, one in ids if (first, one) not in newer)


def test_the_ring_keeps_the_newest_steps():
    """Bug: a slot written by the wrong step, padding remembered, the newest copy lost."""
    c = _config()
    bank = bank_lib.init(c.bank, SHAPE, D)
    for step in range(5):
        bank = _fill(bank, step, valid=np.arange(C) < 6)
    written = np.asarray(bank.passages.step_KxC)
    assert [sorted(set(slot)) for slot in written.tolist()] == [[EMPTY, 3], [EMPTY, 4], [EMPTY, 2]]
    assert (written[:, 6:] == EMPTY).all()
    vectors, there = bank_lib.stored(bank, jnp.int32(3))
    assert_close(vectors, _step_data(3)[0].vector_KxCxD[0], 0)
    np.testing.assert_array_equal(there, np.arange(C) < 6)
    assert not np.any(bank_lib.stored(bank, jnp.int32(1))[1])  # overwritten by step 4
    again = _fill(bank, 5, ids=np.arange(C) + 4 * C + 1)  # the passages of step 4
    assert (np.asarray(again.passages.step_KxC)[1] == EMPTY).all()
    age, count = bank_lib.age(bank, jnp.int32(5), c.bank)
    assert (age, count) == (np.mean([3, 2, 1]), 18)


def test_what_counts():
    """Bugs: entries older than max_age, copies of live passages, or anything before start_step."""
    c = _config(bank__max_age=2, bank__start_step=3)
    bank = bank_lib.init(c.bank, SHAPE, D)
    for step in range(3):
        bank = _fill(bank, step)
    elsewhere, _ = _step_data(9)
    assert _counted(bank, elsewhere, 3, c) == list(range(9, 25))  # step 0 is three steps old
    assert _counted(bank, elsewhere, 2, c) == []
    half, _ = _step_data(2, ids=np.arange(C) + 21)  # 21 ... 24 are live too
    assert _counted(bank, half, 3, c) == list(range(9, 21))
    unsure, _ = _step_data(2, ids=np.arange(C) + 21, valid=np.zeros(C, bool))
    assert _counted(bank, unsure, 3, c) == list(range(9, 25))
    for step, rows in ((2, []), (3, [1, 2]), (4, [2])):
        (asked,) = bank_lib.queries(bank, jnp.int32(step), c.bank)
        kept = np.asarray(asked.valid_Q).reshape(SLOTS, Q)
        assert [k for k in range(SLOTS) if kept[k].any()] == rows
    held = [x.tolist() for x in bank_lib.steps(bank, jnp.int32(3), c.bank)]
    assert held == [[EMPTY, 1, 2]] * 2


@pytest.mark.parametrize("kind", ["passage", "dual"])
def test_a_skipped_step_leaves_every_bit(kind):
    """Bug: the vectors of a bad step in the bank, or copies evicted for a step that was skipped."""
    bank = bank_lib.init(_config(kind).bank, SHAPE, D)
    for step in range(4):
        bank = _fill(bank, step)
    same = _fill(bank, 4, keep=False, ids=np.arange(C) + 2 * C + 1)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(bank), strict=True):
        np.testing.assert_array_equal(a, b)


def test_half_precision_rounds_once():
    """Bug: the bits of bfloat16 read as numbers, or rounding beyond bfloat16's."""
    bank = bank_lib.init(_config(bank__dtype="bfloat16").bank, SHAPE, D)
    assert bank.passages.vector_KxCxD.dtype == jnp.uint16
    bank = _fill(bank, 0)
    live, asked = _step_data(0)
    rounded = lambda x: np.asarray(x).astype(jnp.bfloat16).astype(np.float32)
    vectors, _ = bank_lib.stored(bank, jnp.int32(0))
    np.testing.assert_array_equal(vectors, rounded(live.vector_KxCxD[0]))
    (rows,) = bank_lib.queries(bank, jnp.int32(1), _config().bank)
    np.testing.assert_array_equal(rows.vector_QxD[:Q], rounded(asked.vector_QxD))


def test_a_fresh_dual_bank_is_one_large_batch():
    """Bug: a bank whose gradient points elsewhere than that of a batch which holds it all."""
    c = _config()
    steps = [_step_data(step) for step in range(4)]
    bank = bank_lib.init(c.bank, SHAPE, D)
    for step, data in enumerate(steps[:-1]):
        bank = _store(bank, *data, jnp.int32(step), jnp.bool_(True))

    @jax.jit
    def gradient(asked, live, bank):
        def loss(query, passage):
            rows, columns = asked._replace(vector_QxD=query), live.replace(vector_KxCxD=passage)
            scale = Scale(jnp.float32(0.3), jnp.float32(0))
            return cosup.next_sequence(rows, columns, bank, jnp.int32(3), scale, c)[0]

        return jax.grad(loss, argnums=(0, 1))(asked.vector_QxD, live.vector_KxCxD)

    live, asked = steps[-1]
    found = gradient(asked, live, bank)
    columns, rows = zip(*steps, strict=True)
    join = lambda axis: lambda *x: jnp.concatenate(x, axis) if x[0].ndim else x[0]
    large = gradient(jax.tree.map(join(0), *rows), jax.tree.map(join(1), *columns), None)
    assert_close(found, (4 * large[0][-Q:], 4 * large[1][:, -C:]))  # means over Q and 4 Q rows


def _compiled_step(kind: str, size: int, mesh=None, **keys):
    """Score 256 queries and fill a bank of width 1024, compiled for abstract arguments."""
    shape, width = BatchShape(B=64, T=9, R=4, S=2, U=64, L=9, P=4), 1024
    c = _config(kind, bank__size=size, bank__queries=1024, bank__dtype="bfloat16", **keys)
    bank = jax.eval_shape(lambda: bank_lib.init(c.bank, shape, width))

    def step(bank, query, passage, positives, ids, valid, number):
        def loss(query, passage, temperature):
            asked = Queries(sharding.constrain(query, "batch", None), positives, valid)
            live = Candidates(
                sharding.constrain(passage[None], None, None, None),
                ids[None],
                jnp.where(valid, number, EMPTY)[None],
                since=jnp.int32(0),
            )
            scale = Scale(temperature, jnp.float32(0))
            total, _ = cosup.next_sequence(asked, live, bank, number, scale, c)
            return total, (live, asked)

        at = (query, passage, jnp.float32(0.05))
        grads, kept = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*at)
        return bank_lib.fill(bank, *kept, number, jnp.isfinite(grads[0]).all()), grads

    array = jax.ShapeDtypeStruct
    arguments = (
        *(bank, array((256, width), jnp.float32), array((256, width), jnp.float32)),
        *(array((256, 2, 2), jnp.uint32), array((256, 2), jnp.uint32), array((256,), bool)),
        array((), jnp.int32),
    )
    if mesh is None:
        return jax.jit(step, donate_argnums=0).lower(*arguments).compile()
    places = sharding.tree_shardings(mesh, bank_lib.logical_axes(bank), bank)
    rows = sharding.rows(mesh)
    jitted = jax.jit(
        step,
        in_shardings=(places, *[rows] * 5, sharding.replicated(mesh)),
        out_shardings=(places, (rows, rows, sharding.replicated(mesh))),
        donate_argnums=0,
    )
    with jax.set_mesh(mesh):
        return jitted.lower(*arguments).compile()


@pytest.mark.parametrize("kind", ["passage", "dual"])
@pytest.mark.parametrize("mesh_shape", [None, (2, 2, 2)])
def test_no_temporary_and_no_collective_grows_with_the_bank(kind, mesh_shape):
    """Bug: a bank gathered on one device, copied to be updated, turned into float32, or scored all
    at once. 65,536 and 1,048,576 passages of width 1024 in bfloat16."""
    mesh = mesh_shape and sharding.make_mesh(MeshConfig(*mesh_shape))
    at = lambda size: _compiled_step(kind, size, mesh, loss__tile_mib=64.0)
    compiled = [at(size) for size in (1 << 16, 1 << 20)]
    temporary = [x.memory_analysis().temp_size_in_bytes for x in compiled]
    moved = [
        sorted(re.findall(r"= (\S+) (?:all-|reduce-scatter|collective)\S*\(", x.as_text()))
        for x in compiled
    ]
    print(f"{kind}, mesh {mesh_shape}: temporary MiB {[round(x / 2**20, 1) for x in temporary]}")
    assert temporary[1] == temporary[0] < 128 << 20
    assert moved[1] == moved[0] and bool(moved[0]) == (mesh is not None)


@pytest.mark.parametrize(
    "kind,learned,margin",
    [
        ("passage", False, False),
        ("passage", False, True),
        ("dual", False, False),
        ("dual", True, True),
    ],
)
def test_the_cost_that_is_printed(kind, learned, margin):
    """Bug: a cost that leaves out the backward pass, the margin's, or the bank's own queries."""
    shape, width = BatchShape(B=64, T=9, R=4, S=2, U=64, L=9, P=4), 1024
    rows, total, told = 256 if kind == "passage" else 256 + 1024, [], []
    for slots in (4, 8):  # of 256 passages; XLA counts the body of the loop over tiles once
        tile = slots * 256 * 4 * (rows + width) / 2**20
        keys = {"loss__tile_mib": tile, "loss__learn_temperature": learned}
        keys["loss__margin_mask"] = margin
        total.append(_compiled_step(kind, 1 << 12, **keys).cost_analysis()["flops"])
        c = _config(kind, bank__size=slots * 256, bank__queries=1024)
        bank = jax.eval_shape(lambda c=c: bank_lib.init(c.bank, shape, width))
        told.append(bank_lib.flops(bank, shape, learned, margin))
    counted = (total[1] - total[0]) / (told[1] - told[0])
    assert 1 <= counted < 1.1, counted  # what is not a matrix product comes on top


def test_restores_onto_another_mesh(tmp_path):
    """Bug: a bank that only the mesh which filled it can read."""
    c = _config(bank__dtype="bfloat16")
    bank = bank_lib.init(c.bank, SHAPE, D)
    for step in range(5):
        bank = _fill(bank, step)

    def on(mesh_shape):
        mesh = sharding.make_mesh(MeshConfig(*mesh_shape))
        return sharding.tree_shardings(mesh, bank_lib.logical_axes(bank), bank)

    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(5, jax.device_put(bank, on((4, 2, 1))), {"fingerprint": {}})
    checkpointer.wait()
    abstract = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), bank, on((2, 1, 4))
    )
    restored = checkpointer.restore(abstract, {}).state
    checkpointer.close()
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(bank), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.sharding.mesh.shape["tensor"] == 4
    assert in_float32(restored.passages.vector_KxCxD).any()


def test_a_bank_smaller_than_a_step_is_refused():
    """Bug: a bank of no slots, which remembers nothing, silently."""
    with pytest.raises(UserError, match=r"config\.bank\.size=7 is smaller"):
        bank_lib.init(_config(bank__size=7).bank, SHAPE, D)
