"""The official code's objective, bugs included (compat="official"): for comparison only.

Source: the paper's repository, `model/joint_modeling_llama.py` and its collator. What differs from
`cosup.py`, over `loss.compat_ranks` virtual ranks (equal slices of the global batch):

- losses are means per rank, then over ranks, so a rank with few tokens weighs as much as any;
- NTP also counts PAD as a target, from a row's end to the longest row of its rank;
- a passage vector is the state at the last column of its rank's right-padded batch, so a shorter
  passage is represented by a PAD token;
- vectors of other ranks carry no gradient, positives are found by position, and a passage that
  stands twice is its own negative.
"""

import jax
import jax.numpy as jnp

from cosup_jax.config import Config
from cosup_jax.contrast import EMPTY, Candidates, Queries
from cosup_jax.cosup import Terms
from cosup_jax.data.batch import Batch
from cosup_jax.ntp import ntp_sums
from cosup_jax.towers import Towers


def loss(params: dict, batch: Batch, towers: Towers, pad_id: int, config: Config):
    """As `cosup.loss`. A row holds one example or passage; slot (b, r) owns Ctx row b * R + r."""
    W = config.loss.compat_ranks
    ntp_W, query_QxD = _generate(params, batch, towers, pad_id, W)
    valid_Q = batch.ret_valid_BxR.reshape(-1)
    vector_CxD = _condense(params, batch, towers, pad_id, W)

    rank_Q = jnp.arange(valid_Q.size) // (valid_Q.size // W)
    local_QxC = rank_Q[:, None] == rank_Q[None]
    dot = lambda c: jnp.einsum("qd,cd->qc", query_QxD, c, precision=jax.lax.Precision.HIGHEST)
    score_QxC = jnp.where(local_QxC, dot(vector_CxD), dot(jax.lax.stop_gradient(vector_CxD)))
    score_QxC = jnp.where(valid_Q[None], score_QxC, -1e30)
    own_Q = jnp.diagonal(score_QxC)
    nats_Q = jnp.where(valid_Q, jax.nn.logsumexp(score_QxC, axis=1) - own_Q, 0.0)
    right_Q = valid_Q & (jnp.argmax(score_QxC, axis=1) == jnp.arange(valid_Q.size))

    queries_W = jnp.sum(valid_Q.reshape(W, -1), axis=1)
    nsp_W = jnp.sum(nats_Q.reshape(W, -1), axis=1) / jnp.maximum(queries_W, 1)
    queries = jnp.maximum(jnp.sum(queries_W), 1)
    has_rows_W = jnp.any(batch.gen_segments_BxT.reshape(W, -1) > 0, axis=1)
    ntp, nsp = jnp.mean(ntp_W, where=has_rows_W), jnp.mean(nsp_W, where=has_rows_W)
    total = config.loss.ntp_weight * ntp + config.loss.nsp_weight * nsp
    metrics = {
        "loss/total": total,
        "ntp/nats_per_token": ntp,
        "ntp/tokens": jnp.sum(batch.ntp_weights_BxT),
        "nsp/nats_per_ret": nsp,
        "nsp/top1": jnp.sum(right_Q) / queries,
        "nsp/candidates": jnp.sum(valid_Q, dtype=jnp.float32),
        "nsp/queries": jnp.sum(queries_W, dtype=jnp.float32),
        "nsp/temperature": jnp.float32(1.0),
    }
    ids_QxSx2 = batch.ret_positives_BxRxSx2.reshape(valid_Q.size, -1, 2)
    ids_1xCx2 = batch.passage_ids_UxPx2.reshape(1, -1, 2)
    step_1xC = jnp.where(valid_Q, 0, EMPTY)[None]
    live = Candidates(vector_CxD[None], ids_1xCx2, step_1xC, since=jnp.int32(0))
    return total, Terms(ntp, nsp, metrics, live, Queries(query_QxD, ids_QxSx2, valid_Q))


def _generate(params: dict, batch: Batch, towers: Towers, pad_id: int, W: int):
    """NTP mean per rank [W], and the hidden state at every [Ret] slot [Q, D]."""
    tokens_BxT, segments_BxT, positions_BxT = _right_padded(
        batch.gen_tokens_BxT, batch.gen_segments_BxT, pad_id
    )
    hidden_BxTxD = towers.gen.hidden(params["gen"], tokens_BxT, segments_BxT, positions_BxT)
    length_B = jnp.sum(segments_BxT > 0, axis=1)
    longest_B = _longest(length_B, W)
    next_BxT = positions_BxT + 1
    is_pad_BxT = (next_BxT >= length_B[:, None]) & (next_BxT < longest_B[:, None])
    is_pad_BxT &= length_B[:, None] > 0  # the last step of an epoch may have rows of no example
    targets_BxT = jnp.where(is_pad_BxT, pad_id, batch.ntp_targets_BxT)
    weights_BxT = jnp.where(is_pad_BxT, 1.0, batch.ntp_weights_BxT)

    split = lambda x: x.reshape(W, -1, *x.shape[1:])
    logits = split(towers.gen.logits(params["gen"], hidden_BxTxD))
    nats_W, weight_W = jax.vmap(ntp_sums)(logits, split(targets_BxT), split(weights_BxT))
    query_BxRxD = jnp.take_along_axis(hidden_BxTxD, batch.ret_positions_BxR[..., None], axis=1)
    query_QxD = query_BxRxD.reshape(-1, query_BxRxD.shape[-1]).astype(jnp.float32)
    return nats_W / jnp.maximum(weight_W, 1), query_QxD


def _condense(params: dict, batch: Batch, towers: Towers, pad_id: int, W: int) -> jax.Array:
    """[C, D]: the state at position -1 of each rank's right-padded passages."""
    tokens_UxL, segments_UxL, positions_UxL = _right_padded(
        batch.ctx_tokens_UxL, batch.ctx_segments_UxL, pad_id
    )
    hidden_UxLxD = towers.ctx.hidden(
        towers.ctx_params(params), tokens_UxL, segments_UxL, positions_UxL
    )
    last_U = jnp.maximum(_longest(jnp.sum(segments_UxL > 0, axis=1), W) - 1, 0)
    return jnp.take_along_axis(hidden_UxLxD, last_U[:, None, None], axis=1)[:, 0].astype(
        jnp.float32
    )


def _right_padded(tokens_BxT, segments_BxT, pad_id: int):
    """PAD tokens that see the row before them and that nothing sees, positions running on."""
    real_BxT = segments_BxT > 0
    positions_BxT = jnp.broadcast_to(jnp.arange(tokens_BxT.shape[1]), tokens_BxT.shape)
    return jnp.where(real_BxT, tokens_BxT, pad_id), jnp.where(real_BxT, 1, -1), positions_BxT


def _longest(length_B: jax.Array, W: int) -> jax.Array:
    """Each row's longest companion within its rank."""
    longest_W = jnp.max(length_B.reshape(W, -1), axis=1)
    return jnp.repeat(longest_W, length_B.size // W)
