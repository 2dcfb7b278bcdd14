"""Exact maximum inner product search over passage vectors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.jit, static_argnums=2)
def search(query_QxD: jax.Array, corpus_NxD: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k best rows of the corpus per query: scores [Q, k] and rows [Q, k], best first.

    Equal scores are ordered by row.
    """
    return jax.lax.top_k(_scores(query_QxD, corpus_NxD), k)


@jax.jit
def _ranks(query_QxD: jax.Array, corpus_NxD: jax.Array, gold_Q: jax.Array) -> jax.Array:
    score_QxN = _scores(query_QxD, corpus_NxD)
    own_Qx1 = jnp.take_along_axis(score_QxN, gold_Q[:, None], axis=1)
    earlier_QxN = jnp.arange(score_QxN.shape[1])[None] < gold_Q[:, None]
    ahead_QxN = (score_QxN > own_Qx1) | ((score_QxN == own_Qx1) & earlier_QxN)
    return 1 + jnp.sum(ahead_QxN, axis=1)


def ranks(query_QxD, corpus_NxD, gold_Q: np.ndarray, block: int = 256) -> np.ndarray:
    """Rank, from 1, of each query's gold row among all rows of the corpus; ties as in `search`."""
    found = np.zeros(len(gold_Q), np.int64)
    for start in range(0, len(gold_Q), block):
        rows = np.arange(start, start + block) % len(gold_Q)  # one compiled shape
        part = _ranks(np.asarray(query_QxD)[rows], corpus_NxD, gold_Q[rows])
        stop = min(start + block, len(gold_Q))
        found[start:stop] = np.asarray(part)[: stop - start]
    return found


def _scores(query_QxD: jax.Array, corpus_NxD: jax.Array) -> jax.Array:
    return jnp.einsum("qd,nd->qn", query_QxD, corpus_NxD, precision=jax.lax.Precision.HIGHEST)
