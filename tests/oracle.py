"""The objective in plain NumPy loops, written from the paper: slow, float64, no masks.

`ntp` and `nsp` give the losses and their gradients with respect to logits, queries and passages;
`objective` pulls those back through the towers with a one-device vjp.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from cosup_jax import cosup
from cosup_jax import nsp as nsp_lib
from cosup_jax.config import BankConfig
from cosup_jax.contrast import Queries, Scale
from cosup_jax.towers import gen_hidden, passage_vectors, query_vectors


def ntp(logits, targets, weights):
    """Sum of weighted -log softmax(logits)[target], the weight, and the gradient of the sum."""
    nats, grad = 0.0, np.zeros(np.shape(logits))
    for i, (row, target, weight) in enumerate(zip(logits, targets, weights, strict=True)):
        if weight:
            row = np.asarray(row, np.float64)
            p = np.exp(row - row.max())
            p /= p.sum()
            nats -= weight * np.log(p[target])
            grad[i] = weight * p
            grad[i, target] -= weight
    return nats, float(np.sum(weights)), grad


def nsp(
    queries,
    live,
    bank=(),
    bank_queries=(),
    temperature=1.0,
    contrastive="softmax",
    bias=0.0,
    margin=np.inf,
    identity_mask=True,
):
    """Next-sequence prediction with identities, over live passages and a bank.

    Args:
      queries: list of (vector, [own id, sibling ids...]) of valid live queries.
      live: list of (vector, id) of valid passages, copies allowed.
      bank: list of (vector, id), newest first; may overlap live and itself.
      bank_queries: as queries, from earlier steps.
      identity_mask: False: positives are found by position. Every live query brings its passage,
        which is a negative of all others, of those that bring the same one too.
      margin: negatives of greater similarity than the positive's by more than this are left out.

    Returns:
      mean nats per live query, gradient per live query [n, D], gradient per live passage [m, D]
      (copies after the first have none), and the gradients of temperature and bias.
    """
    columns, seen = [], set()
    for source, entries in (("live", live), ("bank", bank)):
        for index, (vector, identity) in enumerate(entries):
            if identity not in seen:  # live first, then the newest copy in the bank
                seen.add(identity)
                columns.append((source, index, np.asarray(vector, np.float64), identity, None))
    if not identity_mask:
        asked_for = [own for _, (own, *_) in queries]
        brought = [(*c[:4], i) for i, own in enumerate(asked_for) for c in columns if c[3] == own]
        columns = brought + [c for c in columns if c[3] not in asked_for]
    width = len(live[0][0])
    grad_query, grad_live = np.zeros((len(queries), width)), np.zeros((len(live), width))
    loss = grad_temperature = grad_bias = 0.0
    rows = [("live", i, *q) for i, q in enumerate(queries)] if queries else []
    rows += [("bank", i, *q) for i, q in enumerate(bank_queries)] if queries else []
    answered = [q for q in queries if q[1][0] in seen]
    for kind, i, vector, (own, *siblings) in rows:
        vector = np.asarray(vector, np.float64)
        if own not in seen or not answered:
            continue
        counted = [c for c in columns if c[3] == own or c[3] not in siblings]
        positive = next(vector @ c[2] for c in counted if c[3] == own)
        counted = [c for c in counted if c[3] == own or vector @ c[2] <= positive + margin]
        is_own = np.array([c[3] == own and c[4] in (None, i) for c in counted])
        scores = np.array([vector @ c[2] / temperature + bias for c in counted])
        if contrastive == "softmax":
            p = np.exp(scores - scores.max())
            p /= p.sum()
            loss -= np.log(p[is_own][0]) / len(answered)
            pulls = (p - is_own) / len(answered)
        else:
            signed = np.where(is_own, scores, -scores)
            loss += np.sum(np.log1p(np.exp(-signed))) / len(answered)
            pulls = (1 / (1 + np.exp(-scores)) - is_own) / len(answered)
        for (source, j, candidate, *_), pull, score in zip(counted, pulls, scores, strict=True):
            if kind == "live":
                grad_query[i] += pull * candidate / temperature
            if source == "live":
                grad_live[j] += pull * vector / temperature
            grad_temperature -= pull * (score - bias) / temperature
            grad_bias += pull
    return loss, grad_query, grad_live, grad_temperature, grad_bias


def key(pair) -> tuple[int, int]:
    """An identity as something to compare."""
    return int(pair[0]), int(pair[1])


def listed(positives_Sx2) -> list[tuple[int, int]]:
    """A query's passage and its siblings; empty places left out."""
    return [key(pair) for i, pair in enumerate(positives_Sx2) if i == 0 or np.any(pair)]


def remembered(bank, step: int, max_age: int):
    """The bank's passages, newest first, and its queries, as `nsp` takes them."""
    found = []
    for ring in () if bank is None else (bank.passages, bank.queries):
        if ring is None:
            continue
        written = np.asarray(ring.step_KxC)
        where = np.argwhere((written >= 0) & (step - written <= max_age))
        where = sorted(map(tuple, where), key=lambda at: step - written[at])
        vectors, ids = np.asarray(ring.vector_KxCxD), np.asarray(ring.id_KxCxSx2)
        found.append([(vectors[at], ids[at]) for at in where])
    passages = [(vector, key(ids[0])) for vector, ids in found[0]] if found else []
    queries = [(vector, listed(ids)) for vector, ids in found[1]] if len(found) > 1 else []
    return passages, queries


def vector_loss(asked, live, live_ids, live_valid, bank, step, temperature, bias, config):
    """`nsp` of arrays: (mean nats, d queries [Q, D], d passages [C, D], d temperature, d bias).

    Args:
      asked: nsp.Queries; live [C, D], live_ids [C, 2], live_valid [C]; bank as in the state.
    """
    rows = np.flatnonzero(asked.valid_Q)
    columns = np.flatnonzero(live_valid)
    passages, queries = remembered(bank, step, config.bank.max_age)
    known = {key(live_ids[j]) for j in columns} | {identity for _, identity in passages}
    rows = [i for i in rows if key(asked.positives_QxSx2[i, 0]) in known]
    value, grad_rows, grad_columns, *grad_scale = nsp(
        [(asked.vector_QxD[i], listed(asked.positives_QxSx2[i])) for i in rows],
        [(live[j], key(live_ids[j])) for j in columns] or [(live[0], None)],
        passages,
        queries,
        temperature,
        config.loss.contrastive,
        bias,
        config.loss.margin if config.loss.margin_mask else np.inf,
        config.loss.identity_mask,
    )
    grad_query, grad_live = np.zeros(asked.vector_QxD.shape), np.zeros(np.shape(live))
    grad_query[rows] = grad_rows
    if len(columns):
        grad_live[columns] = grad_columns
    return value, grad_query, grad_live, *grad_scale


@functools.partial(jax.jit, static_argnames=("towers", "config"))
def _outputs(params, batch, towers, config):
    """Logits, queries, passage vectors and scale: all that the loss is a function of."""
    hidden_BxTxD = gen_hidden(params, batch, towers)
    logits = (hidden_BxTxD @ towers.gen.unembedding(params["gen"])).astype(jnp.float32)
    vectors = passage_vectors(towers.ctx_params(params), batch, towers, config)
    scale = nsp_lib.scale_of(params["nsp"], config.loss, config.loss.temperature)
    return logits, query_vectors(hidden_BxTxD, batch, config), vectors, scale


@functools.partial(jax.jit, static_argnames=("towers", "config"))
def _pulled_back(params, batch, wanted, towers, config):
    _, pull = jax.vjp(lambda p: _outputs(p, batch, towers, config), params)
    return pull(wanted)[0]


def _reading(config):
    """What of the config the towers read: one program for all banks, tiles, slices and weights."""
    loss = dataclasses.replace(config.loss, tile_mib=0.0, nsp_ramp_steps=0, nsp_ramp_from=0.0)
    return dataclasses.replace(config, bank=BankConfig(), loss=loss, micro_batches=1)


def objective(params, batch, bank, step: int, towers, config):
    """The total of `cosup.loss` and its gradient, on one device, by the loops above."""

    read = {"towers": towers, "config": _reading(config)}
    logits, query_BxRxD, vector_UxPxD, scale = _outputs(params, batch, **read)
    flat = lambda x: np.asarray(x).reshape(-1, np.shape(x)[-1])
    owned = towers.gen.vocab_size
    weights = np.ravel(batch.ntp_weights_BxT)
    nats, count, grad = ntp(flat(logits)[:, :owned], np.ravel(batch.ntp_targets_BxT), weights)
    grad_logits = np.zeros(flat(logits).shape)
    grad_logits[:, :owned] = config.loss.ntp_weight * grad / max(count, 1)
    positives = batch.ret_positives_BxRxSx2
    asked = Queries(
        flat(query_BxRxD),
        positives.reshape(-1, *positives.shape[2:]),
        np.ravel(batch.ret_valid_BxR),
    )
    value, *grads = vector_loss(
        asked,
        flat(vector_UxPxD),
        flat(batch.passage_ids_UxPx2),
        np.ravel(batch.passage_valid_UxP),
        bank,
        step,
        float(scale.temperature),
        float(scale.bias),
        config,
    )
    weight = float(cosup.nsp_weight(step, config.loss))
    shaped = lambda grad, like: jnp.asarray(grad, jnp.float32).reshape(np.shape(like))
    outer = [weight * grad for grad in grads]
    wanted = (
        shaped(grad_logits, logits),
        shaped(outer[0], query_BxRxD),
        shaped(outer[1], vector_UxPxD),
        Scale(jnp.float32(outer[2]), jnp.float32(outer[3])),
    )
    pulled = _pulled_back(params, batch, wanted, **read)
    return config.loss.ntp_weight * nats / max(count, 1) + weight * value, pulled
