"""Every query against every candidate passage, a tile at a time, forward and backward.

Positives are found by identity, wherever they lie. Float32 inside; shapes by the letters of
`data/batch.py`.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from cosup_jax.sharding import constrain, parts_here

NEVER = -1e30  # score of a masked candidate; finite, so that masked rows have finite gradients
EMPTY = -1  # step of a column that holds nothing


class Queries(NamedTuple):
    """Rows of the contrastive loss."""

    vector_QxD: jax.Array
    positives_QxSx2: jax.Array  # uint32; [:, 0] is the query's passage, the rest its siblings
    valid_Q: jax.Array  # bool


@flax.struct.dataclass
class Candidates:
    """Columns of the contrastive loss, in K blocks of C; live ones in one block.

    A column counts if it was written at step `since` or later, unless its identity is also among
    `newer`. No identity may count twice among all the columns that one loss is computed over.
    """

    vector_KxCxD: jax.Array  # as `in_float32` reads them
    id_KxCx2: jax.Array  # uint32
    step_KxC: jax.Array  # int32, the step that wrote the column, or EMPTY
    since: jax.Array  # int32, 0 or more
    newer_Nx2: jax.Array | None = None  # uint32
    # uint32: what queries ask for. Where it is given, a column is a negative as often as it is in
    # there, at least once; of those whose own it is, once less.
    asked_Nx2: jax.Array | None = None
    # Live: whole on every device, with gradient. Stored: split over C, without gradient.
    stored: bool = flax.struct.field(pytree_node=False, default=False)


class Scale(NamedTuple):
    """From similarity to score: divided by the temperature, plus the bias."""

    temperature: jax.Array
    bias: jax.Array  # 0 under softmax

    @property
    def slope(self) -> jax.Array:
        """1 / temperature: what tiles of scores are multiplied by, and not divided."""
        return 1 / self.temperature


class How(NamedTuple):
    """How rows are scored; static."""

    contrastive: str = "softmax"  # or sigmoid
    # A negative whose similarity exceeds the positive's by more is masked as a likely false one
    # (Qwen3-Embedding, arXiv 2506.05176); None = off.
    margin: float | None = None
    tile_bytes: int = 0  # what a device may spend on a tile's scores; 0 = everything in one tile
    # False: no gradient for the scale from rows other than the live ones over stored columns, which
    # saves them the backward pass.
    learn_scale: bool = True


class Scores(NamedTuple):
    """What one query needs to know of a set of candidates, each [Q]; `merge` joins two sets."""

    negatives: jax.Array  # softmax: log-sum-exp of their scores; sigmoid: sum of their softplus
    positive: jax.Array  # score of the query's passage; NEVER where it is not a candidate
    best_negative: jax.Array
    count: jax.Array  # int32, negatives that count
    siblings: jax.Array  # int32, candidates masked as other positives of the same example
    too_close: jax.Array  # int32, negatives masked by the margin
    copies: jax.Array  # int32, stored columns masked as a newer copy is live


def same(a_x2: jax.Array, b_x2: jax.Array) -> jax.Array:
    """Whether two identities are equal; broadcasts over leading axes."""
    return (a_x2[..., 0] == b_x2[..., 0]) & (a_x2[..., 1] == b_x2[..., 1])


def in_float32(vectors: jax.Array) -> jax.Array:
    """Vectors as numbers; uint16 are the bits of bfloat16 (see `bank.Ring`)."""
    if vectors.dtype == jnp.uint16:
        vectors = jax.lax.bitcast_convert_type(vectors, jnp.bfloat16)
    return vectors.astype(jnp.float32)


def largest_divisor(n: int, most: int) -> int:
    """The largest divisor of `n` that is at most `most`; 1 if `most` is less."""
    return max(d for d in range(1, n + 1) if n % d == 0 and d <= max(most, 1))


def first_of_each(id_Cx2: jax.Array, valid_C: jax.Array) -> jax.Array:
    """`valid_C` without the later copies of an identity: a passage counts once."""
    place_C = jnp.arange(valid_C.shape[0])
    keys = (id_Cx2[:, 0], id_Cx2[:, 1], ~valid_C, place_C)  # valid ones first among equals
    first_C, second_C, _, order_C = jax.lax.sort(keys, num_keys=4)
    again_C = (first_C[1:] == first_C[:-1]) & (second_C[1:] == second_C[:-1])
    copy_C = jnp.zeros_like(valid_C).at[order_C[1:]].set(again_C)
    return valid_C & ~copy_C


def merge(a: Scores, b: Scores, contrastive: str) -> Scores:
    """Scores over the union of two disjoint sets of candidates."""
    join = jnp.logaddexp if contrastive == "softmax" else jnp.add
    return Scores(
        join(a.negatives, b.negatives),
        jnp.maximum(a.positive, b.positive),
        jnp.maximum(a.best_negative, b.best_negative),
        *(x + y for x, y in zip(a[3:], b[3:], strict=True)),
    )


def scores(
    rows: Sequence[Queries],
    columns: Sequence[Candidates],
    scale: Scale,
    how: How,
    ceilings: Sequence[jax.Array],
) -> list[Scores]:
    """Scores of each of `rows` over the union of `columns`.

    A negative that scores above its row's ceiling [Q] is masked. Scores exist a tile at a time; the
    backward pass keeps one number per query. `rows` are the live queries, then any others, which
    get no gradient over stored columns.
    """
    found = []
    for candidates in columns:
        one = _over_stored if candidates.stored else _over_live
        found.append(one(rows, candidates, scale, how, ceilings))
    join = functools.partial(merge, contrastive=how.contrastive)
    return [functools.reduce(join, parts) for parts in zip(*found, strict=True)]


def _over_live(rows, candidates: Candidates, scale, how: How, ceilings) -> list[Scores]:
    found = []
    for queries, ceiling_Q in zip(rows, ceilings, strict=True):
        queries = Queries(*(constrain(x, "batch", *[None] * (x.ndim - 1)) for x in queries))
        walk = _walk(queries, candidates, how)
        found.append(_score(walk, queries, candidates, scale, ceiling_Q))
    return found


def _over_stored(rows, candidates: Candidates, scale, how: How, ceilings) -> list[Scores]:
    """All rows, whole, meet the stored columns where those lie, in one walk: of two walks at once
    each would want a bank of its own."""
    whole = lambda x: constrain(x, *[None] * x.ndim)
    joined = lambda *parts: jnp.concatenate([whole(part) for part in parts])
    together = Queries(*map(joined, *rows))
    ends = np.cumsum([len(queries.valid_Q) for queries in rows])
    walk = _walk(together, candidates, how, int(ends[-1] if how.learn_scale else ends[0]))
    scores = _score(walk, together, candidates, scale, joined(*ceilings))
    parts = [[whole(part) for part in jnp.split(whole(x), ends[:-1])] for x in scores]
    return [Scores(*part) for part in zip(*parts, strict=True)]


# Below, W is the number of parts that the mesh splits stored columns into, and a tile has G blocks
# of C columns in each part. Sums are kept per part and joined after the last tile, so that no
# collective runs in the loop over the tiles.


class _Walk(NamedTuple):
    """How the columns are walked through; static."""

    contrastive: str
    tiles: int
    parts: int  # W
    learned: int  # over stored columns: queries with a backward pass; the rest have none


def _walk(queries: Queries, candidates: Candidates, how: How, learned: int = 0) -> _Walk:
    """Stored columns: a few whole blocks a tile. Live ones: a stretch of the one block."""
    K, C, D = candidates.vector_KxCxD.shape
    Q = len(queries.valid_Q)
    parts = parts_here(C) if candidates.stored else 1
    rows_here = Q if candidates.stored else Q // parts_here(Q)
    columns_here = how.tile_bytes // (4 * (rows_here + D)) if how.tile_bytes else K * C
    if not candidates.stored:
        return _Walk(how.contrastive, -(-C // min(max(columns_here, 1), C)), 1, 0)
    tiles = K // largest_divisor(K, columns_here * parts // C)
    return _Walk(how.contrastive, tiles, parts, learned)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _score(walk: _Walk, queries, candidates, scale, ceiling_Q) -> Scores:
    return _forward(walk, queries, candidates, scale, ceiling_Q)[0]


def _forward(walk: _Walk, queries, candidates, scale, ceiling_Q):
    softmax = walk.contrastive == "softmax"
    shape = (queries.valid_Q.shape[0], walk.parts)

    def body(carry, tile):
        tile = _in_parts(walk, tile)
        score, own, negative, times, *masked = _compare(queries, candidates, tile, scale, ceiling_Q)
        over = (1, 3)
        unmasked = lambda where: jnp.where(where, score, NEVER)
        count = lambda where: jnp.sum(where, over, dtype=jnp.int32)
        here = Scores(
            jax.nn.logsumexp(_weighed(score, times), over)
            if softmax
            else jnp.sum(times * jax.nn.softplus(score), over),
            jnp.max(unmasked(own), over),
            jnp.max(unmasked(negative), over),
            *map(count, (negative, *masked)),
        )
        return merge(carry, here, walk.contrastive), None

    never, none = jnp.full(shape, NEVER), jnp.zeros(shape, jnp.int32)
    start = Scores(never if softmax else jnp.zeros(shape), never, never, *[none] * 4)
    found, _ = _scan(body, start, _tiles(walk, candidates))
    joined = Scores(
        jax.nn.logsumexp(found.negatives, 1) if softmax else jnp.sum(found.negatives, 1),
        jnp.max(found.positive, 1),
        jnp.max(found.best_negative, 1),
        *(jnp.sum(x, 1) for x in found[3:]),
    )
    return joined, (queries, candidates, scale, ceiling_Q, joined.negatives)


def _backward(walk: _Walk, kept, grads: Scores):
    queries, candidates, scale, ceiling_Q, negatives_Q = kept
    everything = queries
    if candidates.stored:
        queries, ceiling_Q, negatives_Q, grads = jax.tree.map(
            lambda x: x[: walk.learned], (queries, ceiling_Q, negatives_Q, grads)
        )
    per_row = lambda x_Q: x_Q[:, None, None, None]
    rows_QxD = _rows(queries)

    def body(carry, tile):
        tile = _in_parts(walk, tile)
        score, own, _, times, *_ = _compare(queries, candidates, tile, scale, ceiling_Q)
        if walk.contrastive == "softmax":
            share = jnp.exp(_weighed(score - per_row(negatives_Q), times))
        else:
            share = times * jax.nn.sigmoid(score)
        pull_QxGxWxC = share * per_row(grads.negatives) + own * per_row(grads.positive)
        vector_GxWxCxD, *_ = _columns(candidates, tile)
        product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        grad_rows_QxWxD, grad_temperature_QxW, grad_bias_QxW = carry
        carry = (
            grad_rows_QxWxD + product("qgwc,gwcd->qwd", pull_QxGxWxC, vector_GxWxCxD),
            grad_temperature_QxW + jnp.sum(pull_QxGxWxC * (score - scale.bias), (1, 3)),
            grad_bias_QxW + jnp.sum(pull_QxGxWxC, (1, 3)),
        )
        if candidates.stored:
            return carry, None
        return carry, product("qgwc,qd->gwcd", pull_QxGxWxC, rows_QxD)

    (Q, D), W = queries.vector_QxD.shape, walk.parts
    start = (jnp.zeros((Q, W, D)), jnp.zeros((Q, W)), jnp.zeros((Q, W)))
    sums, grad_tiles = _scan(body, start, _tiles(walk, candidates))
    grad_rows_QxWxD, grad_temperature_QxW, grad_bias_QxW = sums
    grad_rows_QxD = jnp.sum(grad_rows_QxWxD, axis=1) * scale.slope
    unlearned = everything.vector_QxD.shape[0] - Q
    grad_rows_QxD = jnp.pad(grad_rows_QxD, ((0, unlearned), (0, 0)))
    grad_queries = Queries(grad_rows_QxD.astype(queries.vector_QxD.dtype), None, None)
    grad_scale = Scale(
        -jnp.sum(grad_temperature_QxW) / scale.temperature,
        jnp.sum(grad_bias_QxW),
    )
    if candidates.stored:
        return grad_queries, None, grad_scale, None
    K, C, _ = candidates.vector_KxCxD.shape
    grad_CxD = grad_tiles.reshape(-1, D)[:C] * scale.slope
    none = dict.fromkeys(("id_KxCx2", "step_KxC", "since", "asked_Nx2"))
    grad_columns = candidates.replace(vector_KxCxD=grad_CxD.reshape(K, C, D), **none)
    return grad_queries, grad_columns, grad_scale, None


_score.defvjp(_forward, _backward)


def _compare(queries: Queries, candidates: Candidates, tile, scale: Scale, ceiling_Q):
    """Scores [Q, G, W, C] of a tile, and who is what: own, negative, a negative how many times, and
    masked as sibling, as too close, as a copy."""
    _, id_GxWxCx2, _ = tile
    vector_GxWxCxD, valid_GxWxC, copy_GxWxC = _columns(candidates, tile)
    similarity = jnp.einsum(
        "qd,gwcd->qgwc", _rows(queries), vector_GxWxCxD, precision=jax.lax.Precision.HIGHEST
    )
    score = similarity * scale.slope + scale.bias
    is_the = lambda s: same(queries.positives_QxSx2[:, s][:, None, None, None], id_GxWxCx2[None])
    own = is_the(0) & valid_GxWxC[None]
    sibling = jnp.zeros_like(own)
    for s in range(1, queries.positives_QxSx2.shape[1]):
        sibling |= is_the(s)
    other = ~own & valid_GxWxC[None]
    too_close = other & ~sibling & (score > ceiling_Q[:, None, None, None])
    copy = jnp.broadcast_to(copy_GxWxC[None], own.shape)
    negative = times = other & ~sibling & ~too_close
    if candidates.asked_Nx2 is not None:
        asked_1xGxWxC = jnp.sum(_each(id_GxWxCx2, candidates.asked_Nx2), axis=-1)[None]
        times = jnp.where(own, asked_1xGxWxC - 1, negative * jnp.maximum(asked_1xGxWxC, 1))
    return score, own, negative, times, other & sibling, too_close, copy


def _each(id_GxWxCx2: jax.Array, known_Nx2: jax.Array) -> jax.Array:
    """[G, W, C, N] which columns are which of the known identities."""
    return same(id_GxWxCx2[:, :, :, None], known_Nx2[None, None, None])


def _weighed(score, times) -> jax.Array:
    """log(times * exp(score)); `times` is a bool, or a number."""
    if times.dtype != bool:
        score = score + jnp.log(jnp.maximum(times, 1))
    return jnp.where(times > 0, score, NEVER)


def _rows(queries: Queries) -> jax.Array:
    vector_QxD = queries.vector_QxD.astype(jnp.float32)
    return jnp.where(queries.valid_Q[:, None], vector_QxD, 0.0)  # a NaN on padding stays there


def _columns(candidates: Candidates, tile) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Vectors [G, W, C, D] of a tile in float32, which of its columns count, and which would but
    for a newer copy."""
    vector_GxWxCxD, id_GxWxCx2, step_GxWxC = tile
    valid_GxWxC = step_GxWxC >= candidates.since
    copy_GxWxC = jnp.zeros_like(valid_GxWxC)
    if candidates.newer_Nx2 is not None:
        copy_GxWxC = valid_GxWxC & jnp.any(_each(id_GxWxCx2, candidates.newer_Nx2), axis=-1)
        valid_GxWxC &= ~copy_GxWxC
    vector_GxWxCxD = jnp.where(valid_GxWxC[..., None], in_float32(vector_GxWxCxD), 0.0)
    return vector_GxWxCxD, valid_GxWxC, copy_GxWxC


def _tiles(walk: _Walk, candidates: Candidates) -> tuple[jax.Array, ...]:
    """Vectors, identities and steps, each [tiles, G, W * C, ...]."""

    def cut(x, fill):
        if not candidates.stored:
            padding = [(0, 0), (0, -x.shape[1] % walk.tiles)] + [(0, 0)] * (x.ndim - 2)
            x = jnp.pad(x, padding, constant_values=fill)
            return x.reshape(walk.tiles, 1, -1, *x.shape[2:])
        return x.reshape(walk.tiles, -1, *x.shape[1:])

    fields = (candidates.vector_KxCxD, 0), (candidates.id_KxCx2, 0), (candidates.step_KxC, EMPTY)
    return tuple(cut(x, fill) for x, fill in fields)


def _in_parts(walk: _Walk, tile) -> tuple[jax.Array, ...]:
    """A tile of `_tiles` as [G, W, C, ...]."""
    return tuple(x.reshape(x.shape[0], walk.parts, -1, *x.shape[2:]) for x in tile)


def _scan(body, start, tiles):
    """`lax.scan`, or the body alone if there is one tile: XLA's CPU loops are slow."""
    if tiles[0].shape[0] > 1:
        return jax.lax.scan(body, start, tiles)
    carry, out = body(start, jax.tree.map(lambda x: x[0], tiles))
    return carry, jax.tree.map(lambda x: x[None], out)
