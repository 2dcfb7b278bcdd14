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
from cosup_jax.data.batch import BatchShape
from cosup_jax.errors import UserError
from cosup_jax.losses import Candidates, Queries, same

_EMPTY = -1  # step of an entry that holds nothing


class Ring(NamedTuple):
    """Vectors of past steps, without gradient."""

    vector_KxCxD: jax.Array
    id_KxCxSx2: jax.Array  # uint32: a passage's identity (S = 1), or a query's positives
    step_KxC: jax.Array  # int32, the step that wrote the entry; -1 = empty


class Bank(NamedTuple):
    """Part of the train state. `queries` is None unless bank.kind is dual."""

    passages: Ring
    queries: Ring | None


def init(config: BankConfig, shape: BatchShape, width: int) -> Bank | None:
    """An empty bank, or None if it is off. Raises UserError if it cannot hold one step."""
    if config.kind == "off":
        return None
    passages = _ring("bank.size", config.size, shape.U * shape.P, 1, width)
    if config.kind == "passage":
        return Bank(passages, None)
    return Bank(passages, _ring("bank.queries", config.queries, shape.B * shape.R, shape.S, width))


def logical_axes(bank: Bank | None) -> Bank | None:
    """Logical axis names per leaf, for `sharding`: split over the candidates of a slot."""
    if bank is None:
        return None
    axes = Ring((None, "batch", None), (None, "batch", None, None), (None, "batch"))
    return Bank(axes, axes if bank.queries is not None else None)


def candidates(bank: Bank, live: Candidates, step: jax.Array, config: BankConfig) -> Candidates:
    """The bank's passages as columns beside the live ones.

    Masked: empty entries, entries older than max_age, everything before start_step, and passages
    that are also live, whose fresh vector counts instead.
    """
    ring = bank.passages
    usable_KxC = _usable(ring, step, config) & ~_also_live(ring, live)
    return Candidates(ring.vector_KxCxD, ring.id_KxCxSx2[:, :, 0], usable_KxC)


def queries(bank: Bank, step: jax.Array, config: BankConfig) -> Queries | None:
    """The bank's queries as rows beside the live ones, slots flattened; None unless dual."""
    if bank.queries is None:
        return None
    ring = bank.queries
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    usable_KxC = _usable(ring, step, config)
    return Queries(flat(ring.vector_KxCxD), flat(ring.id_KxCxSx2), flat(usable_KxC))


def fill(bank: Bank | None, live: Candidates, asked: Queries, step: jax.Array) -> Bank | None:
    """The bank after a step: its valid vectors written over the oldest slot.

    An older copy of a passage written now becomes empty, so that the newest copy counts.
    """
    if bank is None:
        return None
    stale_KxC = _also_live(bank.passages, live)
    passages = bank.passages._replace(step_KxC=jnp.where(stale_KxC, _EMPTY, bank.passages.step_KxC))
    ids_Cx1x2 = live.id_KxCx2[0][:, None]
    passages = _write(passages, live.vector_KxCxD[0], ids_Cx1x2, live.valid_KxC[0], step)
    if bank.queries is None:
        return Bank(passages, None)
    return Bank(passages, _write(bank.queries, *asked, step))


def _ring(key: str, size: int, per_step: int, positives: int, width: int) -> Ring:
    slots = size // per_step
    if slots == 0:
        raise UserError(
            f"config.{key}={size} is smaller than one step, which has {per_step} slots; set it to "
            f"a multiple of {per_step} or config.bank.kind=off"
        )
    return Ring(
        jnp.zeros((slots, per_step, width), jnp.float32),
        jnp.zeros((slots, per_step, positives, 2), jnp.uint32),
        jnp.full((slots, per_step), _EMPTY, jnp.int32),
    )


def _usable(ring: Ring, step: jax.Array, config: BankConfig) -> jax.Array:
    age_KxC = step - ring.step_KxC
    fresh_KxC = (ring.step_KxC != _EMPTY) & (age_KxC <= config.max_age)
    return fresh_KxC & (step >= config.start_step)


def _also_live(ring: Ring, live: Candidates) -> jax.Array:
    stored_KxCx1x2 = ring.id_KxCxSx2[:, :, :1]
    live_1x1xCx2 = live.id_KxCx2[0][None, None]
    return jnp.any(same(stored_KxCx1x2, live_1x1xCx2) & live.valid_KxC[0][None, None], axis=-1)


def _write(ring: Ring, vector_CxD, id_CxSx2, valid_C, step) -> Ring:
    slot = step % ring.step_KxC.shape[0]
    put = lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new.astype(old.dtype), slot, 0)
    return Ring(
        put(ring.vector_KxCxD, jax.lax.stop_gradient(vector_CxD)),
        put(ring.id_KxCxSx2, id_CxSx2),
        put(ring.step_KxC, jnp.where(valid_C, step, _EMPTY)),
    )
