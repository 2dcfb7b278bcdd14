"""The plan: which example goes into which Gen row of which step, and which passage where.

It follows from token lengths, seed and epoch alone, so every host computes the same one. It moves
an example to a later row to keep the static bounds of a step; it never drops one that fits a row.
"""

import bisect
import collections
import dataclasses
import hashlib
import io
import itertools
import os
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cosup_jax.config import Config
from cosup_jax.data.batch import BatchShape, batch_shape
from cosup_jax.data.packing import CtxRows, Queue
from cosup_jax.data.tokens import TokenStore
from cosup_jax.errors import UserError

VERSION = 1  # raise it whenever the same lengths give another plan


class Lengths(NamedTuple):
    """All that a plan depends on; ragged arrays as in tokens.py."""

    examples: np.ndarray  # int [N], Gen tokens of each example
    weights: np.ndarray  # float [N], how often an epoch draws it
    ret_offsets: np.ndarray  # int [N + 1]
    ret_passages: np.ndarray  # int [rets], passage row of each [Ret]
    negative_offsets: np.ndarray  # int [N + 1]
    negative_passages: np.ndarray  # int, passage rows of the hard negatives
    passages: np.ndarray  # int [M], Ctx tokens of each passage
    identities: np.ndarray  # uint32 [M, 2]


@dataclasses.dataclass(frozen=True)
class PlanSettings:
    """How rows are filled."""

    packing: bool = True  # False: one example a Gen row
    aligned: bool = False  # compat=official: slot (b, r) has its passage in Ctx row b * R + r
    window: int = 512  # pending examples among which the best fit is searched
    misses: int = 64  # examples that find no room in the Ctx rows before the step is closed


class EpochPlan(NamedTuple):
    """Steps of one epoch, int32, rows ascending and items in order of placement within a row."""

    example_offsets: np.ndarray  # [steps + 1], into the next two
    examples: np.ndarray  # example row in the store
    gen_rows: np.ndarray  # 0 .. B - 1
    passage_offsets: np.ndarray  # [steps + 1], into the next two
    passages: np.ndarray  # passage row in the store
    ctx_rows: np.ndarray  # 0 .. U - 1
    left_out: np.ndarray  # examples that fit no row even alone

    @property
    def steps(self) -> int:
        return len(self.example_offsets) - 1


def build_epoch(
    lengths: Lengths, shape: BatchShape, settings: PlanSettings, seed: int, epoch: int
) -> EpochPlan:
    """The plan of one epoch, a pure function of its arguments.

    Every example that fits a row is placed floor(weight) times, and once more with the
    probability that remains. Passages of equal identity share one place in a step.
    """
    needs = _distinct_passages(lengths)
    left_out = _left_out(lengths, needs, shape, settings)
    fits = np.ones(len(lengths.examples), bool)
    fits[left_out] = False
    order = _draw(lengths.weights, fits, seed, epoch)
    if settings.aligned:
        return _align(order, lengths, shape, left_out)
    return _pack(order, lengths, needs, shape, settings, left_out)


def build_in_order(lengths: Lengths, shape: BatchShape, settings: PlanSettings) -> EpochPlan:
    """Gen rows alone, every example that fits once and about in its own order: for scoring."""
    too_big = _exceeds_row(lengths, shape)
    needs = [[]] * len(lengths.examples)
    left_out = np.flatnonzero(too_big).astype(np.int32)
    return _pack(np.flatnonzero(~too_big), lengths, needs, shape, settings, left_out)


def lengths_of(store: TokenStore) -> Lengths:
    """What the plan reads of a store."""
    return Lengths(
        np.diff(store.gen_offsets),
        *(store.weights, store.ret_offsets, store.ret_passages),
        *(store.negative_offsets, store.negative_passages),
        np.diff(store.ctx_offsets),
        store.identities,
    )


def settings_of(config: Config) -> PlanSettings:
    """What the config says about packing."""
    return PlanSettings(packing=config.data.packing, aligned=config.compat == "official")


class Plan:
    """The epochs of a run, built when first asked for and cached beside the tokens."""

    def __init__(self, store: TokenStore, config: Config):
        self.store, self.config = store, config
        self.shape, self.settings = batch_shape(config), settings_of(config)
        decides = (VERSION, store.fingerprint, config.seed, self.shape, self.settings)
        self.fingerprint = hashlib.sha256(repr(decides).encode()).hexdigest()
        self._ends: list[int] = []  # steps up to and including each epoch
        self._recent: collections.OrderedDict[int, EpochPlan] = collections.OrderedDict()
        self._lock = threading.RLock()  # reader threads share one plan

    def __reduce__(self):
        return Plan, (self.store, self.config)

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, index within it) of a step of the run."""
        with self._lock:
            while not self._ends or self._ends[-1] <= step:
                before = self._ends[-1] if self._ends else 0
                self._ends.append(before + self.epoch(len(self._ends)).steps)
        epoch = bisect.bisect_right(self._ends, step)
        return epoch, step - (self._ends[epoch - 1] if epoch else 0)

    def steps_per_epoch(self, epoch: int) -> int:
        return self.epoch(epoch).steps

    def total_steps(self, num_epochs: int) -> int:
        """Steps of the first `num_epochs` epochs."""
        return sum(self.steps_per_epoch(epoch) for epoch in range(num_epochs))

    def epoch(self, epoch: int) -> EpochPlan:
        """The plan of an epoch. Raises UserError if no example fits a row."""
        with self._lock:
            if epoch not in self._recent:
                self._recent[epoch] = self._load(epoch)
                while len(self._recent) > 2:
                    self._recent.popitem(last=False)
            return self._recent[epoch]

    def _load(self, epoch: int) -> EpochPlan:
        path = self.store.directory / f"plan-{self.fingerprint[:16]}-{epoch}.npz"
        if path.is_file():
            with np.load(path) as saved:
                return EpochPlan(**saved)
        lengths = lengths_of(self.store)
        plan = build_epoch(lengths, self.shape, self.settings, self.config.seed, epoch)
        if not plan.steps:
            raise UserError(
                f"none of {len(lengths.examples)} training examples fits a row (longest: "
                f"{lengths.examples.max()} tokens); raise config.data.max_gen_tokens, ret_slots, "
                "max_positives or ctx_rows"
            )
        _write(path, plan)
        return plan


def utilization(plan: EpochPlan, lengths: Lengths, shape: BatchShape) -> dict[str, float]:
    """Mean share of Gen tokens, [Ret] slots, Ctx tokens and passage slots that carry data."""
    steps = max(plan.steps, 1)
    rets = np.diff(lengths.ret_offsets)[plan.examples]
    return {
        "gen_tokens": float(lengths.examples[plan.examples].sum() / (steps * shape.B * shape.T)),
        "ret_slots": float(rets.sum() / (steps * shape.B * shape.R)),
        "ctx_tokens": float(lengths.passages[plan.passages].sum() / (steps * shape.U * shape.L)),
        "passage_slots": len(plan.passages) / (steps * shape.U * shape.P),
    }


def _draw(weights: np.ndarray, fits: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The examples of an epoch in shuffled order. Raw Philox bits do not change with NumPy."""
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64))
    weights = np.asarray(weights, np.float64)
    copies = np.floor(weights).astype(np.int64)
    copies += bits.random_raw(len(weights)) / 2.0**64 < weights - copies
    drawn = np.repeat(np.arange(len(weights)), copies * fits)
    return drawn[np.argsort(bits.random_raw(len(drawn)), kind="stable")]


def _distinct_passages(lengths: Lengths) -> list[list[int]]:
    """Per example the passage rows it brings, evidence first, each identity once.

    A passage stands for all of its identity: the first row that has it.
    """
    first = canonical(lengths.identities)
    count = len(lengths.examples)
    found = []
    for offsets, passages in (
        (lengths.ret_offsets, lengths.ret_passages),
        (lengths.negative_offsets, lengths.negative_passages),
    ):
        found.append((np.repeat(np.arange(count), np.diff(offsets)), first[passages]))
    example, passage = (np.concatenate(part) for part in zip(*found, strict=True))
    _, kept = np.unique(example * max(len(first), 1) + passage, return_index=True)
    kept = kept[np.lexsort((kept, example[kept]))]
    flat = passage[kept].tolist()
    bounds = np.searchsorted(example[kept], np.arange(count + 1)).tolist()
    return [flat[a:b] for a, b in itertools.pairwise(bounds)]


def canonical(identities: np.ndarray) -> np.ndarray:
    """int64 [M]: for each passage row the first row of the same identity."""
    keys = identities[:, 0].astype(np.uint64) << np.uint64(32) | identities[:, 1]
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse]


def _left_out(
    lengths: Lengths, needs: list[list[int]], shape: BatchShape, settings: PlanSettings
) -> np.ndarray:
    """Examples that fit no row even if they have the whole step for themselves."""
    too_big = _exceeds_row(lengths, shape)
    if not settings.aligned:
        tokens = lengths.passages.tolist()
        for example, passages in enumerate(needs):
            if len(passages) > shape.P or sum(map(tokens.__getitem__, passages)) > shape.L:
                too_big[example] |= not CtxRows(shape, tokens).add(passages)
    return np.flatnonzero(too_big).astype(np.int32)


def _exceeds_row(lengths: Lengths, shape: BatchShape) -> np.ndarray:
    """bool [N]: more than T tokens, R [Ret] or S distinct positives."""
    rets = np.diff(lengths.ret_offsets)
    stride = max(len(lengths.passages), 1)
    owner = np.repeat(np.arange(len(rets)), rets)
    pairs = np.unique(owner * stride + canonical(lengths.identities)[lengths.ret_passages])
    positives = np.bincount(pairs // stride, minlength=len(rets))
    return (lengths.examples > shape.T) | (rets > shape.R) | (positives > shape.S)


def _pack(
    order: np.ndarray,
    lengths: Lengths,
    needs: list[list[int]],
    shape: BatchShape,
    settings: PlanSettings,
    left_out: np.ndarray,
) -> EpochPlan:
    rets = np.diff(lengths.ret_offsets)[order].tolist()
    queue = Queue(lengths.examples[order].tolist(), rets, settings.window)
    examples, passage_tokens = order.tolist(), lengths.passages.tolist()
    placed, gen_rows, example_offsets = [], [], [0]
    passages, ctx_rows, passage_offsets = [], [], [0]
    while queue:
        ctx, misses = CtxRows(shape, passage_tokens), []
        for row in range(shape.B):
            gap, slots = shape.T, shape.R
            while len(misses) < settings.misses and (item := queue.take(gap, slots)) >= 0:
                if not ctx.add(needs[examples[item]]):
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
    columns = (
        example_offsets,
        order[np.array(placed, np.int64)],
        gen_rows,
        passage_offsets,
        passages,
        ctx_rows,
    )
    return EpochPlan(*(np.array(column, np.int32) for column in columns), left_out)


def _align(
    order: np.ndarray, lengths: Lengths, shape: BatchShape, left_out: np.ndarray
) -> EpochPlan:
    """Official layout: one example a row, nothing shared, hard negatives unused."""
    rets = np.diff(lengths.ret_offsets)[order]
    ends = np.cumsum(rets)
    item = np.repeat(np.arange(len(order)), rets)
    slot = np.arange(len(item)) - (ends - rets)[item]
    rows = np.arange(len(order)) % shape.B
    steps = -(-len(order) // shape.B)
    example_offsets = np.minimum(np.arange(steps + 1) * shape.B, len(order))
    columns = (
        *(example_offsets, order, rows),
        np.concatenate([[0], ends])[example_offsets],
        lengths.ret_passages[lengths.ret_offsets[order][item] + slot],
        rows[item] * shape.R + slot,
    )
    return EpochPlan(*(np.asarray(column, np.int32) for column in columns), left_out)


def _write(path: Path, plan: EpochPlan) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **plan._asdict())
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with open(handle, "wb") as file:
        file.write(buffer.getvalue())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
