"""The paper's objective (arXiv 2403.09024): a batch in, `ntp + nsp` out.

Gen reads text that contains `[Ret]`; its hidden state there is the query. Ctx condenses each
passage into one vector. NTP supervises Gen over its vocabulary, NSP supervises both over the
passages of the whole global batch. Pure functions; the mesh appears only as sharding hints.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cosup_jax import bank as bank_lib
from cosup_jax import losses
from cosup_jax.config import Config
from cosup_jax.data.batch import Batch
from cosup_jax.losses import Candidates, Queries
from cosup_jax.sharding import constrain
from cosup_jax.transformer import Transformer

TEMPERATURE_RANGE = (0.01, 1.0)  # of a learned temperature


@dataclasses.dataclass(frozen=True)
class Towers:
    """The two language models. `params = {"gen", "ctx", "nsp"}`; tied towers have no "ctx"."""

    gen: Transformer
    ctx: Transformer
    tied: bool = False

    def ctx_params(self, params: dict) -> dict:
        """Parameters of Ctx, which are Gen's if the towers are tied."""
        return params["gen"] if self.tied else params["ctx"]


class Aux(NamedTuple):
    """What the step reports and the bank keeps."""

    metrics: dict[str, jax.Array]
    live: Candidates
    asked: Queries


def loss(params: dict, batch: Batch, bank, step, towers: Towers, config: Config):
    """ntp_weight * NTP + nsp_weight * NSP, both means over the global batch.

    Args:
      params: {"gen", "ctx", "nsp"}.
      batch: as in `data/batch.py`.
      bank: `bank.Bank` as it stood before the step, or None.
      step: int32 scalar, for the age of the bank's entries.

    Returns:
      total in nats, and Aux.
    """
    ntp_sum, ntp_weight, asked = _generate(params, batch, towers, config)
    live = _condense(params, batch, towers, config)
    tau = temperature(params, config)

    ntp = ntp_sum / jnp.maximum(ntp_weight, 1)
    nsp, sums = next_sequence(asked, live, bank, step, tau, config)
    total = config.loss.ntp_weight * ntp + config.loss.nsp_weight * nsp

    queries = jnp.maximum(sums.weight, 1)
    metrics = {
        "loss/total": total,
        "ntp/nats_per_token": ntp,
        "ntp/tokens": ntp_weight,
        "nsp/nats_per_ret": sums.loss / queries,
        "nsp/top1": sums.top1 / queries,
        "nsp/candidates": sums.candidates / queries,
        "nsp/queries": sums.weight,
        "nsp/temperature": tau,
    }
    return total, Aux(metrics, live, asked)


def next_token(params: dict, hidden_BxTxD, batch: Batch, towers: Towers, config: Config):
    """NTP over Gen's vocabulary -> summed nats, supervised tokens."""
    return losses.tiled_ntp_sums(
        lambda hidden: towers.gen.logits(params["gen"], hidden),
        hidden_BxTxD,
        batch.ntp_targets_BxT,
        batch.ntp_weights_BxT,
        config.loss.ntp_tiles,
    )


def next_sequence(asked: Queries, live: Candidates, bank, step, tau, config: Config):
    """NSP over live and remembered vectors -> mean nats per live query, sums of the live rows."""
    rows = [losses.score(asked, live, tau)]
    remembered = None if bank is None else bank_lib.queries(bank, step, config.bank)
    if remembered is not None:
        rows.append(losses.score(remembered, live, tau))
    if bank is not None:
        columns = bank_lib.candidates(bank, live, step, config.bank)
        rows[0] = losses.merge(rows[0], losses.score(_whole(asked), columns, tau))
        if remembered is not None:
            rows[1] = losses.merge(rows[1], losses.score(_whole(remembered), columns, tau))
    sums = losses.nsp_sums(rows[0], asked.valid_Q)
    total = sums.loss
    if remembered is not None:
        past = losses.nsp_sums(rows[1], remembered.valid_Q).loss
        total += jnp.where(sums.weight > 0, past, 0.0)
    return total / jnp.maximum(sums.weight, 1), sums


def temperature(params: dict, config: Config) -> jax.Array:
    """What scores are divided by; clamped if it is learned."""
    if not config.loss.learn_temperature:
        return jnp.float32(config.loss.temperature)
    return jnp.exp(jnp.clip(params["nsp"]["log_temperature"], *map(jnp.log, TEMPERATURE_RANGE)))


def similarity_space(vectors: jax.Array, config: Config) -> jax.Array:
    """Hidden states [..., D] -> float32 vectors that are compared by dot product."""
    vectors = vectors.astype(jnp.float32)
    if config.loss.normalize:
        vectors /= jnp.sqrt(jnp.sum(vectors**2, axis=-1, keepdims=True) + 1e-12)
    return vectors


def gen_hidden(params: dict, batch: Batch, towers: Towers) -> jax.Array:
    """Gen's hidden states [B, T, D]."""
    return towers.gen.hidden(
        params["gen"], batch.gen_tokens_BxT, batch.gen_segments_BxT, batch.gen_positions_BxT
    )


def query_vectors(hidden_BxTxD: jax.Array, batch: Batch, config: Config) -> jax.Array:
    """[B, R, D]: the hidden state at each `[Ret]`."""
    at_ret_BxRxD = _take(hidden_BxTxD, batch.ret_positions_BxR)
    return similarity_space(at_ret_BxRxD, config)


def passage_vectors(params: dict, batch: Batch, towers: Towers, config: Config) -> jax.Array:
    """[U, P, D]: Ctx's hidden state at each passage's last token."""
    hidden_UxLxD = towers.ctx.hidden(
        towers.ctx_params(params),
        *(batch.ctx_tokens_UxL, batch.ctx_segments_UxL, batch.ctx_positions_UxL),
    )
    return similarity_space(_take(hidden_UxLxD, batch.passage_ends_UxP), config)


def _generate(params: dict, batch: Batch, towers: Towers, config: Config):
    """Gen's pass: NTP sums, and the queries of the whole global batch."""

    def part(rows: Batch):
        hidden_BxTxD = gen_hidden(params, rows, towers)
        nats, weight = next_token(params, hidden_BxTxD, rows, towers, config)
        return nats, weight, query_vectors(hidden_BxTxD, rows, config)

    nats, weight, query_BxRxD = _in_parts(part, batch, config.micro_batches)
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    asked = Queries(
        constrain(flat(query_BxRxD), "batch", None),
        flat(batch.ret_positives_BxRxSx2),
        flat(batch.ret_valid_BxR),
    )
    return jnp.sum(nats), jnp.sum(weight), asked


def _condense(params: dict, batch: Batch, towers: Towers, config: Config) -> Candidates:
    """Ctx's pass: every distinct passage of the global batch, whole on every device."""
    part = lambda rows: (passage_vectors(params, rows, towers, config),)
    (vector_UxPxD,) = _in_parts(part, batch, config.micro_batches)
    flat = lambda x: x.reshape(1, -1, *x.shape[2:])
    id_1xCx2 = flat(batch.passage_ids_UxPx2)
    valid_C = losses.first_of_each(id_1xCx2[0], flat(batch.passage_valid_UxP)[0])
    return Candidates(constrain(flat(vector_UxPxD), None, None, None), id_1xCx2, valid_C[None])


def _in_parts(part, batch: Batch, micro_batches: int) -> Any:
    """`part` over row slices, one after the other, recomputed in the backward pass (GradCache's
    effect, arXiv 2101.06983, by scan and checkpoint); row outputs come back in order.

    Rows are dealt out so that every slice takes an equal share of every device's rows.
    """
    if micro_batches == 1:
        return part(batch)
    deal = lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1)
    collect = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]) if x.ndim > 1 else x

    def body(_, rows):
        rows = jax.tree.map(lambda x: constrain(x, "batch", *[None] * (x.ndim - 1)), rows)
        return None, jax.checkpoint(part)(rows)

    _, outputs = jax.lax.scan(body, None, jax.tree.map(deal, batch))
    return jax.tree.map(collect, outputs)


def _take(hidden_BxTxD: jax.Array, positions_BxR: jax.Array) -> jax.Array:
    return jnp.take_along_axis(hidden_BxTxD, positions_BxR[..., None], axis=1)


def _whole(queries: Queries) -> Queries:
    """Queries whole on every device, to meet the bank's shards where they lie."""
    return queries._replace(vector_QxD=constrain(queries.vector_QxD, None, None))
