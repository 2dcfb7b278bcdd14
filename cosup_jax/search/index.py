"""Exact maximum inner product search over passage vectors, a stretch of the corpus at a time.

The best rows of a stretch are merged into the best so far: [queries x corpus] never exists. Sorting
is what is slow, so a stretch is cut into blocks of rows, and only the k blocks of largest maximum
are looked into: a row among the k best lies in one of them, as k maxima precede all in any other.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cosup_jax.errors import UserError
from cosup_jax.runtime.notices import safepoint
from cosup_jax.sharding import AXES

BLOCK = 128  # rows of which the largest score is taken first
QUERIES = 256  # scored together
STRETCH_BYTES = 2**24  # of the scores of a stretch
TILE_BYTES = 2**20  # of scores that a CPU's cache holds between product and maxima
CHUNK_BYTES = 2**28  # of float32 vectors sent to a device at once


class Stored(NamedTuple):
    """Vectors as they are kept: row i is vectors[i] * scales[i]."""

    vectors: np.ndarray | jax.Array  # [N, D] float32, bfloat16 or int8
    scales: np.ndarray | jax.Array | None = None  # [N] float32; None: all 1

    def floats(self) -> np.ndarray:
        """[N, D] float32."""
        vector_NxD = self.vectors.astype(np.float32)
        return vector_NxD if self.scales is None else vector_NxD * self.scales[:, None]


class Corpus(Protocol):
    """What `search` reads besides arrays: `vectors.Vectors`."""

    width: int

    def __len__(self) -> int: ...

    def chunks(self, rows: int) -> Iterator[Stored]:
        """All rows in order, at most `rows` at a time."""
        ...


class Resident(NamedTuple):
    """A corpus that lies on the devices, as `resident` puts it there."""

    stored: Stored  # the devices share its rows, of which the last may be padding
    rows: int


class Best(NamedTuple):
    """The best rows so far, best first, and of equal scores the lower row first."""

    scores_QxK: np.ndarray | jax.Array  # float32; -inf where there is no row
    rows_QxK: np.ndarray | jax.Array  # int32


def resident(corpus_NxD: np.ndarray, mesh: Mesh | None = None) -> jax.Array | Resident:
    """A corpus in memory for many searches on a mesh: it travels to the devices once."""
    if mesh is None or mesh.size == 1:
        return jax.device_put(corpus_NxD)
    return Resident(_placed(Stored(corpus_NxD), 1, mesh), len(corpus_NxD))


def search(
    query_QxD: np.ndarray | jax.Array,
    corpus: np.ndarray | jax.Array | Corpus | Resident,
    k: int,
    mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of largest dot product with each query: scores float32 and rows int64, [Q, k].

    Best first, equal scores by row. Scores are float32 products with the vectors as they are kept:
    exact over bfloat16 vectors, and over int8 ones times their scale. Where there are fewer than k
    rows, row is -1 and score -inf; a row whose score is no number is never found.

    Args:
      corpus: an array [N, D], what `resident` made of one, or vectors on disk, of which one chunk
        travels to the devices while another is searched.
      mesh: its devices share the rows of the corpus; None: one device has them all.

    Raises:
      UserError: more rows than 32 bits count.
    """
    query_QxD = np.asarray(query_QxD, np.float32)
    mesh = mesh if mesh and mesh.size > 1 else None
    count = corpus.rows if isinstance(corpus, Resident) else len(corpus)
    if count >= 2**31:
        raise UserError(f"{count:,} vectors are too many for one search; split the index")
    if not len(query_QxD) or not count:
        scores, rows = _nothing(len(query_QxD), k)
        return scores, rows.astype(np.int64)
    queries = _blocks(query_QxD, mesh)
    best = [Best(*(_put(x, mesh, P()) for x in _nothing(len(queries[0]), k)))] * len(queries)
    for chunk in _chunks(corpus, len(queries[0]), mesh):
        pairs = zip(best, queries, strict=True)
        merged = [_merge(*pair, *chunk, mesh) for pair in pairs]
        jax.block_until_ready(best)  # else all chunks would be sent at once
        best = merged
    scores, rows = map(np.concatenate, zip(*jax.device_get(best), strict=True))
    return scores[: len(query_QxD)], rows[: len(query_QxD)].astype(np.int64)


def _blocks(query_QxD: np.ndarray, mesh: Mesh | None) -> list[jax.Array]:
    """At most QUERIES at a time, padded to powers of two: a few compiled shapes serve all."""
    size = min(QUERIES, 1 << (len(query_QxD) - 1).bit_length())
    query_QxD = np.pad(query_QxD, ((0, -len(query_QxD) % size), (0, 0)))
    return [_put(part, mesh, P()) for part in np.split(query_QxD, len(query_QxD) // size)]


def _nothing(queries: int, k: int) -> Best:
    return Best(np.full((queries, k), -np.inf, np.float32), np.full((queries, k), -1, np.int32))


class _Chunk(NamedTuple):
    """A part of the corpus on the devices."""

    stored: Stored
    first: int  # row of the corpus that its own row 0 is
    rows: int  # how many of its rows count


def _chunks(corpus, queries: int, mesh: Mesh | None) -> Iterator[_Chunk]:
    """All rows, each in one chunk."""
    if isinstance(corpus, Resident):
        yield _Chunk(corpus.stored, 0, corpus.rows)
        return
    in_memory, on_cpu = hasattr(corpus, "shape"), mesh is None and jax.default_backend() == "cpu"
    if in_memory and not on_cpu:
        yield _Chunk(_placed(Stored(corpus), 1, mesh), 0, len(corpus))
        return
    unit = BLOCK * (mesh.size if mesh else 1)
    # On a CPU a stretch is a chunk, a view for which nothing is copied.
    rows = _stretch_rows(queries) if on_cpu else CHUNK_BYTES * unit // (4 * BLOCK * corpus.width)
    parts = [Stored(np.asarray(corpus))] if in_memory else corpus.chunks(max(rows, unit))
    first = 0
    for part in parts:
        count = len(part.vectors)
        whole = count // unit * unit
        for start, stop in itertools.pairwise(sorted({*range(0, whole, rows), whole, count})):
            cut = Stored(*(x if x is None else x[start:stop] for x in part))
            yield _Chunk(_placed(cut, unit, mesh), first + start, stop - start)
        first += count


def _stretch_rows(queries: int) -> int:
    return max(STRETCH_BYTES // (4 * queries * BLOCK), 1) * BLOCK


def _placed(stored: Stored, unit: int, mesh: Mesh | None) -> Stored:
    """On the devices, which share the rows; padded to a multiple of `unit` and of the devices."""
    unit = max(unit, mesh.size if mesh else 1)

    def place(x):
        if short := -len(x) % unit:
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
    best: Best, query_QxD: jax.Array, stored: Stored, first: int, rows: int, mesh: Mesh | None
) -> Best:
    """`best` and a chunk."""
    k = best.scores_QxK.shape[1]
    if mesh is None:
        found = _best_rows(query_QxD, stored, rows, k)
        return _top(best, Best(found.scores_QxK, found.rows_QxK + first))
    own = len(stored.vectors) // mesh.size

    def on_device(query_QxD, stored, rows):
        before = jax.lax.axis_index(AXES) * own
        found = _best_rows(query_QxD, stored, rows - before, k)
        found = Best(found.scores_QxK, found.rows_QxK + before)
        return jax.tree.map(lambda x: jax.lax.all_gather(x, AXES, axis=1, tiled=True), found)

    found = jax.shard_map(
        on_device, mesh=mesh, in_specs=(P(), P(AXES), P()), out_specs=P(), check_vma=False
    )(query_QxD, stored, rows)
    return _top(best, Best(found.scores_QxK, found.rows_QxK + first))


def _best_rows(query_QxD: jax.Array, stored: Stored, rows, k: int) -> Best:
    """The best of the first `rows` rows, or of all that there are, on one device.

    All products are of whole blocks of rows: copies would not tie if some were summed otherwise.
    """
    Q, N = len(query_QxD), len(stored.vectors)
    rows = jnp.minimum(rows, N)
    stretches = -(-N // _stretch_rows(Q))
    n = -(-N // (stretches * BLOCK)) * BLOCK
    if n >= N:
        pad = lambda x: jnp.pad(x, [(0, n - N)] + [(0, 0)] * (x.ndim - 1))
        return _best_of_stretch(query_QxD, jax.tree.map(pad, stored), 0, 0, rows, k)

    def stretch(number, best):
        first = number * n
        at = jnp.minimum(first, N - n)  # one shape: the last reaches back
        cut = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, at, n), stored)
        return _top(best, _best_of_stretch(query_QxD, cut, at, first, rows, k))

    return jax.lax.fori_loop(0, stretches, stretch, jax.tree.map(jnp.asarray, _nothing(Q, k)))


def _best_of_stretch(query_QxD: jax.Array, stored: Stored, at, start, stop, k: int) -> Best:
    """The best of the rows start .. stop - 1 in a stretch whose own first row is `at`."""
    Q, n = len(query_QxD), len(stored.vectors)
    row_bxB = at + jnp.arange(n).reshape(-1, BLOCK)

    def searched(scores, rows):
        wanted = (rows >= start) & (rows < stop) & ~jnp.isnan(scores)
        return jnp.where(wanted, scores, -jnp.inf)

    def tile(stored, row_bxB):
        score_bxBxQ = _scores(stored, query_QxD).reshape(-1, BLOCK, Q)
        return score_bxBxQ, jnp.max(searched(score_bxBxQ, row_bxB[:, :, None]), axis=1)

    tiles = _tiles(n, Q)
    if tiles == 1:
        score_bxBxQ, max_bxQ = tile(stored, row_bxB)
    else:
        cut = lambda x: x.reshape(tiles, -1, *x.shape[1:])
        found = jax.lax.map(lambda part: tile(*part), jax.tree.map(cut, (stored, row_bxB)))
        score_bxBxQ, max_bxQ = (x.reshape(-1, *x.shape[2:]) for x in found)
    max_Qxb = max_bxQ.T
    _, block_Qxk = jax.lax.top_k(max_Qxb, min(k, max_Qxb.shape[1]))
    block_Qxk = jnp.sort(block_Qxk, axis=1)  # so that equal scores stay in order of rows
    row_QxkB = row_bxB[block_Qxk].reshape(Q, -1)
    score_QxkB = score_bxBxQ[block_Qxk, :, jnp.arange(Q)[:, None]].reshape(Q, -1)
    return _top(_nothing(Q, k), Best(searched(score_QxkB, row_QxkB), row_QxkB))


def _tiles(rows: int, queries: int) -> int:
    """In how many products a stretch is scored.

    One, as each cut is a copy, but where a CPU multiplies for so long that the copy is nothing.
    """
    most = TILE_BYTES // (4 * queries * BLOCK) * BLOCK
    cuts = queries >= 128 and jax.default_backend() == "cpu" and most and rows % most == 0
    return rows // most if cuts else 1


def _top(best: Best, found: Best) -> Best:
    """The best of both; `found` are later rows, and in such order that equal scores are by row.

    As `best` starts as rows -1 of score -inf, no other row of that score comes up.
    """
    score, row = (jnp.concatenate(pair, axis=1) for pair in zip(best, found, strict=True))
    score_QxK, at_QxK = jax.lax.top_k(score, best.scores_QxK.shape[1])  # equal ones in order
    return Best(score_QxK, jnp.take_along_axis(row, at_QxK, axis=1))


def _scores(stored: Stored, query_QxD: jax.Array) -> jax.Array:
    """[n, Q]"""
    score_nxQ = _dot("nd,qd->nq", stored.vectors.astype(jnp.float32), query_QxD)
    return score_nxQ if stored.scales is None else score_nxQ * stored.scales[:, None]


@jax.jit
def _ranks(query_QxD: jax.Array, corpus_NxD: jax.Array, gold_Q: jax.Array) -> jax.Array:
    Q, N = len(query_QxD), len(corpus_NxD)
    n = min(_stretch_rows(Q), -(-max(N, Q) // BLOCK) * BLOCK)
    pad = lambda x_rxD: jnp.pad(x_rxD, ((0, max(n - len(x_rxD), 0)), (0, 0)))
    corpus_NxD, score = pad(corpus_NxD), lambda x_nxD: _scores(Stored(x_nxD), query_QxD)
    # A product of the same shape as the others, so that copies tie.
    own_1xQ = jnp.diagonal(score(pad(corpus_NxD[gold_Q])))[None]

    def stretch(number, ahead_Q):
        first = number * n
        at = jnp.minimum(first, len(corpus_NxD) - n)  # one shape: the last reaches back
        row_nx1 = at + jnp.arange(n)[:, None]
        score_nxQ = score(jax.lax.dynamic_slice_in_dim(corpus_NxD, at, n))
        ahead_nxQ = (score_nxQ > own_1xQ) | ((score_nxQ == own_1xQ) & (row_nx1 < gold_Q[None]))
        counts_nx1 = (row_nx1 >= first) & (row_nx1 < N)
        return ahead_Q + jnp.sum((ahead_nxQ | jnp.isnan(own_1xQ)) & counts_nx1, axis=0)

    return 1 + jax.lax.fori_loop(0, -(-N // n), stretch, jnp.zeros(Q, jnp.int32))


def ranks(query_QxD, corpus_NxD, gold_Q: np.ndarray, block: int = QUERIES) -> np.ndarray:
    """Rank, from 1, of each query's gold row among all N rows of the corpus; ties as in `search`,
    and N + 1 where its score is no number.

    `block` queries at a time, and stretch by stretch of the corpus.
    """
    found, corpus_NxD = np.zeros(len(gold_Q), np.int64), jax.device_put(corpus_NxD)
    for start in range(0, len(gold_Q), block):
        safepoint()
        rows = np.arange(start, start + block) % len(gold_Q)  # one compiled shape
        part = _ranks(np.asarray(query_QxD)[rows], corpus_NxD, gold_Q[rows])
        stop = min(start + block, len(gold_Q))
        found[start:stop] = np.asarray(part)[: stop - start]
    return found


def _dot(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, precision=jax.lax.Precision.HIGHEST)
