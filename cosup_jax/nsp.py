"""Next-sequence prediction: the contrastive loss of queries over passages, as (sum, weight).

Whoever calls divides, once, after the sum over the whole global batch.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cosup_jax import contrast
from cosup_jax.contrast import NEVER, Candidates, How, Queries, Scale, Scores


class NspSums(NamedTuple):
    """Sums over valid queries whose passage is a candidate; `weight` is their number."""

    loss: jax.Array  # nats
    weight: jax.Array
    top1: jax.Array  # queries whose passage outscores every negative
    chance: jax.Array  # expected top1 of a random order
    margin: jax.Array  # positive minus best negative, in units of similarity
    candidates: jax.Array  # the positive and the negatives that count
    siblings: jax.Array  # the next three: candidates masked, as in Scores
    too_close: jax.Array
    copies: jax.Array


def nsp_sums(
    rows: Sequence[Queries], columns: Sequence[Candidates], scale: Scale, how: How
) -> list[NspSums]:
    """The contrastive loss of every valid query over the union of `columns`.

    softmax: -log p(passage | candidates) in nats (arXiv 2403.09024, L_NSP). sigmoid: each pair by
    itself, as SigLIP (arXiv 2303.15343), summed over a query's candidates. Another positive of the
    query's example is no negative. A query whose passage is no candidate has neither loss nor
    weight. Scores exist a tile at a time; the backward pass keeps one number per query.

    `rows` are the live queries, then any others, which get no gradient; one result for each.
    """
    score = functools.partial(contrast.scores, rows, columns, scale, how)
    ceilings = [jnp.full(queries.valid_Q.shape, jnp.inf) for queries in rows]
    if how.margin is not None:
        above = how.margin / scale.temperature
        ceilings = [jax.lax.stop_gradient(found.positive + above) for found in score(ceilings)]
    return [_sums(*pair, scale, how) for pair in zip(rows, score(ceilings), strict=True)]


def anisotropy(vectors_NxD: jax.Array, valid_N: jax.Array) -> jax.Array:
    """Mean cosine of all pairs of different valid vectors: 0 isotropic, 1 all alike."""
    vectors_NxD = jax.lax.stop_gradient(vectors_NxD.astype(jnp.float32))
    length_Nx1 = jnp.sqrt(jnp.sum(vectors_NxD**2, axis=1, keepdims=True) + 1e-12)
    unit_NxD = jnp.where(valid_N[:, None], vectors_NxD / length_Nx1, 0.0)
    n = jnp.sum(valid_N, dtype=jnp.float32)
    return (jnp.sum(jnp.sum(unit_NxD, axis=0) ** 2) - n) / jnp.maximum(n * (n - 1), 1)


def _sums(queries: Queries, scores: Scores, scale: Scale, how: How) -> NspSums:
    live_Q = queries.valid_Q & (scores.positive > 0.5 * NEVER)
    negatives_Q = jnp.where(live_Q, scores.negatives, 0.0)
    positive_Q = jnp.where(live_Q, scores.positive, 0.0)
    if how.contrastive == "softmax":
        nats_Q = jax.nn.softplus(negatives_Q - positive_Q)
    else:
        nats_Q = negatives_Q + jax.nn.softplus(-positive_Q)
    ahead_Q = positive_Q - jnp.where(live_Q, scores.best_negative, 0.0)
    total = lambda x_Q, where_Q=live_Q: jnp.sum(jnp.where(where_Q, x_Q, 0), dtype=jnp.float32)
    return NspSums(
        loss=total(nats_Q),
        weight=total(1),
        top1=total(ahead_Q > 0),
        chance=total(1 / (1 + scores.count)),
        margin=total(ahead_Q * scale.temperature, live_Q & (scores.count > 0)),
        candidates=total(1 + scores.count),
        siblings=total(scores.siblings),
        too_close=total(scores.too_close),
        copies=total(scores.copies),
    )
