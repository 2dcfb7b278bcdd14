"""The paper's objective (arXiv 2403.09024): a batch in, `ntp_weight * ntp + nsp_weight * nsp` out.

Gen reads text that contains `[Ret]`; its hidden state there is the query. Ctx condenses each
passage into one vector. NTP supervises Gen over its vocabulary, NSP supervises both over the
passages of the whole global batch. Pure functions; the mesh appears only as sharding hints.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cosup_jax import bank as bank_lib
from cosup_jax import nsp, ntp
from cosup_jax.config import Config, LossConfig
from cosup_jax.contrast import EMPTY, Candidates, Queries, Scale, first_of_each
from cosup_jax.data.batch import Batch
from cosup_jax.microbatch import in_parts
from cosup_jax.sharding import constrain, gather
from cosup_jax.towers import Towers, gen_hidden, passage_vectors, query_vectors


class Terms(NamedTuple):
    """The two losses, and what the step reports and the bank keeps."""

    ntp: jax.Array  # nats per supervised token of the global batch
    nsp: jax.Array  # nats per valid [Ret] of the global batch
    metrics: dict[str, jax.Array]
    live: Candidates | None  # None where NSP is not trained
    asked: Queries


class Factors(NamedTuple):
    """The numbers of the objective, float32. Arguments of a program and not its constants, they
    leave it the same for all runs that differ in nothing else."""

    ntp_weight: jax.Array
    nsp_weight: jax.Array
    nsp_ramp_from: jax.Array
    temperature: jax.Array  # where it is not learned

    @classmethod
    def of(cls, config: LossConfig) -> "Factors":
        """Those of a run, on the host."""
        return cls(*(np.float32(getattr(config, name)) for name in cls._fields))


def loss(params: dict, batch: Batch, bank, step, towers: Towers, config: Config, factors=None):
    """ntp_weight * NTP + nsp_weight * NSP in nats, and the Terms; arguments as for `terms`."""
    factors = factors or Factors.of(config.loss)
    found = terms(params, batch, bank, step, towers, config, factors)
    weight = nsp_weight(step, config.loss, factors)
    total = factors.ntp_weight * found.ntp + weight * found.nsp
    metrics = found.metrics | {"loss/total": total, "loss/nsp_weight": weight}
    if found.live is not None:
        metrics["loss/nsp"] = found.nsp  # with a dual bank more than nsp/nats_per_ret, its rows too
    return total, found._replace(metrics=metrics)


def terms(
    params: dict, batch: Batch, bank, step, towers: Towers, config: Config, factors=None
) -> Terms:
    """Both losses, each a mean over the global batch.

    Args:
      params: {"gen", "ctx", "nsp"}.
      batch: as in `data/batch.py`.
      bank: `bank.Bank` as it stood before the step, or None.
      step: int32 scalar, for the age of the bank's entries.
      factors: Factors in place of those of config.loss.
    """
    ntp_sum, ntp_count, asked = generate(params, batch, towers, config)
    ntp_mean = ntp_sum / jnp.maximum(ntp_count, 1)
    metrics = {}
    if config.loss.ntp_weight:
        metrics = {"ntp/nats_per_token": ntp_mean, "ntp/tokens": ntp_count}
    if not config.loss.trains_nsp:  # NTP alone: Ctx is not run
        return Terms(ntp_mean, jnp.float32(0), metrics, None, asked)
    live = condense(towers.ctx_params(params), batch, step, towers, config)
    factors = factors or Factors.of(config.loss)
    scale = nsp.scale_of(params["nsp"], config.loss, factors.temperature)
    nsp_mean, sums = next_sequence(asked, live, bank, step, scale, config)
    metrics |= nsp.metrics(sums, asked, live, jnp.sum(batch.passage_valid_UxP), scale)
    return Terms(ntp_mean, nsp_mean, metrics, live, asked)


def next_token(params: dict, hidden_BxTxD, batch: Batch, towers: Towers, config: Config):
    """NTP over Gen's vocabulary -> summed nats, supervised tokens."""
    return ntp.linear_ntp_sums(
        hidden_BxTxD,
        towers.gen.unembedding(params["gen"]),
        batch.ntp_targets_BxT,
        batch.ntp_weights_BxT,
        towers.gen.vocab_size,
        config.loss.tile_bytes,
    )


def next_sequence(asked: Queries, live: Candidates, bank, step, scale: Scale, config: Config):
    """NSP over live and remembered passages -> mean nats per live query, sums of the live rows.

    The bank's queries, if it has any, are rows too: with remembered columns alone the passages
    would feel fewer queries than the queries feel passages.
    """
    rows = [asked, *bank_lib.queries(bank, step, config.bank)]
    if not config.loss.identity_mask:
        asked_Qx2 = jnp.where(asked.valid_Q[:, None], asked.positives_QxSx2[:, 0], 0)
        live = live.replace(asked_Nx2=constrain(asked_Qx2, None, None))
    columns = [live, *bank_lib.candidates(bank, live, step, config.bank)]
    sums, *past = nsp.nsp_sums(rows, columns, scale, nsp.how(config.loss))
    total = sums.loss + sum(jnp.where(sums.weight > 0, more.loss, 0.0) for more in past)
    return total / jnp.maximum(sums.weight, 1), sums


def generate(params: dict, batch: Batch, towers: Towers, config: Config):
    """Gen reads the batch -> NTP's nats, supervised tokens, and the query at every `[Ret]`."""

    def part(rows: Batch):
        hidden_BxTxD = gen_hidden(params, rows, towers)
        nats = count = jnp.float32(0)
        if config.loss.ntp_weight:
            nats, count = next_token(params, hidden_BxTxD, rows, towers, config)
        return nats, count, query_vectors(hidden_BxTxD, rows, config)

    nats, count, query_BxRxD = in_parts(part, batch, config.micro_batches)
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    asked = Queries(
        constrain(flat(query_BxRxD), "batch", None),
        flat(batch.ret_positives_BxRxSx2),
        flat(batch.ret_valid_BxR),
    )
    return jnp.sum(nats), jnp.sum(count), asked


def condense(ctx_params: dict, batch: Batch, step, towers: Towers, config: Config) -> Candidates:
    """Ctx reads every passage of the global batch; the vectors are whole on every device."""
    part = lambda rows: (passage_vectors(ctx_params, rows, towers, config),)
    (vector_UxPxD,) = in_parts(part, batch, config.micro_batches)
    flat = lambda x: x.reshape(1, -1, *x.shape[2:])
    id_1xCx2 = constrain(flat(batch.passage_ids_UxPx2), None, None, None)
    valid_C = first_of_each(id_1xCx2[0], constrain(flat(batch.passage_valid_UxP)[0], None))
    step_1xC = jnp.where(valid_C, step, EMPTY)[None]
    vector_1xCxD = gather(flat(vector_UxPxD), (None, "batch", None), (None, None, None))
    return Candidates(vector_1xCxD, id_1xCx2, step_1xC, since=jnp.int32(0))


def nsp_weight(step, config: LossConfig, factors: Factors | None = None) -> jax.Array:
    """NSP's factor at a step: linear from nsp_ramp_from to nsp_weight, then constant."""
    factors = factors or Factors.of(config)
    if not config.nsp_ramp_steps:
        return jnp.float32(factors.nsp_weight)
    done, start = jnp.minimum(step / config.nsp_ramp_steps, 1.0), factors.nsp_ramp_from
    return jnp.float32(start + (factors.nsp_weight - start) * done)
