"""Blocks keep every bound, lose nothing and repeat themselves."""

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lengths import FIVE_BLOCKS, assert_equal, lengths_from, random_lengths

from cosup_jax.data import blocks as planning
from cosup_jax.data.batch import BatchShape
from cosup_jax.data.blocks import Builder, PlanSettings, count_blocks, utilization
from cosup_jax.data.buckets import row_lengths
from cosup_jax.data.packing import CtxRows

SHAPE = BatchShape(B=4, T=64, R=4, S=2, U=3, L=40, P=3)


def build_epoch(lengths, shape, settings, seed, epoch):
    """An epoch that is one block, and what it leaves out."""
    builder = Builder(lengths, shape, settings, seed)
    assert builder.blocks == 1
    block = builder.block(epoch, 0)
    return SimpleNamespace(**block._asdict(), steps=block.steps, left_out=builder.left_out)


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


@settings(max_examples=100, deadline=None)
@given(any_lengths(), st.booleans(), st.booleans(), st.integers(1, 4), st.integers(0, 2))
def test_groups_lose_nothing(lengths, packing, pure, buckets, epoch):
    """Examples lost, doubled or misplaced where groups are packed apart and their steps mixed; a
    row that is shorter than what lies in it."""
    chosen = PlanSettings(packing=packing, pure=pure, buckets=1 if packing else buckets)
    plan = build_epoch(lengths, SHAPE, chosen, 0, epoch)
    check(plan, lengths, SHAPE, packing)
    everything_once(plan, lengths)
    lines = zip(
        plan.row_tokens.tolist(),
        itertools.pairwise(plan.example_offsets),
        itertools.pairwise(plan.passage_offsets),
        strict=True,
    )
    for (gen, ctx), examples, passages in lines:
        examples, passages = plan.examples[slice(*examples)], plan.passages[slice(*passages)]
        assert not pure or len(set(lengths.sources[examples])) == 1
        if packing:
            assert (gen, ctx) == (64, 40)
        else:
            assert lengths.examples[examples].max() <= gen
            assert lengths.passages[passages].max(initial=0) <= ctx
    if not packing:
        assert len(set(plan.row_tokens[:, 0])) <= buckets


def test_steps_of_groups_are_mixed():
    """All long rows first, or one source after the other: an epoch that forgets its beginning."""
    lengths = random_lengths(0)
    plan = build_epoch(lengths, SHAPE, PlanSettings(pure=True), 0, 0)
    source = lengths.sources[plan.examples[plan.example_offsets[:-1]]]
    assert np.mean(source[1:] != source[:-1]) > 0.4
    again = build_epoch(lengths, SHAPE, PlanSettings(pure=True), 0, 0)
    other = build_epoch(lengths, SHAPE, PlanSettings(pure=True), 0, 1)
    assert np.array_equal(plan.examples, again.examples)
    assert not np.array_equal(plan.examples, other.examples)


def test_steps_of_groups_are_mixed_anew_each_epoch():
    """Bug: sources or row lengths that follow each other in the same order in every epoch."""
    chosen = PlanSettings(packing=False, pure=True)  # as many steps of each source every epoch
    plans = [build_epoch(random_lengths(0), SHAPE, chosen, 0, epoch) for epoch in range(2)]
    order = [random_lengths(0).sources[p.examples[p.example_offsets[:-1]]] for p in plans]
    assert len(order[0]) == len(order[1]) and not np.array_equal(*order)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 90), max_size=20), st.integers(1, 4))
def test_row_lengths_waste_least(lengths, count):
    """A cut that leaves more padding than another would, or drops the longest row."""
    found = row_lengths(np.array(lengths, int), 90, count)
    edges = [*range(16, 90, 16), 90]
    cost = lambda rows: sum(min(row for row in rows if row >= n) for n in lengths)
    every = [(*some, 90) for n in range(count) for some in itertools.combinations(edges[:-1], n)]
    assert found[-1] == 90 and len(found) <= count
    assert cost(found.tolist()) == min(map(cost, every))


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
    [(65, [0], []), (9, [0] * 5, []), (9, [0, 1, 2], []), (9, [3, 4], [5, 6]), (9, [], [7])],
    ids=["tokens", "rets", "positives", "ctx", "passage"],
)
def test_what_fits_no_row_is_left_out_and_named(example):
    """Each bound alone: the plan must neither loop on such an example nor break the bound."""
    passages = [5, 5, 5, 40, 40, 40, 40, 41]
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


def test_a_place_that_is_given_back_can_be_used():
    """Bug: what did not fit keeps its passage slots, and rows fill up with nothing."""
    rows = CtxRows(dataclasses.replace(SHAPE, U=1, P=2), [5, 40, 5])
    assert not rows.add([0, 1]) and rows.add([0, 2])


def test_the_order_of_passages_leaves_nothing_out():
    """Bug: passages of 4, 4, 6 and 6 tokens fit two rows of 10, and are left out if they come in
    the wrong order."""
    shape = dataclasses.replace(SHAPE, U=2, L=10, P=4)
    for tokens in itertools.permutations([4, 4, 6, 6]):
        lengths = lengths_from([(5, [0], [1, 2, 3]), (5, [1], [])], list(tokens))
        plan = build_epoch(lengths, shape, PlanSettings(), 0, 0)
        assert not len(plan.left_out) and sorted(plan.examples) == [0, 1]
        check(plan, lengths, shape)


@settings(max_examples=60, deadline=None)
@given(any_lengths(), st.integers(1, 9), st.booleans(), st.integers(0, 2))
def test_blocks_together_hold_everything_once(lengths, least, aligned, epoch):
    """A cut that loses or doubles an example at the edge of a block, or breaks a bound there."""
    shape = dataclasses.replace(SHAPE, U=16, P=1) if aligned else SHAPE
    chosen = PlanSettings(not aligned, aligned, block_examples=least, block_steps=0.1)
    builder = Builder(lengths, shape, chosen, 0)
    built = [builder.block(epoch, block) for block in range(builder.blocks)]
    for block in built:
        if not aligned:
            check(block, lengths, shape)
    placed = np.concatenate([block.examples for block in built])
    everything_once(SimpleNamespace(examples=placed, left_out=builder.left_out), lengths)


def test_nothing_crosses_a_block():
    """State carried from block to block: a host that resumes inside plans other steps."""
    lengths, chosen = random_lengths(3), dataclasses.replace(FIVE_BLOCKS, window=16)
    in_turn = Builder(lengths, SHAPE, chosen, 0)
    assert in_turn.blocks == 5
    for epoch, block in itertools.product(range(2), range(5)):
        alone = Builder(lengths, SHAPE, chosen, 0).block(epoch, block)
        assert_equal(in_turn.block(epoch, block), alone)


def test_block_size_follows_the_data():
    """Blocks so short that their last steps, partly filled, waste batches; small data cut up."""
    lengths = random_lengths(0)._replace(weights=np.array([1.0], np.float32))
    shape = dataclasses.replace(SHAPE, B=8, T=1024)

    def count(examples, tokens, weight=1.0, **changes):
        weights = np.full(examples, weight, np.float32)
        data = lengths._replace(examples=np.full(examples, tokens, np.int32), weights=weights)
        return count_blocks(data, shape, PlanSettings(**changes))

    assert count(11_008, 100) == count(131_071, 1024) == 1
    assert count(131_072, 1024) == 2  # 65,536 examples each, far more than 256 steps
    assert count(700_000, 8) == 2  # 1,024 examples a step: 256 steps are 262,144
    assert count(700_000, 8, packing=False) == 10
    assert count(131_072, 1024, weight=0.5) == 1 and count(65_536, 1024, weight=2.0) == 2


def test_what_surely_fits_is_not_tried(monkeypatch):
    """Minutes before step 1 while Python places each of many million examples by itself."""
    monkeypatch.setattr(planning, "CtxRows", None)
    assert not len(Builder(random_lengths(0), SHAPE, PlanSettings(), 0).left_out)
