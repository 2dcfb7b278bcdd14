"""Which example goes into which Gen row of which step, and which passage where.

It follows from token lengths, seed and epoch alone, so every host computes the same. An example is
moved to a later row to keep the static bounds of a step; it is left out where it is longer than a
row, or its passages find no room in empty Ctx rows, neither in their order nor the longest first.
The shuffled order of an epoch is cut into blocks, and each is packed by itself: any one can be
built without the others.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cosup_jax.data.batch import BatchShape
from cosup_jax.data.buckets import row_lengths
from cosup_jax.data.packing import CtxRows, Queue
from cosup_jax.data.tokens import as_keys


class Lengths(NamedTuple):
    """All that blocks depend on; ragged arrays as in tokens.py."""

    examples: np.ndarray  # int [N], Gen tokens of each example
    weights: np.ndarray  # float [N], how often an epoch draws it
    ret_offsets: np.ndarray  # int [N + 1]
    ret_passages: np.ndarray  # int [rets], passage row of each [Ret]
    negative_offsets: np.ndarray  # int [N + 1]
    negative_passages: np.ndarray  # int, passage rows of the hard negatives
    passages: np.ndarray  # int [M], Ctx tokens of each passage
    identities: np.ndarray  # uint32 [M, 2]
    sources: np.ndarray  # int [N], which source an example comes from


@dataclasses.dataclass(frozen=True)
class PlanSettings:
    """How rows are filled, and how finely an epoch is cut."""

    packing: bool = True  # False: one example a Gen row
    aligned: bool = False  # compat=official: slot (b, r) has its passage in Ctx row b * R + r
    pure: bool = False  # a step's examples all come from one source
    buckets: int = 1  # row lengths, of Gen and of Ctx, that a step may have; 1 with packing
    window: int = 512  # pending examples among which the best fit is searched
    misses: int = 64  # examples that find no room in the Ctx rows before the step is closed
    # What a block holds at least. Not in the repr that fingerprints read: the cut itself is.
    block_examples: int = dataclasses.field(default=65_536, repr=False)
    block_steps: int = dataclasses.field(default=256, repr=False)


class Block(NamedTuple):
    """Consecutive steps, int32, rows ascending and items in order of placement within a row."""

    example_offsets: np.ndarray  # [steps + 1], into the next two
    examples: np.ndarray  # example row in the store
    gen_rows: np.ndarray  # 0 .. B - 1
    passage_offsets: np.ndarray  # [steps + 1], into the next two
    passages: np.ndarray  # passage row in the store
    ctx_rows: np.ndarray  # 0 .. U - 1
    row_tokens: np.ndarray  # [steps, 2]: tokens of a Gen row and of a Ctx row, T and L at most

    @property
    def steps(self) -> int:
        return len(self.example_offsets) - 1


class Builder:
    """Builds any block, a pure function of the arguments; keeps what blocks have in common.

    Every example that fits a row is placed floor(weight) times an epoch, and once more with the
    probability that remains. Passages of equal identity share one place in a step.
    """

    def __init__(self, lengths: Lengths, shape: BatchShape, settings: PlanSettings, seed: int):
        self.lengths, self.shape, self.settings = lengths, shape, settings
        self._seed = seed
        self.blocks = count_blocks(lengths, shape, settings)
        self._order = functools.lru_cache(1)(
            lambda epoch: _draw(lengths.weights, self._fits, seed, epoch)
        )

    def block(self, epoch: int, block: int) -> Block:
        """Block 0 .. blocks - 1 of an epoch; without a step if it draws no example."""
        order = self._order(epoch)
        first, end = (len(order) * edge // self.blocks for edge in (block, block + 1))
        examples = order[first:end]
        if self.settings.aligned:
            return _align(examples, self.lengths, self.shape)
        groups = self._groups(examples)
        pack = lambda group: _pack(
            group,
            self._needs(group),
            self.lengths,
            self.shape,
            self.settings,
            self._gen_lengths,
            self._ctx_lengths,
        )
        if len(groups) == 1:
            return pack(*groups)
        # Each group by itself, so that their steps are alike inside; then all steps in turn.
        return _shuffled(list(map(pack, groups)), self._seed, epoch * self.blocks + block)

    @functools.cached_property
    def left_out(self) -> np.ndarray:
        """int32, ascending: examples that fit no row even if they have a step for themselves."""
        too_big = _exceeds_row(self.lengths, self.shape)
        if not self.settings.aligned:
            unsure = np.flatnonzero(~too_big & ~_surely_fits(self.lengths, self.shape))
            if len(unsure):
                needs = self._needs(unsure)
                too_big[unsure] = [not CtxRows(self.shape, needs.tokens).add(n) for n in needs.of]
        return np.flatnonzero(too_big).astype(np.int32)

    def _groups(self, examples: np.ndarray) -> list[np.ndarray]:
        """Examples that may share a step, in their order."""
        key = np.searchsorted(self._gen_lengths, self.lengths.examples[examples])
        if self.settings.pure:
            key += self.lengths.sources[examples] * len(self._gen_lengths)
        return [examples[key == group] for group in np.unique(key)] or [examples]

    @functools.cached_property
    def _gen_lengths(self) -> np.ndarray:
        lengths = self.lengths.examples[self._fits]
        return row_lengths(lengths, self.shape.T, self.settings.buckets)

    @functools.cached_property
    def _ctx_lengths(self) -> np.ndarray:
        lengths = self.lengths.passages[self.lengths.passages <= self.shape.L]
        return row_lengths(lengths, self.shape.L, self.settings.buckets)

    @functools.cached_property
    def _fits(self) -> np.ndarray:
        fits = np.ones(len(self.lengths.examples), bool)
        fits[self.left_out] = False
        return fits

    @functools.cached_property
    def _canonical(self) -> np.ndarray:
        return canonical(self.lengths.identities).astype(np.int32)

    def _needs(self, examples: np.ndarray) -> "_Needs":
        """A passage stands for all of its identity: the first row that has it."""
        lengths = self.lengths
        rets, ret = _ragged(lengths.ret_offsets, examples)
        negatives, negative = _ragged(lengths.negative_offsets, examples)
        owner = np.concatenate([rets, negatives])
        passage = [lengths.ret_passages[ret], lengths.negative_passages[negative]]
        passage = self._canonical[np.concatenate(passage)]
        _, kept = np.unique(owner * max(len(self._canonical), 1) + passage, return_index=True)
        kept = kept[np.lexsort((kept, owner[kept]))]
        rows, numbers = np.unique(passage[kept], return_inverse=True)
        bounds = np.searchsorted(owner[kept], np.arange(len(examples) + 1)).tolist()
        flat = numbers.tolist()
        of = [flat[first:end] for first, end in itertools.pairwise(bounds)]
        return _Needs(of, rows, lengths.passages[rows].tolist())


class _Needs(NamedTuple):
    """Passages that some examples bring, numbered 0, 1, ... among themselves."""

    of: list[list[int]]  # numbers for each of the examples, evidence first, each identity once
    rows: np.ndarray  # passage row in the store of each number
    tokens: list[int]  # Ctx tokens of each number


def count_blocks(lengths: Lengths, shape: BatchShape, settings: PlanSettings) -> int:
    """Blocks of an epoch, the same for all: as many as hold what the settings ask for."""
    weights = np.rint(np.asarray(lengths.weights, np.float64) * 2**16).astype(np.int64)
    drawn = int(weights.sum()) / 2**16  # fixed point: float sums may differ between hosts
    rows = int(weights @ lengths.examples) / 2**16 / shape.T if settings.packing else drawn
    steps = rows / shape.B
    return max(1, int(min(drawn / settings.block_examples, steps / settings.block_steps)))


def build_in_order(
    lengths: Lengths, shape: BatchShape, settings: PlanSettings
) -> tuple[Block, np.ndarray]:
    """Gen rows alone, every example that fits once and about in its own order: for scoring.

    Also int32: the examples that fit no Gen row.
    """
    too_big = _exceeds_row(lengths, shape)
    examples = np.flatnonzero(~too_big)
    whole = np.array([shape.T]), np.array([shape.L])
    none = _Needs([[]] * len(examples), np.zeros(0, np.int64), [])
    block = _pack(examples, none, lengths, shape, settings, *whole)
    return block, np.flatnonzero(too_big).astype(np.int32)


def utilization(block: Block, lengths: Lengths, shape: BatchShape) -> dict[str, float]:
    """Mean share of Gen tokens, [Ret] slots, Ctx tokens and passage slots that carry data."""
    gen, ctx = np.maximum(block.row_tokens.sum(axis=0), 1)
    steps = max(block.steps, 1)
    rets = np.diff(lengths.ret_offsets)[block.examples]
    return {
        "gen_tokens": float(lengths.examples[block.examples].sum() / (gen * shape.B)),
        "ret_slots": float(rets.sum() / (steps * shape.B * shape.R)),
        "ctx_tokens": float(lengths.passages[block.passages].sum() / (ctx * shape.U)),
        "passage_slots": len(block.passages) / (steps * shape.U * shape.P),
    }


def canonical(identities: np.ndarray) -> np.ndarray:
    """int64 [M]: for each passage row the first row of the same identity."""
    _, first, inverse = np.unique(as_keys(identities), return_index=True, return_inverse=True)
    return first[inverse]


def _draw(weights: np.ndarray, fits: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The examples of an epoch in shuffled order. Raw Philox bits do not change with NumPy."""
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64))
    weights = np.asarray(weights, np.float64)
    copies = np.floor(weights).astype(np.int64)
    copies += bits.random_raw(len(weights)) / 2.0**64 < weights - copies
    drawn = np.repeat(np.arange(len(weights), dtype=np.int32), copies * fits)
    return drawn[np.argsort(bits.random_raw(len(drawn)), kind="stable")]


def _exceeds_row(lengths: Lengths, shape: BatchShape) -> np.ndarray:
    """bool [N]: more than T tokens, R [Ret] or S distinct positives."""
    rets = np.diff(lengths.ret_offsets)
    too_big = (lengths.examples > shape.T) | (rets > shape.R)
    several = np.flatnonzero(rets > shape.S)
    owner, index = _ragged(lengths.ret_offsets, several)
    positive = canonical(lengths.identities[lengths.ret_passages[index]])
    pairs = np.unique(owner * max(len(owner), 1) + positive)
    distinct = np.bincount(pairs // max(len(owner), 1), minlength=len(several))
    too_big[several] |= distinct > shape.S
    return too_big


def _surely_fits(lengths: Lengths, shape: BatchShape) -> np.ndarray:
    """bool [N]: every passage could have a Ctx row of its own."""
    sure = np.diff(lengths.ret_offsets) + np.diff(lengths.negative_offsets) <= shape.U
    too_long = lengths.passages > shape.L
    for offsets, passages in (
        (lengths.ret_offsets, lengths.ret_passages),
        (lengths.negative_offsets, lengths.negative_passages),
    ):
        sure[np.searchsorted(offsets, np.flatnonzero(too_long[passages]), "right") - 1] = False
    return sure


def _ragged(offsets: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the items' values one after the other: which of the items, and where in the flat array."""
    starts = offsets[items]
    counts = offsets[items + 1] - starts
    owner = np.repeat(np.arange(len(items)), counts)
    return owner, np.arange(len(owner)) + (starts - np.cumsum(counts) + counts)[owner]


def _pack(
    order: np.ndarray,
    needs: _Needs,
    lengths: Lengths,
    shape: BatchShape,
    settings: PlanSettings,
    gen_lengths: np.ndarray,
    ctx_lengths: np.ndarray,
) -> Block:
    rets = (lengths.ret_offsets[order + 1] - lengths.ret_offsets[order]).tolist()
    queue = Queue(lengths.examples[order].tolist(), rets, settings.window)
    placed, gen_rows, example_offsets = [], [], [0]
    passages, ctx_rows, passage_offsets = [], [], [0]
    while queue:
        ctx, misses = CtxRows(shape, needs.tokens), []
        for row in range(shape.B):
            gap, slots = shape.T, shape.R
            while len(misses) < settings.misses and (item := queue.take(gap, slots)) >= 0:
                if not ctx.add(needs.of[item]):
                    misses.append(item)
                    continue
                placed.append(item)
                gen_rows.append(row)
                gap -= queue.tokens[item]
                slots -= queue.rets[item]
                if not settings.packing:
                    break
        queue.put_back(misses)
        example_offsets.append(len(placed))
        by_row = sorted(ctx.row_of.items(), key=lambda pair: pair[1])
        passages += [passage for passage, _ in by_row]
        ctx_rows += [row for _, row in by_row]
        passage_offsets.append(len(passages))
    examples, rows = order[np.array(placed, np.int64)], needs.rows[np.array(passages, np.int64)]
    row_tokens = np.stack(
        [
            _shortest(gen_lengths, lengths.examples[examples], example_offsets),
            _shortest(ctx_lengths, lengths.passages[rows], passage_offsets),
        ],
        axis=1,
    )
    columns = (example_offsets, examples, gen_rows, passage_offsets, rows, ctx_rows, row_tokens)
    return Block(*(np.array(column, np.int32) for column in columns))


def _shortest(row_lengths: np.ndarray, tokens: np.ndarray, offsets: list[int]) -> np.ndarray:
    """The row length of each step that holds its longest item."""
    longest = [max(tokens[a:b], default=0) for a, b in itertools.pairwise(offsets)]
    # A packed row holds several items, and then there is one length.
    return row_lengths[np.minimum(np.searchsorted(row_lengths, longest), len(row_lengths) - 1)]


def _shuffled(blocks: Sequence[Block], seed: int, number: int) -> Block:
    """The steps of all blocks, in an order that seed and number decide."""
    offsets = lambda name: np.cumsum([0, *(n for b in blocks for n in np.diff(getattr(b, name)))])
    items = lambda name: np.concatenate([getattr(block, name) for block in blocks])
    examples, passages = offsets("example_offsets"), offsets("passage_offsets")
    # A stream apart from `_draw`'s, whose key may be the same.
    bits = np.random.Philox(key=np.array([seed, number], np.uint64), counter=2**192)
    order = np.argsort(bits.random_raw(len(examples) - 1), kind="stable")
    _, example = _ragged(examples, order)
    _, passage = _ragged(passages, order)
    columns = (
        *(np.cumsum([0, *np.diff(examples)[order]]), items("examples")[example]),
        *(items("gen_rows")[example], np.cumsum([0, *np.diff(passages)[order]])),
        *(items("passages")[passage], items("ctx_rows")[passage], items("row_tokens")[order]),
    )
    return Block(*(column.astype(np.int32) for column in columns))


def _align(order: np.ndarray, lengths: Lengths, shape: BatchShape) -> Block:
    """Official layout: one example a row, nothing shared, hard negatives unused."""
    item, index = _ragged(lengths.ret_offsets, order)
    slot = index - lengths.ret_offsets[order][item]
    rows = np.arange(len(order)) % shape.B
    steps = -(-len(order) // shape.B)
    example_offsets = np.minimum(np.arange(steps + 1) * shape.B, len(order))
    columns = (
        *(example_offsets, order, rows),
        np.searchsorted(item, example_offsets),
        lengths.ret_passages[index],
        rows[item] * shape.R + slot,
        np.tile([shape.T, shape.L], (steps, 1)),
    )
    return Block(*(np.asarray(column, np.int32) for column in columns))
