"""Next-token and next-sequence losses as (sum, weight) pairs; whoever calls divides, once.

Everything is float32 inside. Shapes by the letters of `data/batch.py`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

_NEVER = -1e30  # score of a masked candidate; finite, so that masked rows have finite gradients


def ntp_sums(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
    """Next-token prediction: weighted cross-entropy in nats, and the weight.

    Args:
      logits: [..., V] float32.
      targets: [...] int32; any valid id where the weight is 0.
      weights: [...] float32, 1 where the target is supervised.
    """
    logits = jnp.where((weights > 0)[..., None], logits, 0.0)  # a NaN on padding stays there
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.sum(nats * weights), jnp.sum(weights)


def tiled_ntp_sums(
    logits_of: Callable[[jax.Array], jax.Array],
    hidden_BxTxD: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
    tiles: int,
) -> tuple[jax.Array, jax.Array]:
    """`ntp_sums` with the logits of one slice of each row alive at a time.

    Each row's supervised tokens move to its front, so that tiles without any are skipped: logits
    are computed (again in the backward pass) only about where a token is supervised.

    Args:
      logits_of: hidden states [..., D] -> logits [..., V].
      tiles: how many slices of a row; more than T means T.
    """
    T = weights_BxT.shape[1]
    width = -(-T // min(tiles, T))
    order_BxT = jnp.argsort(weights_BxT <= 0, axis=1, stable=True)

    def tiled(x):  # [B, T, ...] -> [tiles, B, width, ...]
        x = jnp.take_along_axis(x, order_BxT.reshape(order_BxT.shape + (1,) * (x.ndim - 2)), axis=1)
        x = jnp.pad(x, [(0, 0), (0, -T % width)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, width, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def sums(hidden, targets, weights):
        return ntp_sums(logits_of(hidden), targets, weights)

    def body(carry, tile):
        nothing = lambda *_: (jnp.float32(0), jnp.float32(0))
        part = jax.lax.cond(jnp.any(tile[2] > 0), sums, nothing, *tile)
        return jax.tree.map(jnp.add, carry, part), None

    tiles_of = (tiled(hidden_BxTxD), tiled(targets_BxT), tiled(weights_BxT))
    return jax.lax.scan(body, (jnp.float32(0), jnp.float32(0)), tiles_of)[0]


class Queries(NamedTuple):
    """Rows of the contrastive loss."""

    vector_QxD: jax.Array
    positives_QxSx2: jax.Array  # uint32; [:, 0] is the query's passage, the rest its siblings
    valid_Q: jax.Array  # bool


class Candidates(NamedTuple):
    """Columns of the contrastive loss, in blocks so that a sharded bank is never reshaped.

    No identity may be valid twice among all the columns that one loss is computed over.
    """

    vector_KxCxD: jax.Array
    id_KxCx2: jax.Array  # uint32
    valid_KxC: jax.Array  # bool


class Scores(NamedTuple):
    """What one query needs to know of a set of candidates; `merge` joins two sets."""

    lse_Q: jax.Array  # log-sum-exp over the positive and every unmasked negative
    positive_Q: jax.Array  # score of the query's passage; _NEVER where it is not a candidate
    best_negative_Q: jax.Array
    count_Q: jax.Array  # int32, candidates that count, the positive included


def same(a_x2: jax.Array, b_x2: jax.Array) -> jax.Array:
    """Whether two identities are equal; broadcasts over leading axes."""
    return jnp.all(a_x2 == b_x2, axis=-1)


def first_of_each(id_Cx2: jax.Array, valid_C: jax.Array) -> jax.Array:
    """`valid_C` without the later copies of an identity: a passage counts once."""
    C = valid_C.shape[0]
    twin_CxC = same(id_Cx2[:, None], id_Cx2[None]) & valid_C[:, None] & valid_C[None]
    earlier_CxC = jnp.tril(jnp.ones((C, C), bool), k=-1)
    return valid_C & ~jnp.any(twin_CxC & earlier_CxC, axis=1)


def score(queries: Queries, candidates: Candidates, temperature) -> Scores:
    """Scores every query against every candidate.

    Positives are found by identity, wherever they lie. A candidate that is another positive of the
    same example is masked: it is no negative.
    """
    score_QxKxC = jnp.einsum(
        "qd,kcd->qkc",
        queries.vector_QxD.astype(jnp.float32),
        candidates.vector_KxCxD.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    score_QxKxC /= temperature
    own_Qx1x1x2 = queries.positives_QxSx2[:, 0][:, None, None]
    is_own_QxKxC = same(own_Qx1x1x2, candidates.id_KxCx2[None]) & candidates.valid_KxC[None]
    negative_QxKxC = ~is_own_QxKxC & candidates.valid_KxC[None]
    for s in range(1, queries.positives_QxSx2.shape[1]):
        sibling_Qx1x1x2 = queries.positives_QxSx2[:, s][:, None, None]
        negative_QxKxC &= ~same(sibling_Qx1x1x2, candidates.id_KxCx2[None])
    counts_QxKxC = is_own_QxKxC | negative_QxKxC
    unmasked = lambda where: jnp.where(where, score_QxKxC, _NEVER)
    return Scores(
        lse_Q=jax.nn.logsumexp(unmasked(counts_QxKxC), axis=(1, 2)),
        positive_Q=jnp.max(unmasked(is_own_QxKxC), axis=(1, 2)),
        best_negative_Q=jnp.max(unmasked(negative_QxKxC), axis=(1, 2)),
        count_Q=jnp.sum(counts_QxKxC, axis=(1, 2), dtype=jnp.int32),
    )


def merge(a: Scores, b: Scores) -> Scores:
    """Scores over the union of two disjoint sets of candidates."""
    return Scores(
        jnp.logaddexp(a.lse_Q, b.lse_Q),
        jnp.maximum(a.positive_Q, b.positive_Q),
        jnp.maximum(a.best_negative_Q, b.best_negative_Q),
        a.count_Q + b.count_Q,
    )


class NspSums(NamedTuple):
    """Sums over valid queries; `weight` is their number."""

    loss: jax.Array  # nats
    weight: jax.Array
    top1: jax.Array  # queries whose passage outscores every negative
    candidates: jax.Array  # candidates that count, the positive included


def nsp_sums(scores: Scores, valid_Q: jax.Array) -> NspSums:
    """Next-sequence prediction: -log p(passage | candidates) in nats (arXiv 2403.09024, L_NSP).

    A query whose passage is no candidate has no loss and no weight.
    """
    live_Q = valid_Q & (scores.positive_Q > 0.5 * _NEVER)
    nats_Q = jnp.where(live_Q, scores.lse_Q - scores.positive_Q, 0.0)
    right_Q = live_Q & (scores.positive_Q > scores.best_negative_Q)
    return NspSums(
        loss=jnp.sum(nats_Q),
        weight=jnp.sum(live_Q, dtype=jnp.float32),
        top1=jnp.sum(right_Q, dtype=jnp.float32),
        candidates=jnp.sum(jnp.where(live_Q, scores.count_Q, 0), dtype=jnp.float32),
    )
