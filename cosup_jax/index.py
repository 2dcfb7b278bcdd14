"""Exact maximum inner product search over passage vectors, a tile at a time.

A corpus is scored in tiles, on a CPU small enough for its caches. Tiles make a stretch, whose best
rows are merged into the best so far: [queries x corpus] never exists. Sorting is what is slow, so a
stretch is cut into blocks of rows, and only the k blocks of largest maximum are looked into: a row
among the k best lies in one of them, as k maxima precede all that lie in another.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cosup_jax.errors import UserError
from cosup_jax.sharding import AXES

BLOCK = 128  # rows of which the largest score is taken first
QUERIES = 256  # scored together
TILE_BYTES = {"cpu": 2**21}  # of float32 vectors scored at once, by platform
OTHER_TILE_BYTES = 2**28
STRETCH_BYTES = 2**25  # of scores
CHUNK_BYTES = 2**28  # of float32 vectors sent to a device at once


class Stored(NamedTuple):
    """Vectors as they are kept: row i is vectors[i] * scales[i]."""

    vectors: np.ndarray | jax.Array  # [N, D] float32, bfloat16 or int8
    scales: np.ndarray | jax.Array | None = None  # [N] float32; None: all 1


class Corpus(Protocol):
    """What `search` reads besides arrays: `vectors.Vectors`."""

    width: int

    def __len__(self) -> int: ...

    def chunks(self, rows: int) -> Iterator[Stored]:
        """All rows in order, at most `rows` at a time."""
        ...


class Best(NamedTuple):
    """The best rows so far, best first, and of equal scores the lower row first."""

    scores_QxK: jax.Array  # float32; -inf where there is no row
    rows_QxK: jax.Array  # int32


def search(
    query_QxD: np.ndarray | jax.Array,
    corpus: np.ndarray | jax.Array | Corpus,
    k: int,
    mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of largest dot product with each query: scores float32 and rows int64, [Q, k].

    Best first, equal scores by row. Scores are float32 products with the vectors as they are kept:
    exact over bfloat16 vectors, and over int8 ones times their scale. Where there are fewer than k
    rows, row is -1 and score -inf; a row whose score is no number is never found.

    Args:
      corpus: an array [N, D], or vectors on disk, of which one chunk travels to the devices while
        another is searched.
      mesh: its devices share the rows of the corpus; None: one device has them all.

    Raises:
      UserError: more rows than 32 bits count.
    """
    query_QxD = np.asarray(query_QxD, np.float32)
    if len(corpus) >= 2**31:
        raise UserError(f"{len(corpus):,} vectors are too many for one search; split the index")
    if not len(query_QxD) or not len(corpus):
        shape = (len(query_QxD), k)
        return np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int64)
    queries = _blocks(query_QxD, mesh)
    nothing = Best(*(_put(np.asarray(x), mesh, P()) for x in _nothing(len(queries[0]), k)))
    best, first = [nothing] * len(queries), 0
    for chunk, rows in _chunks(corpus, mesh):
        merged = [
            _merge(*pair, chunk, first, rows, mesh) for pair in zip(best, queries, strict=True)
        ]
        jax.block_until_ready(best)  # else all chunks would be sent at once
        best, first = merged, first + rows
    scores, rows = map(np.concatenate, zip(*jax.device_get(best), strict=True))
    scores, rows = scores[: len(query_QxD)], rows[: len(query_QxD)].astype(np.int64)
    return scores, np.where(scores == -np.inf, -1, rows)


def _blocks(query_QxD: np.ndarray, mesh: Mesh | None) -> list[jax.Array]:
    """At most QUERIES at a time, padded to powers of two: a few compiled shapes serve all."""
    size = min(QUERIES, 1 << (len(query_QxD) - 1).bit_length())
    query_QxD = np.pad(query_QxD, ((0, -len(query_QxD) % size), (0, 0)))
    return [_put(part, mesh, P()) for part in np.split(query_QxD, len(query_QxD) // size)]


def _nothing(queries: int, k: int) -> Best:
    return Best(jnp.full((queries, k), -jnp.inf), jnp.full((queries, k), -1, jnp.int32))


def _chunks(corpus, mesh: Mesh | None) -> Iterator[tuple[Stored, int]]:
    """Rows on the devices, all chunks of one shape, and how many of them count."""
    parts = mesh.size if mesh else 1
    if hasattr(corpus, "shape"):
        whole = -(-len(corpus) // parts) * parts
        yield _placed(Stored(corpus), whole, mesh), len(corpus)
        return
    unit = BLOCK * parts
    rows = min(CHUNK_BYTES * parts // (4 * corpus.width), len(corpus))
    rows = max(rows // unit, 1) * unit
    for stored in corpus.chunks(rows):
        yield _placed(stored, rows, mesh), len(stored.vectors)


def _placed(stored: Stored, rows: int, mesh: Mesh | None) -> Stored:
    """Padded to `rows` rows, which the devices share."""

    def place(x):
        short = rows - len(x)
        if short:
            x = np.concatenate([np.asarray(x), np.zeros((short, *x.shape[1:]), x.dtype)])
        return _put(x, mesh, P(AXES))

    return Stored(*(x if x is None else place(x) for x in stored))


def _put(x: np.ndarray | jax.Array, mesh: Mesh | None, spec: P) -> jax.Array:
    if mesh is None:
        return jax.device_put(x)  # on a CPU no copy
    place = NamedSharding(mesh, spec)
    if isinstance(x, jax.Array):
        return jax.device_put(x, place)
    return jax.make_array_from_callback(x.shape, place, lambda index: x[index])


@functools.partial(jax.jit, static_argnames="mesh")
def _merge(
    best: Best, query_QxD: jax.Array, chunk: Stored, first: int, rows: int, mesh: Mesh | None
) -> Best:
    """`best` and the first `rows` rows of a chunk, whose own first row is `first` of the corpus."""
    k = best.scores_QxK.shape[1]
    if mesh is None:
        found = _best_rows(query_QxD, chunk, rows, k, jax.default_backend())
        return _top(best, Best(found.scores_QxK, found.rows_QxK + first))
    platform, own = mesh.devices.flat[0].platform, len(chunk.vectors) // mesh.size

    def on_device(query_QxD, chunk, rows):
        before = jax.lax.axis_index(AXES) * own
        found = _best_rows(query_QxD, chunk, jnp.clip(rows - before, 0, own), k, platform)
        found = found._replace(rows_QxK=found.rows_QxK + before)
        return jax.tree.map(lambda x: jax.lax.all_gather(x, AXES, axis=1, tiled=True), found)

    found = jax.shard_map(
        on_device, mesh=mesh, in_specs=(P(), P(AXES), P()), out_specs=P(), check_vma=False
    )(query_QxD, chunk, rows)
    return _top(best, Best(found.scores_QxK, found.rows_QxK + first))


def _best_rows(query_QxD: jax.Array, chunk: Stored, rows: jax.Array, k: int, platform: str) -> Best:
    """The best of the first `rows` rows, counted from 0, on one device."""
    Q, D = query_QxD.shape
    N = len(chunk.vectors)
    n = TILE_BYTES.get(platform, OTHER_TILE_BYTES) // (4 * D * BLOCK) * BLOCK
    n = min(max(n, BLOCK), -(-N // BLOCK) * BLOCK)  # rows of a tile
    if n > N:
        chunk = jax.tree.map(lambda x: jnp.pad(x, [(0, n - N)] + [(0, 0)] * (x.ndim - 1)), chunk)
        N = n
    most = max(STRETCH_BYTES // (4 * Q * n), 1)
    stretches = -(-N // (n * most))
    tiles = -(-N // (n * stretches))  # of a stretch

    def tile(first):
        """Scores of rows first .. first + n - 1; where those run out, the last n, partly masked."""
        start = jnp.minimum(first, N - n)
        cut = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, n), chunk)
        score_nxQ = _scores(cut, query_QxD)
        row_n = start + jnp.arange(n)
        wanted_n = (row_n >= first) & (row_n < rows)
        score_nxQ = jnp.where(wanted_n[:, None] & ~jnp.isnan(score_nxQ), score_nxQ, -jnp.inf)
        score_bxBxQ = score_nxQ.reshape(-1, BLOCK, Q)
        return start, score_bxBxQ, jnp.max(score_bxBxQ, axis=1)

    def stretch(number, best):
        firsts = (number * tiles + jnp.arange(tiles)) * n
        starts, scores, maxima = jax.lax.map(tile, firsts)
        first_b = (starts[:, None] + jnp.arange(0, n, BLOCK)[None]).reshape(-1)
        score_bxBxQ, max_Qxb = scores.reshape(-1, BLOCK, Q), maxima.reshape(-1, Q).T
        _, block_Qxk = jax.lax.top_k(max_Qxb, min(k, max_Qxb.shape[1]))
        block_Qxk = jnp.sort(block_Qxk, axis=1)  # so that equal scores stay in order of rows
        score_QxkxB = score_bxBxQ[block_Qxk, :, jnp.arange(Q)[:, None]]
        row_QxkxB = first_b[block_Qxk][:, :, None] + jnp.arange(BLOCK)[None, None]
        return _top(best, Best(score_QxkxB.reshape(Q, -1), row_QxkxB.reshape(Q, -1)))

    used = -(-rows // (n * tiles))
    return jax.lax.fori_loop(0, used, stretch, _nothing(Q, k))


def _top(best: Best, found: Best) -> Best:
    """The best of both; `found` are later rows, and in such order that equal scores are by row."""
    score, row = (jnp.concatenate(pair, axis=1) for pair in zip(best, found, strict=True))
    score_QxK, at_QxK = jax.lax.top_k(score, best.scores_QxK.shape[1])  # equal ones in order
    return Best(score_QxK, jnp.take_along_axis(row, at_QxK, axis=1))


def _scores(stored: Stored, query_QxD: jax.Array) -> jax.Array:
    """[n, Q]"""
    score_nxQ = _dot("nd,qd->nq", stored.vectors.astype(jnp.float32), query_QxD)
    return score_nxQ if stored.scales is None else score_nxQ * stored.scales[:, None]


@jax.jit
def _ranks(query_QxD: jax.Array, corpus_NxD: jax.Array, gold_Q: jax.Array) -> jax.Array:
    score_QxN = _dot("qd,nd->qn", query_QxD, corpus_NxD)
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


def _dot(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, precision=jax.lax.Precision.HIGHEST)
