"""Next-sequence prediction on bare vectors against loops: every loss, mask and bank."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import assert_close, config
from oracle import key, remembered, vector_loss

from cosup_jax import bank as bank_lib
from cosup_jax import contrast, cosup, nsp
from cosup_jax.contrast import EMPTY, Candidates, Queries, Scale
from cosup_jax.data.batch import BatchShape

Q, C, D, S, SLOTS, STEP = 6, 8, 5, 3, 4, 5
SHAPE = BatchShape(B=2, T=9, R=3, S=S, U=4, L=9, P=2)


def _config(kind: str, **keys):
    sizes = {"bank__size": SLOTS * C, "bank__queries": 2 * Q, "bank__max_age": 3}
    return config(bank__kind=kind, loss__learn_temperature=True, **sizes, **keys)


_fill = jax.jit(bank_lib.fill)


@jax.jit
def _live(vectors, ids, valid, step=0) -> Candidates:
    """Candidates as `cosup.condense` makes them."""
    counted = contrast.first_of_each(jnp.asarray(ids), jnp.asarray(valid))
    return Candidates(
        jnp.asarray(vectors)[None],
        jnp.asarray(ids)[None],
        jnp.where(counted, step, EMPTY)[None],
        since=jnp.int32(0),
    )


def _vectors(seed: int, c):
    """Random live rows and columns, and a bank that overlaps them; few identities, so that copies
    are certain."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    ids = np.stack([rng.integers(1, 9, C), np.ones(C)], 1).astype(np.uint32)

    def asked(known, share):
        positives = np.zeros((Q, S, 2), np.uint32)
        positives[:, 0] = known[rng.integers(0, C, Q)]
        positives[::2, 1] = known[rng.integers(0, C, len(positives[::2]))]
        positives[:, 1][(positives[:, 1] == positives[:, 0]).all(-1)] = 0
        return Queries(draw(Q, D), positives, rng.random(Q) < share)

    queries, valid = asked(ids, 0.8), rng.random(C) < 0.8
    bank = bank_lib.init(c.bank, SHAPE, D)
    for past in range(STEP) if bank else ():
        old = ids[rng.permutation(C)].copy()
        old[: C // 2, 0] += 20  # half of them are passages that are not live
        old_live = _live(draw(C, D), old, rng.random(C) < 0.9, past)
        bank = _fill(bank, old_live, asked(old, 0.9), jnp.int32(past), jnp.bool_(True))
    return queries, draw(C, D), ids, valid, bank


TILE = 3 * 4 * (Q + D)  # bytes: three live columns, so that the last tile is short
CASES = [
    *((kind, "softmax", "identity", 0) for kind in ("off", "passage", "dual")),
    *((kind, "sigmoid", "identity", TILE) for kind in ("off", "dual")),
    ("off", "softmax", "identity margin", 0),
    ("dual", "softmax", "identity margin", TILE),
    ("passage", "sigmoid", "identity margin", 0),
    ("off", "softmax", "", 0),
    ("off", "sigmoid", "", TILE),
    ("off", "sigmoid", "margin", TILE),
]


@pytest.mark.parametrize("kind,contrastive,masks,tile_bytes", CASES)
def test_nsp_equals_the_loops(kind, contrastive, masks, tile_bytes):
    """Bugs: a copy of the positive or a sibling as negative; a bank entry that is live, old or
    stored twice counted; the mean over the wrong number of rows; a margin taken after the
    temperature; gradient lost on one side, or a factor in front of the loss forgotten. Where
    identity does not mask: a passage counted as often for who asks for it as for others, by rows
    without a query, or masked as too close to itself."""
    c = _config(
        kind,
        loss__contrastive=contrastive,
        loss__identity_mask="identity" in masks,
        loss__margin_mask="margin" in masks,
        loss__margin=0.3,
        loss__tile_mib=tile_bytes / 2**20,
    )
    tau, bias, outer = 0.3, -1.5 if contrastive == "sigmoid" else 0.0, 2.5

    @jax.jit
    def grad(queries, live, ids, valid, bank):
        def loss(query, passage, temperature, bias):
            total, _ = cosup.next_sequence(
                queries._replace(vector_QxD=query),
                _live(passage, ids, valid),
                bank,
                jnp.int32(STEP),
                Scale(temperature, bias),
                c,
            )
            return outer * total

        at = (queries.vector_QxD, live, jnp.float32(tau), jnp.float32(bias))
        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(*at)

    for seed in range(4):
        queries, live, ids, valid, bank = _vectors(seed, c)
        value, grads = grad(queries, live, ids, valid, bank)
        expected = vector_loss(queries, live, ids, valid, bank, STEP, tau, bias, c)
        np.testing.assert_allclose(value, outer * expected[0], rtol=1e-5)
        assert_close(grads[:2], tuple(outer * x for x in expected[1:3]))
        assert_close(grads[2], outer * expected[3])
        if contrastive == "sigmoid":  # softmax does not depend on it: both sides are rounding
            assert_close(grads[3], outer * expected[4])


@functools.partial(jax.jit, static_argnums=0)
def _sums(c, queries, live, ids, valid, bank):
    step = jnp.int32(STEP)
    columns = [_live(live, ids, valid)]
    columns += bank_lib.candidates(bank, columns[0], step, c.bank)
    how = contrast.How(margin=c.loss.margin if c.loss.margin_mask else None)
    return nsp.nsp_sums([queries], columns, Scale(jnp.float32(0.5), jnp.float32(0)), how)[0]


@pytest.mark.parametrize("kind", ["off", "passage"])
def test_what_is_masked_is_counted(kind):
    """Bug: candidates reported that were masked, or copies, siblings and margins mixed up."""
    c = _config(kind, loss__margin_mask=True, loss__margin=0.3)
    for seed in range(4):
        queries, live, ids, valid, bank = _vectors(seed, c)
        found = _sums(c, queries, live, ids, valid, bank)
        columns = {}
        for j in np.flatnonzero(valid):
            columns.setdefault(key(ids[j]), live[j])
        stored, _ = remembered(bank, STEP, c.bank.max_age)
        copies = sum(identity in columns for _, identity in stored)
        for vector, identity in stored:
            columns.setdefault(identity, vector)
        counted = siblings = close = right = rows = 0
        chance, margin = 0.0, 0.0
        for i in np.flatnonzero(queries.valid_Q):
            own, *others = map(key, queries.positives_QxSx2[i])
            if own not in columns:
                continue
            query = queries.vector_QxD[i]
            rivals = {id: query @ v for id, v in columns.items() if id not in (own, *others)}
            kept = [s for s in rivals.values() if s <= query @ columns[own] + 0.3]
            siblings += sum(id in others for id in columns if id != own)
            close += len(rivals) - len(kept)
            counted += 1 + len(kept)
            rows += 1
            right += query @ columns[own] > max(kept, default=-np.inf)
            chance += 1 / (1 + len(kept))
            margin += query @ columns[own] - max(kept) if kept else 0.0
        assert (found.weight, found.candidates) == (rows, counted)
        assert (found.siblings, found.too_close) == (siblings, close)
        assert (found.top1, found.copies) == (right, copies * rows)
        np.testing.assert_allclose((found.chance, found.margin), (chance, margin), rtol=1e-4)


def test_what_is_reported_is_of_distinct_passages():
    """Bug: a passage that two ask for ties with itself, so that top-1 and the margin are how ties
    are rounded."""
    scale, step = Scale(jnp.float32(0.3), jnp.float32(0)), jnp.int32(STEP)

    @functools.partial(jax.jit, static_argnums=0)
    def sums(c, queries, *live):
        return cosup.next_sequence(queries, _live(*live), None, step, scale, c)[1]

    for seed in range(4):
        masked, unmasked = (_config("off", loss__identity_mask=mask) for mask in (True, False))
        given = _vectors(seed, masked)[:4]
        once, again = sums(masked, *given), sums(unmasked, *given)
        assert once.loss < again.loss
        assert once._replace(loss=0) == again._replace(loss=0)


def test_a_nan_on_padding_stays_there():
    """Bug: the vector of an empty slot reaches a gradient as 0 * NaN."""
    c = _config("off")
    queries, live, ids, valid, _ = _vectors(2, c)
    queries.valid_Q[:2] = valid[:2] = False
    query = np.where(queries.valid_Q[:, None], queries.vector_QxD, np.nan)
    passage = np.where(valid[:, None], live, np.nan)

    def loss(query, passage):
        return _sums(c, queries._replace(vector_QxD=query), passage, ids, valid, None).loss

    grads = jax.grad(loss, argnums=(0, 1))(query, passage)
    assert_close(grads, jax.grad(loss, argnums=(0, 1))(queries.vector_QxD, live), 0)


def test_scores_are_never_whole():
    """Bug: a tile size that nobody reads. 4,096 queries and 16,384 passages."""
    rows, columns, width = 4096, 16384, 64
    array = jax.ShapeDtypeStruct
    shapes = (array((rows, width), jnp.float32), array((columns, width), jnp.float32))

    def temporary(tile_bytes):
        def loss(query, passage):
            asked = Queries(query, jnp.zeros((rows, 1, 2), jnp.uint32), jnp.ones(rows, bool))
            live = Candidates(
                passage[None],
                jnp.arange(2 * columns, dtype=jnp.uint32).reshape(1, columns, 2),
                jnp.zeros((1, columns), jnp.int32),
                since=jnp.int32(0),
            )
            scale = Scale(jnp.float32(1), jnp.float32(0))
            return nsp.nsp_sums([asked], [live], scale, contrast.How(tile_bytes=tile_bytes))[0].loss

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole, part = temporary(0), temporary(16 << 20)
    print(f"temporary MiB: untiled {whole >> 20:,}, 16 MiB tiles {part >> 20:,}")
    assert part * 4 <= whole


def test_the_scale_that_is_learned():
    """Bug: a clamp that is not applied, or has no gradient, or half of one, at its ends; a learned
    bias that is not read."""
    c = config(loss__contrastive="sigmoid", loss__learn_temperature=True).loss
    for wanted, used in ((1e-5, 0.01), (0.3, 0.3), (1e5, 100.0)):
        learned = {"log_temperature": jnp.log(jnp.float32(wanted)), "bias": jnp.float32(-3)}
        kept = nsp.within_range(learned)
        found, slope = jax.value_and_grad(lambda x: nsp.scale_of(x, c, c.temperature).temperature)(
            kept
        )
        np.testing.assert_allclose((found, kept["bias"]), (used, -3), rtol=1e-5)
        np.testing.assert_allclose(slope["log_temperature"], used, rtol=1e-5)
        assert nsp.scale_of(kept, c, c.temperature).bias == -3
    assert nsp.within_range({}) == {}


def test_first_of_each():
    """Bug: a copy counted twice, an empty slot that hides a passage, the order of slots lost."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids, valid = rng.integers(0, 3, (12, 2)).astype(np.uint32), rng.random(12) < 0.7
        seen, expected = set(), []
        for pair, there in zip(map(tuple, ids), valid, strict=True):
            expected.append(bool(there) and pair not in seen)
            seen |= {pair} if there else set()
        assert contrast.first_of_each(jnp.asarray(ids), jnp.asarray(valid)).tolist() == expected


def test_anisotropy_is_the_mean_over_pairs():
    """Bug: a vector paired with itself, or an empty slot counted."""
    rng = np.random.default_rng(0)
    vectors, valid = rng.normal(size=(9, 4)) + 1.0, rng.random(9) < 0.7
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True))[valid]
    pairs = [a @ b for i, a in enumerate(unit) for j, b in enumerate(unit) if i != j]
    found = nsp.anisotropy(jnp.asarray(vectors), jnp.asarray(valid))
    np.testing.assert_allclose(found, np.mean(pairs), rtol=1e-5)
    assert nsp.anisotropy(jnp.asarray(vectors), jnp.zeros(9, bool)) == 0
