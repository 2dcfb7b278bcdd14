"""Next-sequence prediction: the contrastive loss of queries over passages, as (sum, weight).

Whoever calls divides, once, after the sum over the whole global batch.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cosup_jax import contrast
from cosup_jax.config import TEMPERATURE_RANGE, LossConfig
from cosup_jax.contrast import EMPTY, NEVER, Candidates, How, Queries, Scale, Scores


class NspSums(NamedTuple):
    """Sums over valid queries whose passage is a candidate; `weight` is their number."""

    loss: jax.Array  # nats
    weight: jax.Array
    top1: jax.Array  # queries whose passage outscores every negative
    chance: jax.Array  # expected top1 of a random order
    rivals: jax.Array  # queries that have a negative at all
    margin: jax.Array  # of those, positive minus best negative, in units of similarity
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


def how(config: LossConfig) -> How:
    """What the config says about scoring."""
    margin = config.margin if config.margin_mask else None
    return How(config.contrastive, margin, config.tile_bytes, config.learn_temperature)


def scale_of(learned: dict, config: LossConfig, temperature: jax.Array) -> Scale:
    """Temperature and bias of the scores, from params["nsp"] where they are learned."""
    bias = jnp.float32(config.sigmoid_bias if config.contrastive == "sigmoid" else 0.0)
    if not config.learn_temperature:
        return Scale(jnp.float32(temperature), bias)
    return Scale(jnp.exp(learned["log_temperature"]), learned.get("bias", bias))


def within_range(learned: dict) -> dict:
    """params["nsp"] after an update: a temperature that would leave TEMPERATURE_RANGE stays at its
    end, from where it can come back; one that was clipped where it is read could not."""
    if "log_temperature" not in learned:
        return learned
    low, high = map(jnp.log, TEMPERATURE_RANGE)
    return learned | {"log_temperature": jnp.clip(learned["log_temperature"], low, high)}


def metrics(
    sums: NspSums, asked: Queries, live: Candidates, passages: jax.Array, scale: Scale
) -> dict[str, jax.Array]:
    """Means over the live queries; `passages` of the batch, copies included."""
    mean = lambda total: total / jnp.maximum(sums.weight, 1)
    live_C = live.step_KxC[0] != EMPTY
    return {
        "nsp/nats_per_ret": mean(sums.loss),
        "nsp/top1": mean(sums.top1),
        "nsp/chance": mean(sums.chance),
        "nsp/margin": sums.margin / jnp.maximum(sums.rivals, 1),
        "nsp/candidates": mean(sums.candidates),
        "nsp/masked_copies": mean(sums.copies) + passages - jnp.sum(live_C),
        "nsp/masked_siblings": mean(sums.siblings),
        "nsp/masked_margin": mean(sums.too_close),
        "nsp/queries": sums.weight,
        "nsp/temperature": scale.temperature,
        "nsp/anisotropy_queries": anisotropy(asked.vector_QxD, asked.valid_Q),
        "nsp/anisotropy_passages": anisotropy(live.vector_KxCxD[0], live_C),
    }


def anisotropy(vectors_NxD: jax.Array, valid_N: jax.Array) -> jax.Array:
    """Mean cosine of all pairs of different valid vectors: 0 isotropic, 1 all alike."""
    vectors_NxD = vectors_NxD.astype(jnp.float32)
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
    rival_Q = live_Q & (scores.count > 0)
    total = lambda x_Q, where_Q=live_Q: jnp.sum(jnp.where(where_Q, x_Q, 0), dtype=jnp.float32)
    return NspSums(
        loss=total(nats_Q),
        weight=total(1),
        top1=total(ahead_Q > 0),
        chance=total(1 / (1 + scores.count)),
        rivals=total(1, rival_Q),
        margin=total(ahead_Q * scale.temperature, rival_Q),
        candidates=total(1 + scores.count),
        siblings=total(scores.siblings),
        too_close=total(scores.too_close),
        copies=total(scores.copies),
    )
