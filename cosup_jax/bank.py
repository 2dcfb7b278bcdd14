"""The memory bank: vectors of past steps as extra negatives (XBM, arXiv 1912.06798; dual as in
ContAccum, arXiv 2406.12356). Our extension; off in the paper.

A ring of whole steps: slot k holds one step's C candidates (or Q queries) as they were scored. The
axis that the mesh splits is never written at a traced offset, so filling a slot moves no data
between devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cosup_jax.config import BankConfig
from cosup_jax.contrast import EMPTY, Candidates, Queries, in_float32, largest_divisor, same
from cosup_jax.data.batch import BatchShape
from cosup_jax.errors import UserError
from cosup_jax.sharding import constrain

_COMPARED_AT_ONCE = 1 << 22  # pairs of identities


class Ring(NamedTuple):
    """Vectors of past steps, without gradient.

    bfloat16 is kept as its bits, uint16: XLA's CPU backend updates a bfloat16 array by turning all
    of it into float32 and back.
    """

    vector_KxCxD: jax.Array  # float32, or uint16
    id_KxCxSx2: jax.Array  # uint32: a passage's identity (S = 1), or a query's positives
    step_KxC: jax.Array  # int32, the step that wrote the entry; EMPTY = none


class Bank(NamedTuple):
    """Part of the train state. `queries` is None unless bank.kind is dual."""

    passages: Ring
    queries: Ring | None


def init(config: BankConfig, shape: BatchShape, width: int) -> Bank | None:
    """An empty bank, or None if it is off. Raises UserError if it cannot hold one step."""
    if config.kind == "off":
        return None
    ring = lambda *args: _ring(*args, width, config.dtype)
    passages = ring("bank.size", config.size, shape.U * shape.P, 1)
    if config.kind == "passage":
        return Bank(passages, None)
    return Bank(passages, ring("bank.queries", config.queries, shape.B * shape.R, shape.S))


def logical_axes(bank: Bank | None) -> Bank | None:
    """Logical axis names per leaf, for `sharding`: split over the candidates of a slot."""
    if bank is None:
        return None
    axes = Ring((None, "batch", None), (None, "batch", None, None), (None, "batch"))
    return Bank(axes, axes if bank.queries is not None else None)


def candidates(
    bank: Bank | None, live: Candidates, step: jax.Array, config: BankConfig
) -> list[Candidates]:
    """The bank's passages as columns beside the live ones; none if it is off.

    Masked: empty entries, entries older than max_age, everything before start_step, and passages
    that are also live, whose fresh vector counts instead.
    """
    if bank is None:
        return []
    ring = bank.passages
    return [
        Candidates(
            ring.vector_KxCxD,
            ring.id_KxCxSx2[:, :, 0],
            ring.step_KxC,
            since=_since(step, config),
            newer_Nx2=_known(live),
            stored=True,
        )
    ]


def queries(bank: Bank | None, step: jax.Array, config: BankConfig) -> list[Queries]:
    """The bank's queries as rows beside the live ones, slots flattened; none unless dual."""
    if bank is None or bank.queries is None:
        return []
    ring = bank.queries
    # Whole first: to flatten an axis that the mesh splits moves it about.
    flat = lambda x: constrain(x, *[None] * x.ndim).reshape(-1, *x.shape[2:])
    usable_KxC = ring.step_KxC >= _since(step, config)
    return [Queries(in_float32(flat(ring.vector_KxCxD)), flat(ring.id_KxCxSx2), flat(usable_KxC))]


def fill(
    bank: Bank | None, live: Candidates, asked: Queries, step: jax.Array, keep: jax.Array
) -> Bank | None:
    """The bank after a step: its valid vectors written over the oldest slot, if `keep`.

    An older copy of a passage written now becomes empty, so that the newest copy counts. Without
    `keep` the bank stays as it is, bit by bit.
    """
    if bank is None:
        return None
    ids_Cx1x2, written_C = live.id_KxCx2[0][:, None], live.step_KxC[0] != EMPTY
    ring = _write(bank.passages, live.vector_KxCxD[0], ids_Cx1x2, written_C, step, keep)
    known_Nx2 = _known(live)

    K, C = ring.step_KxC.shape
    group = largest_divisor(K, _COMPARED_AT_ONCE // (C * len(known_Nx2)))

    def evict(i, step_KxC):  # a few slots at a time: all ids at once would take memory
        here = lambda x: jax.lax.dynamic_slice_in_dim(x, i * group, group)
        step_GxC = here(step_KxC)
        known_GxC = jnp.any(same(here(ring.id_KxCxSx2), known_Nx2[None, None]), axis=-1)
        older_GxC = known_GxC & (step_GxC != step) & keep
        step_GxC = jnp.where(older_GxC, EMPTY, step_GxC)
        return jax.lax.dynamic_update_slice_in_dim(step_KxC, step_GxC, i * group, 0)

    step_KxC = jax.lax.fori_loop(0, K // group, evict, ring.step_KxC)
    passages = ring._replace(step_KxC=step_KxC)
    if bank.queries is None:
        return Bank(passages, None)
    return Bank(passages, _write(bank.queries, *asked, step, keep))


def steps(bank: Bank, step: jax.Array, config: BankConfig) -> list[jax.Array]:
    """For each ring, the step [K] that each of its slots holds; EMPTY if too old, or nothing."""
    oldest = jnp.maximum(step - config.max_age, 0)
    found = [jnp.max(ring.step_KxC, axis=1) for ring in bank if ring is not None]
    return [jnp.where(written_K >= oldest, written_K, EMPTY) for written_K in found]


def flops(bank: Bank, shape: BatchShape, learn_scale: bool, margin_mask: bool) -> int:
    """Matrix-product FLOPs a step of what the bank adds to NSP, forward and backward.

    Every row meets every stored passage, with the margin mask twice; rows with a backward pass meet
    them twice more. The bank's own queries also meet the live passages: `dual` is quadratic.
    """
    slots, per_step, width = bank.passages.vector_KxCxD.shape
    live, own = shape.B * shape.R, 0 if bank.queries is None else bank.queries.step_KxC.size
    learned = live + own if learn_scale else live
    forward = 2 if margin_mask else 1
    products = (forward * (live + own) + 2 * learned) * slots * per_step
    products += (forward + 2) * own * per_step
    return 2 * products * width


def stored(bank: Bank, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The passages that `step` wrote: vectors [C, D] in float32, and which are still there [C]."""
    ring = bank.passages
    slot = step % ring.step_KxC.shape[0]
    return in_float32(_at(ring.vector_KxCxD, slot)), _at(ring.step_KxC, slot) == step


def age(bank: Bank, step: jax.Array, config: BankConfig) -> tuple[jax.Array, jax.Array]:
    """Mean age in steps of the passages that are scored at `step`, and their number."""
    written_KxC = bank.passages.step_KxC
    usable_KxC = written_KxC >= _since(step, config)
    count = jnp.sum(usable_KxC, dtype=jnp.float32)
    total = jnp.sum(jnp.where(usable_KxC, step - written_KxC, 0), dtype=jnp.float32)
    return total / jnp.maximum(count, 1), count


def _ring(key: str, size: int, per_step: int, positives: int, width: int, dtype: str) -> Ring:
    slots = size // per_step
    if slots == 0:
        raise UserError(
            f"config.{key}={size} is smaller than one step, which has {per_step} slots; set it to "
            f"a multiple of {per_step} or config.bank.kind=off"
        )
    return Ring(
        jnp.zeros((slots, per_step, width), jnp.uint16 if dtype == "bfloat16" else dtype),
        jnp.zeros((slots, per_step, positives, 2), jnp.uint32),
        jnp.full((slots, per_step), EMPTY, jnp.int32),
    )


def _since(step: jax.Array, config: BankConfig) -> jax.Array:
    """The oldest step whose entries are scored at `step`."""
    oldest = jnp.maximum(step - config.max_age, 0)
    return jnp.where(step >= config.start_step, oldest, jnp.iinfo(jnp.int32).max)


def _known(live: Candidates) -> jax.Array:
    """Identities of the live passages; (0, 0), which nothing has, where there is none."""
    known_Nx2 = jnp.where((live.step_KxC[0] != EMPTY)[:, None], live.id_KxCx2[0], 0)
    return constrain(known_Nx2, None, None)  # else every turn of a loop gathers them again


def _write(ring: Ring, vector_CxD, id_CxSx2, valid_C, step, keep) -> Ring:
    slot = step % ring.step_KxC.shape[0]

    put = lambda old_KxC, new_C: _put(old_KxC, jnp.where(keep, new_C, _at(old_KxC, slot)), slot)
    if ring.vector_KxCxD.dtype == jnp.uint16:
        vector_CxD = jax.lax.bitcast_convert_type(vector_CxD.astype(jnp.bfloat16), jnp.uint16)
    return Ring(
        put(ring.vector_KxCxD, vector_CxD),
        put(ring.id_KxCxSx2, id_CxSx2),
        put(ring.step_KxC, jnp.where(valid_C, step, EMPTY)),
    )


def _at(x_KxC: jax.Array, slot) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x_KxC, slot, 0, keepdims=False)


def _put(x_KxC: jax.Array, x_C: jax.Array, slot) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x_KxC, x_C, slot, 0)
