"""From plan and tokens to batches: any step's rows at once, read ahead by Grain, put on devices."""

import collections
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import grain
import jax
import numpy as np
from absl import flags

from cosup_jax.config import Config
from cosup_jax.data.batch import Batch, BatchShape, empty_batch
from cosup_jax.data.blocks import Block, PlanSettings, build_in_order
from cosup_jax.data.markup import EVIDENCE, TARGET
from cosup_jax.data.packing import Queue
from cosup_jax.data.plan import Plan, lengths_of
from cosup_jax.data.tokens import TokenStore

READ_THREADS = 4
_WINDOW = 1024  # passages of a corpus that a row chooses from


class PackedPassages(NamedTuple):
    """Ctx rows that hold passages of a corpus; the layout of a training batch."""

    ctx_tokens_UxL: np.ndarray  # int32
    ctx_segments_UxL: np.ndarray  # int32
    ctx_positions_UxL: np.ndarray  # int32
    passage_ends_UxP: np.ndarray  # int32
    passage_valid_UxP: np.ndarray  # bool
    index_UxP: np.ndarray  # int64, which passage; 0 where not valid


class PackedExamples(NamedTuple):
    """Gen rows that hold examples; the Ctx side of `batch` is empty."""

    batch: Batch
    index_BxR: np.ndarray  # int64, row of the [Ret] in store.ret_passages; 0 where not valid


def host_batch(
    store: TokenStore,
    plan: Plan,
    shape: BatchShape,
    step: int,
    gen_rows: slice,
    ctx_rows: slice,
    mask_evidence: bool,
) -> Batch:
    """Rows `gen_rows` of B and `ctx_rows` of U of a step, in NumPy, and nothing beyond them."""
    number, index = plan.locate(step)
    return _build(store, plan.block(number), shape, index, gen_rows, ctx_rows, mask_evidence)


def batches(
    store: TokenStore,
    plan: Plan,
    config: Config,
    sharding_gen: jax.sharding.NamedSharding,
    sharding_ctx: jax.sharding.NamedSharding,
    start_step: int,
    num_steps: int,
) -> Iterator[Batch]:
    """Global arrays of the steps start_step .. num_steps - 1, one batch ahead on the device.

    Each process reads the rows that its own devices hold; the shardings split axis 0. The start
    reads how many steps the plan's earlier blocks have, and no data.
    """
    data, place = config.data, _Placement(plan.shape, sharding_gen, sharding_ctx)
    steps = _Steps(store, plan, num_steps, *place.rows(), config.loss.mask_evidence)
    plan.locate(start_step)  # the block is cached before worker processes look for it
    reads = grain.ReadOptions(min(READ_THREADS, data.prefetch), data.prefetch)
    dataset = grain.MapDataset.source(steps)[start_step:num_steps].to_iter_dataset(reads)
    if data.workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read its absl flags
        buffered = -(-data.prefetch // data.workers)
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(data.workers, buffered))

    with contextlib.closing(iter(dataset)) as reader:
        ahead = collections.deque()
        for step, local in enumerate(reader, start_step):
            plan.block(plan.locate(step)[0])  # builds the next one, which workers leave to us
            ahead.append(place.on_devices(local))
            if len(ahead) > 1:
                yield ahead.popleft()
        yield from ahead


def batch_at(
    store: TokenStore,
    plan: Plan,
    config: Config,
    sharding_gen: jax.sharding.NamedSharding,
    sharding_ctx: jax.sharding.NamedSharding,
    step: int,
) -> Batch:
    """The batch of any one step, as `batches` gives it."""
    place = _Placement(plan.shape, sharding_gen, sharding_ctx)
    mask_evidence = config.loss.mask_evidence
    return place.on_devices(host_batch(store, plan, plan.shape, step, *place.rows(), mask_evidence))


class _Placement(NamedTuple):
    """Which rows of a batch this process reads, and where they go."""

    shape: BatchShape
    gen: jax.sharding.NamedSharding
    ctx: jax.sharding.NamedSharding

    def rows(self) -> tuple[slice, slice]:
        """Of Gen and of Ctx."""
        return host_rows(self.gen, self.shape.B), host_rows(self.ctx, self.shape.U)

    def on_devices(self, local: Batch) -> Batch:
        gen_rows, ctx_rows = self.rows()
        return Batch(
            *(
                global_array(rows, self.shape.U, ctx_rows.start, self.ctx)
                if "_U" in name
                else global_array(rows, self.shape.B, gen_rows.start, self.gen)
                for name, rows in zip(Batch._fields, local, strict=True)
            )
        )


def host_rows(sharding: jax.sharding.Sharding, rows: int) -> slice:
    """The smallest slice of `rows` that holds every row of this process's devices."""
    spans = [
        index[0].indices(rows)
        for index in sharding.addressable_devices_indices_map((rows,)).values()
    ]
    return slice(min(start for start, *_ in spans), max(stop for _, stop, _ in spans))


def global_array(
    local: np.ndarray, rows: int, first: int, sharding: jax.sharding.Sharding
) -> jax.Array:
    """An array of `rows` rows, of which this process has `local`, starting at row `first`."""

    def shard(index):
        start, stop, _ = index[0].indices(rows)
        return local[start - first : stop - first]

    return jax.make_array_from_callback((rows, *local.shape[1:]), sharding, shard)


def pack_passages(passages: Sequence[np.ndarray], shape: BatchShape) -> Iterator[PackedPassages]:
    """All passages (int32 [n] each, n <= L; for example `store.ctx`) once, in U rows at a time.

    A row takes the next passage, and then whichever of the next ones fills it best.
    """
    tokens = [len(passage) for passage in passages]
    longest = max(tokens, default=0)
    if longest > shape.L:
        where = tokens.index(longest)
        raise ValueError(f"passage {where}: {longest} tokens do not fit L={shape.L}")
    queue = Queue(tokens, [1] * len(tokens), _WINDOW)
    while len(queue):
        row_of = {}
        for row in range(shape.U):
            room, slots = shape.L, shape.P
            while (passage := queue.take(room, slots)) >= 0:
                row_of[passage] = row
                room, slots = room - tokens[passage], slots - 1
        yield _packed_passages(passages, row_of, shape)


def pack_examples(
    store: TokenStore, shape: BatchShape, packing: bool = True, mask_evidence: bool = False
) -> tuple[Iterator[PackedExamples], np.ndarray]:
    """All examples of a store once, in B rows at a time, and the rows of those that fit none."""
    settings = PlanSettings(packing=packing)
    block, left_out = build_in_order(lengths_of(store), shape, settings)

    def packed(step: int) -> PackedExamples:
        batch = _build(store, block, shape, step, slice(0, shape.B), slice(0, 0), mask_evidence)
        index_BxR = np.zeros((shape.B, shape.R), np.int64)
        here = slice(*block.example_offsets[step : step + 2])
        filled = np.zeros(shape.B, np.int64)
        for example, row in zip(block.examples[here], block.gen_rows[here], strict=True):
            rets = np.arange(*store.ret_offsets[example : example + 2])
            index_BxR[row, filled[row] : filled[row] + len(rets)] = rets
            filled[row] += len(rets)
        return PackedExamples(batch, index_BxR)

    return map(packed, range(block.steps)), left_out


class _Steps:
    """Grain's random-access source: item k is this host's part of step k."""

    def __init__(
        self,
        store: TokenStore,
        plan: Plan,
        num_steps: int,
        gen_rows: slice,
        ctx_rows: slice,
        mask_evidence: bool,
    ):
        self._len, self._store, self._plan = num_steps, store, plan
        self._rows, self._mask_evidence = (gen_rows, ctx_rows), mask_evidence

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, step: int) -> Batch:
        plan = self._plan
        return host_batch(self._store, plan, plan.shape, step, *self._rows, self._mask_evidence)


def _build(
    store: TokenStore,
    block: Block,
    shape: BatchShape,
    index: int,
    gen_rows: slice,
    ctx_rows: slice,
    mask_evidence: bool,
) -> Batch:
    T, L = block.row_tokens[index].tolist()
    shape = dataclasses.replace(shape, T=T, L=L)
    batch = empty_batch(shape, gen_rows.stop - gen_rows.start, ctx_rows.stop - ctx_rows.start)
    first, last = block.example_offsets[index : index + 2]
    _fill_gen(
        batch,
        store,
        *_cut(block.examples[first:last], block.gen_rows[first:last], gen_rows),
        mask_evidence,
    )
    first, last = block.passage_offsets[index : index + 2]
    passages, rows = _cut(block.passages[first:last], block.ctx_rows[first:last], ctx_rows)
    slots = _fill_ctx(_ctx_arrays(batch), store.ctx, passages, rows)
    batch.passage_ids_UxPx2[rows, slots] = store.identities[passages]
    return batch


def _cut(items: np.ndarray, rows: np.ndarray, wanted: slice) -> tuple[np.ndarray, np.ndarray]:
    """The items of the wanted rows, with rows counted from the first wanted one."""
    first, last = np.searchsorted(rows, (wanted.start, wanted.stop))
    return items[first:last], rows[first:last] - wanted.start


def _fill_gen(
    batch: Batch, store: TokenStore, examples: np.ndarray, rows: np.ndarray, mask_evidence: bool
) -> None:
    """Writes examples, given in order of placement, one after the other into their rows."""
    tokens_used = np.zeros(len(batch.gen_tokens_BxT), np.int64)
    segments, slots_used = tokens_used.copy(), tokens_used.copy()
    for example, row in zip(examples, rows, strict=True):
        tokens, roles = store.gen(example)
        at = tokens_used[row]
        here, shifted = slice(at, at + len(tokens)), slice(at, at + len(tokens) - 1)
        segments[row] += 1
        batch.gen_tokens_BxT[row, here] = tokens
        batch.gen_segments_BxT[row, here] = segments[row]
        batch.gen_positions_BxT[row, here] = np.arange(len(tokens))
        batch.ntp_targets_BxT[row, shifted] = tokens[1:]
        supervised = (roles == TARGET) | ((roles == EVIDENCE) & (not mask_evidence))
        batch.ntp_weights_BxT[row, shifted] = supervised[1:]
        positions, passages = store.rets(example)
        slot = slots_used[row]
        slots = slice(slot, slot + len(positions))
        batch.ret_positions_BxR[row, slots] = at + positions
        batch.ret_valid_BxR[row, slots] = True
        _fill_positives(batch.ret_positives_BxRxSx2[row, slots], store.identities[passages])
        tokens_used[row] += len(tokens)
        slots_used[row] += len(positions)


def _fill_positives(positives: np.ndarray, identities: np.ndarray) -> None:
    """uint32 [rets, S, 2] from [rets, 2]: the slot's own passage, then the example's others."""
    distinct = list(dict.fromkeys(map(tuple, identities)))
    for slot, own in enumerate(map(tuple, identities)):
        ordered = [own, *(other for other in distinct if other != own)]
        positives[slot, : len(ordered)] = ordered


def _ctx_arrays(batch: Batch) -> tuple[np.ndarray, ...]:
    """What a passage fills, bar its identity; the first fields of PackedPassages."""
    rows = (batch.ctx_tokens_UxL, batch.ctx_segments_UxL, batch.ctx_positions_UxL)
    return (*rows, batch.passage_ends_UxP, batch.passage_valid_UxP)


def _fill_ctx(
    arrays: Sequence[np.ndarray],
    passages: Sequence[np.ndarray],
    indices: np.ndarray,
    rows: np.ndarray,
) -> np.ndarray:
    """Writes passages into their rows; returns the slot of each.

    `arrays` as `_ctx_arrays` lists them.
    """
    tokens_UxL, segments_UxL, positions_UxL, ends_UxP, valid_UxP = arrays
    used = np.zeros(len(tokens_UxL), np.int64)
    slots_used = used.copy()
    slots = np.zeros(len(indices), np.int64)
    for item, (index, row) in enumerate(zip(indices, rows, strict=True)):
        tokens = passages[index]
        here = slice(used[row], used[row] + len(tokens))
        slot = slots[item] = slots_used[row]
        tokens_UxL[row, here] = tokens
        segments_UxL[row, here] = slot + 1
        positions_UxL[row, here] = np.arange(len(tokens))
        ends_UxP[row, slot] = here.stop - 1
        valid_UxP[row, slot] = True
        used[row] += len(tokens)
        slots_used[row] += 1
    return slots


def _packed_passages(
    passages: Sequence[np.ndarray], row_of: Mapping[int, int], shape: BatchShape
) -> PackedPassages:
    batch = empty_batch(shape, 0, shape.U)
    indices = np.fromiter(row_of.keys(), np.int64)
    row = np.fromiter(row_of.values(), np.int64)
    packed = PackedPassages(*_ctx_arrays(batch), np.zeros((shape.U, shape.P), np.int64))
    slots = _fill_ctx(_ctx_arrays(batch), passages, indices, row)
    packed.index_UxP[row, slots] = indices
    return packed
