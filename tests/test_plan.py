"""The plan keeps every bound, loses nothing and repeats itself."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosup_jax.data import plan as planning
from cosup_jax.data.batch import BatchShape
from cosup_jax.data.packing import CtxRows
from cosup_jax.data.plan import Lengths, PlanSettings, build_epoch, utilization

SHAPE = BatchShape(B=4, T=64, R=4, S=2, U=3, L=40, P=3)


def lengths_from(examples, passages, identities=None):
    """`examples`: (tokens, evidence rows, hard-negative rows); `passages`: tokens."""
    ret_offsets = np.cumsum([0, *(len(evidence) for _, evidence, _ in examples)])
    negative_offsets = np.cumsum([0, *(len(negatives) for *_, negatives in examples)])
    identities = range(1, len(passages) + 1) if identities is None else identities
    return Lengths(
        examples=np.array([tokens for tokens, *_ in examples], np.int32),
        weights=np.ones(len(examples), np.float32),
        ret_offsets=ret_offsets,
        ret_passages=np.array([p for _, evidence, _ in examples for p in evidence], np.int32),
        negative_offsets=negative_offsets,
        negative_passages=np.array([p for *_, negs in examples for p in negs], np.int32),
        passages=np.array(passages),
        identities=np.array([(0, i) for i in identities], np.uint32).reshape(-1, 2),
    )


def random_lengths(seed, count=400, mean=16, corpus=60):
    rng = np.random.default_rng(seed)
    examples = [
        (
            int(np.clip(rng.gamma(4, mean / 4), 2, 64)),
            rng.integers(0, corpus, rng.choice([0, 1, 1, 1, 2])).tolist(),
            rng.integers(0, corpus, rng.choice([0, 0, 1])).tolist(),
        )
        for _ in range(count)
    ]
    return lengths_from(examples, rng.integers(3, 30, corpus), rng.integers(1, 50, corpus))


@st.composite
def any_lengths(draw):
    passages = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    row = st.integers(0, len(passages) - 1)
    examples = st.tuples(st.integers(1, 80), st.lists(row, max_size=5), st.lists(row, max_size=3))
    identities = draw(st.lists(st.integers(1, 8), min_size=len(passages), max_size=len(passages)))
    return lengths_from(draw(st.lists(examples, max_size=40)), passages, identities)


def check(plan, lengths, shape, packing=True):
    """Every bound of every step, and every passage where its example needs it."""
    identity = lengths.identities[:, 1].tolist()
    rets = np.diff(lengths.ret_offsets)
    for step in range(plan.steps):
        here = slice(*plan.example_offsets[step : step + 2])
        examples, rows = plan.examples[here], plan.gen_rows[here]
        assert len(examples) and (np.diff(rows) >= 0).all() and rows.max() < shape.B
        assert np.bincount(rows, lengths.examples[examples]).max() <= shape.T
        assert np.bincount(rows, rets[examples]).max() <= shape.R
        assert packing or np.bincount(rows).max() == 1
        here = slice(*plan.passage_offsets[step : step + 2])
        passages, ctx_rows = plan.passages[here], plan.ctx_rows[here]
        assert (np.diff(ctx_rows) >= 0).all()
        if len(passages):
            assert ctx_rows.max() < shape.U
            assert np.bincount(ctx_rows, lengths.passages[passages]).max() <= shape.L
            assert np.bincount(ctx_rows).max() <= shape.P
        placed = [identity[p] for p in passages]
        needed = {
            identity[p]
            for e in examples
            for offsets, flat in (
                (lengths.ret_offsets, lengths.ret_passages),
                (lengths.negative_offsets, lengths.negative_passages),
            )
            for p in flat[offsets[e] : offsets[e + 1]]
        }
        assert len(placed) == len(set(placed)) and set(placed) == needed


def everything_once(plan, lengths):
    placed = sorted([*plan.examples.tolist(), *plan.left_out.tolist()])
    assert placed == list(range(len(lengths.examples)))


@settings(max_examples=150, deadline=None)
@given(any_lengths(), st.integers(1, 6), st.integers(1, 3), st.booleans())
def test_any_lengths_are_planned_within_bounds(lengths, window, misses, packing):
    """An example lost or doubled, a bound exceeded, or a plan that never ends."""
    chosen = PlanSettings(packing=packing, window=window, misses=misses)
    plan = build_epoch(lengths, SHAPE, chosen, 0, 0)
    check(plan, lengths, SHAPE, packing)
    everything_once(plan, lengths)
    for example in plan.left_out:
        first = lengths.ret_offsets[example], lengths.ret_offsets[example + 1]
        evidence = lengths.ret_passages[slice(*first)]
        negatives = lengths.negative_passages[
            lengths.negative_offsets[example] : lengths.negative_offsets[example + 1]
        ]
        ids = {lengths.identities[p, 1] for p in evidence}
        fits_row = lengths.examples[example] <= 64 and len(evidence) <= 4 and len(ids) <= 2
        assert not fits_row or len({*evidence, *negatives}) > 1


def test_order_depends_on_seed_and_epoch_alone():
    """A shuffle that repeats each epoch, or differs between two hosts."""
    lengths = random_lengths(0)
    first = build_epoch(lengths, SHAPE, PlanSettings(), 1, 0)
    for again, same in (((1, 0), True), ((1, 1), False), ((2, 0), False)):
        other = build_epoch(lengths, SHAPE, PlanSettings(), *again)
        assert np.array_equal(first.examples, other.examples) == same
    shuffled = planning._draw(np.ones(8), np.ones(8, bool), 5, 3)
    assert shuffled.tolist() == [5, 2, 1, 7, 3, 0, 4, 6], "the shuffle of old checkpoints changed"


def test_mixed_lengths_fill_the_rows():
    """First-fit packing leaves a tenth of every matrix product to padding."""
    lengths = random_lengths(1, count=6000)
    shape = dataclasses.replace(SHAPE, B=16, U=64)
    plan = build_epoch(lengths, shape, PlanSettings(), 0, 0)
    assert utilization(plan, lengths, shape)["gen_tokens"] >= 0.95
    check(plan, lengths, shape)


def test_deferred_examples_come_next():
    """An awkward example pushed back again and again is seen only when the epoch ends."""
    big, small = (10, [0, 1], []), (10, [2], [])
    lengths = lengths_from([big] + [small] * 400, [40, 40, 30])
    shape = dataclasses.replace(SHAPE, U=2)
    plan = build_epoch(lengths, shape, PlanSettings(window=8, misses=4), 0, 0)
    at = plan.examples.tolist().index(0)
    step = int(np.searchsorted(plan.example_offsets, at, "right")) - 1
    before = planning._draw(lengths.weights, np.ones(401, bool), 0, 0).tolist().index(0)
    assert step * 16 <= before + 2 * 16
    everything_once(plan, lengths)


def test_equal_passages_are_encoded_once():
    """Two rows with the same tokens, encoded twice, would be each other's false negative."""
    lengths = lengths_from([(5, [0], []), (5, [1], [2])], [10, 10, 10], identities=[7, 7, 7])
    plan = build_epoch(lengths, SHAPE, PlanSettings(), 0, 0)
    assert plan.passages.tolist() == [0] and plan.steps == 1


@pytest.mark.parametrize(
    "example",
    [(65, [0], []), (9, [0] * 5, []), (9, [0, 1, 2], []), (9, [3, 4], [5, 6])],
    ids=["tokens", "rets", "positives", "ctx"],
)
def test_what_fits_no_row_is_left_out_and_named(example):
    """Each bound alone: the plan must neither loop on such an example nor break the bound."""
    passages = [5, 5, 5, 40, 40, 40, 40]
    plan = build_epoch(lengths_from([example, (9, [0], [])], passages), SHAPE, PlanSettings(), 0, 0)
    assert plan.left_out.tolist() == [0] and plan.examples.tolist() == [1]


def test_repeated_evidence_is_one_positive():
    """Counting slots instead of passages leaves out an example that cites one passage thrice."""
    plan = build_epoch(lengths_from([(9, [0, 0, 0], [])], [5]), SHAPE, PlanSettings(), 0, 0)
    assert not len(plan.left_out) and plan.passages.tolist() == [0]


def test_official_layout_pairs_slots_and_rows():
    """compat=official finds positives by position: slot (b, r) in Ctx row b * R + r."""
    shape = BatchShape(B=2, T=64, R=3, S=3, U=6, L=40, P=1)
    lengths = lengths_from(
        [(5, [0, 1], [2]), (6, [0], []), (7, [], []), (8, [1, 1, 2], [])], [9] * 3
    )
    plan = build_epoch(lengths, shape, PlanSettings(packing=False, aligned=True), 0, 0)
    assert plan.steps == 2 and sorted(plan.examples) == [0, 1, 2, 3]
    found = set(zip(plan.ctx_rows.tolist(), plan.passages.tolist(), strict=True))
    expected = set()
    for place, example in enumerate(plan.examples):
        evidence = lengths.ret_passages[slice(*lengths.ret_offsets[example : example + 2])]
        expected |= {(place % 2 * 3 + r, int(p)) for r, p in enumerate(evidence)}
    assert found == expected and len(plan.passages) == 6


def test_weights_draw_examples_again():
    """A mixture weight that is rounded away, or that drops the same examples each epoch."""
    lengths = random_lengths(2, count=1000)
    lengths = lengths._replace(weights=np.repeat([2.0, 0.25], 500).astype(np.float32))
    counts = []
    for epoch in range(2):
        plan = build_epoch(lengths, SHAPE, PlanSettings(), 0, epoch)
        counts.append(np.bincount(plan.examples, minlength=1000))
        kept = np.setdiff1d(np.arange(500), plan.left_out)
        assert (counts[-1][kept] == 2).all() and 85 <= counts[-1][500:].sum() <= 165
    assert not np.array_equal(counts[0][500:], counts[1][500:])


def test_ctx_rows_take_all_or_nothing():
    """A passage left behind by an example that was moved on takes a place from the next."""
    rows = CtxRows(dataclasses.replace(SHAPE, U=2), [40, 25, 20, 15, 20])
    assert rows.add([1]) and not rows.add([0, 2])
    assert rows.row_of == {1: 0}
    assert rows.add([3]) and rows.add([2, 4]) and rows.row_of == {1: 0, 3: 0, 2: 1, 4: 1}
    assert not rows.add([0])
