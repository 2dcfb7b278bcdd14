"""Next-token prediction: cross-entropy over Gen's vocabulary, as (sum, weight) pairs.

Whoever calls divides, once, after the sum over the whole global batch. Float32 inside; shapes by
the letters of `data/batch.py`.
"""

import functools

import jax
import jax.numpy as jnp

from cosup_jax.sharding import constrain, parts_here

_LEAST_TILES = 8  # so that at most an eighth of the logits is of tokens without a target
_LANES = 128  # rows that a matrix unit takes at once; a tile is a multiple
_NEVER = -1e30  # logit of a vocabulary entry that no token owns; finite, so that gradients are


def ntp_sums(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
    """Weighted cross-entropy in nats, and the weight (arXiv 2403.09024, L_NTP).

    Args:
      logits: [..., V] float32.
      targets: [...] int32; any valid id where the weight is 0.
      weights: [...] float32, 1 where the target is supervised.
    """
    logits = jnp.where((weights > 0)[..., None], logits, 0.0)  # a NaN on padding stays there
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.sum(nats * weights), jnp.sum(weights)


def linear_ntp_sums(
    hidden_BxTxD: jax.Array,
    kernel_DxV: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
    vocab_size: int,
    tile_bytes: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """`ntp_sums` of `hidden @ kernel` that never holds the logits of more than one tile.

    Logits are computed about supervised tokens only, a tile at a time, and again in the backward
    pass, which keeps a log-sum-exp per token and nothing else (as Cut Cross-Entropy, arXiv
    2411.09009, by plain matrix products).

    Args:
      hidden_BxTxD: in the compute dtype, in which the products are taken; sums are float32.
      kernel_DxV: output embedding; columns from vocab_size on belong to no token.
      targets_BxT: int32; any valid id where the weight is 0.
      weights_BxT: float32, 1 where the target is supervised.
      tile_bytes: what one device may spend on the logits of a tile; 0 = everything in one tile.
    """
    B, T = weights_BxT.shape
    parts = parts_here(B)  # each device's rows by themselves: a tile moves none of them
    split = lambda x: constrain(
        x.reshape(parts, B // parts * T, *x.shape[2:]), "batch", *[None] * (x.ndim - 1)
    )
    tokens = B // parts * T
    row_bytes = 4 * _columns_here(kernel_DxV)
    tile = tokens
    if tile_bytes:
        fits = max(min(tile_bytes // row_bytes, -(-tokens // _LEAST_TILES)), 1)
        tile = min(tokens, fits // _LANES * _LANES or fits)
    nats = _nats(
        split(hidden_BxTxD), kernel_DxV, split(targets_BxT), split(weights_BxT), vocab_size, tile
    )
    return nats, jnp.sum(weights_BxT)


# Below, S is the number of parts that the mesh splits rows into, N the tokens of a part, and M the
# tokens of a tile.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _nats(hidden_SxNxD, kernel_DxV, targets_SxN, weights_SxN, vocab_size, tile):
    return _forward(hidden_SxNxD, kernel_DxV, targets_SxN, weights_SxN, vocab_size, tile)[0]


def _forward(hidden_SxNxD, kernel_DxV, targets_SxN, weights_SxN, vocab_size, tile):
    order_SxN, tiles = _supervised_first(weights_SxN, tile)
    tile_of = _tiles(order_SxN, tile, hidden_SxNxD, targets_SxN, weights_SxN)
    whole_DxV = _whole(kernel_DxV, hidden_SxNxD.dtype)

    def body(i, carry):
        nats_S, lse_SxN = carry
        hidden_SxMxD, targets_SxM, weights_SxM = tile_of(i)
        logits_SxMxV = _logits(hidden_SxMxD, whole_DxV, vocab_size)
        lse_SxM = jax.nn.logsumexp(logits_SxMxV, axis=-1)
        picked_SxM = jnp.sum(jnp.where(_is_target(targets_SxM, logits_SxMxV), logits_SxMxV, 0), -1)
        nats_S += jnp.sum(weights_SxM * (lse_SxM - picked_SxM), axis=1)
        return nats_S, jax.lax.dynamic_update_slice_in_dim(lse_SxN, lse_SxM, i * tile, axis=1)

    S, N = order_SxN.shape
    start = (jnp.zeros(S), jnp.zeros((S, N + -N % tile)))
    nats_S, lse_SxN = jax.lax.fori_loop(0, tiles, body, start)
    return jnp.sum(nats_S), (hidden_SxNxD, kernel_DxV, targets_SxN, weights_SxN, lse_SxN)


def _backward(vocab_size, tile, kept, grad):
    hidden_SxNxD, kernel_DxV, targets_SxN, weights_SxN, lse_SxN = kept
    order_SxN, tiles = _supervised_first(weights_SxN, tile)
    tile_of = _tiles(order_SxN, tile, hidden_SxNxD, targets_SxN, weights_SxN)
    dtype = hidden_SxNxD.dtype
    whole_DxV = _whole(kernel_DxV, dtype)

    def body(i, carry):
        grad_hidden_SxNxD, grad_kernel_SxDxV = carry
        hidden_SxMxD, targets_SxM, weights_SxM = tile_of(i)
        lse_SxM = jax.lax.dynamic_slice_in_dim(lse_SxN, i * tile, tile, axis=1)
        logits_SxMxV = _logits(hidden_SxMxD, whole_DxV, vocab_size)
        p_SxMxV = jnp.exp(logits_SxMxV - lse_SxM[..., None])
        pull_SxMxV = p_SxMxV - _is_target(targets_SxM, logits_SxMxV)
        pull_SxMxV = (pull_SxMxV * (grad * weights_SxM)[..., None]).astype(dtype)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        grad_hidden_SxMxD = product("smv,dv->smd", pull_SxMxV, whole_DxV).astype(dtype)
        grad_kernel_SxDxV += product("smd,smv->sdv", hidden_SxMxD, pull_SxMxV)
        grad_hidden_SxNxD = jax.lax.dynamic_update_slice_in_dim(
            grad_hidden_SxNxD, grad_hidden_SxMxD, i * tile, axis=1
        )
        return grad_hidden_SxNxD, grad_kernel_SxDxV

    (S, N), (D, V) = order_SxN.shape, kernel_DxV.shape
    # One sum of the kernel's gradient a part, added up after the loop: one collective, not many.
    start = (
        constrain(jnp.zeros((S, N + -N % tile, D), dtype), "batch", None, None),
        constrain(jnp.zeros((S, D, V)), "batch", None, "vocab"),
    )
    grad_hidden_SxNxD, grad_kernel_SxDxV = jax.lax.fori_loop(0, tiles, body, start)
    back_SxN = jnp.argsort(order_SxN, axis=1)[..., None]
    grad_hidden_SxNxD = jnp.take_along_axis(grad_hidden_SxNxD, back_SxN, axis=1)
    grad_kernel_DxV = constrain(jnp.sum(grad_kernel_SxDxV, axis=0), "embed", "vocab")
    return grad_hidden_SxNxD, grad_kernel_DxV.astype(kernel_DxV.dtype), None, None


_nats.defvjp(_forward, _backward)


def _whole(kernel_DxV: jax.Array, dtype) -> jax.Array:
    """The kernel in the compute dtype, gathered over fsdp once and not in every tile."""
    return constrain(kernel_DxV.astype(dtype), None, "vocab")


def _supervised_first(weights_SxN: jax.Array, tile: int) -> tuple[jax.Array, jax.Array]:
    """Order of each part's tokens, supervised ones first, and the tiles that hold any."""
    supervised_S = jnp.sum(weights_SxN > 0, axis=1)
    return jnp.argsort(weights_SxN <= 0, axis=1, stable=True), -(-jnp.max(supervised_S) // tile)


def _tiles(order_SxN: jax.Array, tile: int, hidden_SxNxD, targets_SxN, weights_SxN):
    """i -> (hidden [S, M, D], targets [S, M], weights [S, M]) of the i-th tile in `order_SxN`."""
    padded_SxN = jnp.pad(order_SxN, ((0, 0), (0, -order_SxN.shape[1] % tile)))
    real_N = jnp.arange(padded_SxN.shape[1]) < order_SxN.shape[1]

    def tile_of(i):
        rows_SxM = jax.lax.dynamic_slice_in_dim(padded_SxN, i * tile, tile, axis=1)
        real_1xM = jax.lax.dynamic_slice_in_dim(real_N, i * tile, tile)[None]
        pick = lambda x: jnp.take_along_axis(x, rows_SxM, axis=1)
        weights_SxM = jnp.where(real_1xM, pick(weights_SxN), 0.0)
        hidden_SxMxD = jnp.take_along_axis(hidden_SxNxD, rows_SxM[..., None], axis=1)
        hidden_SxMxD = jnp.where((weights_SxM > 0)[..., None], hidden_SxMxD, 0)  # NaN on padding
        return hidden_SxMxD, pick(targets_SxN), weights_SxM

    return tile_of


def _logits(hidden_SxMxD, kernel_DxV, vocab_size: int) -> jax.Array:
    logits_SxMxV = jnp.einsum(
        "smd,dv->smv", hidden_SxMxD, kernel_DxV, preferred_element_type=jnp.float32
    )
    owned_V = jnp.arange(kernel_DxV.shape[1]) < vocab_size
    return jnp.where(owned_V[None, None], logits_SxMxV, _NEVER)


def _is_target(targets_SxM, logits_SxMxV) -> jax.Array:
    """One-hot by comparison: a gather along a vocabulary that the mesh splits would move it."""
    return targets_SxM[..., None] == jnp.arange(logits_SxMxV.shape[-1])[None, None]


def _columns_here(kernel_DxV: jax.Array) -> int:
    """Vocabulary columns that one device holds."""
    mesh = jax.sharding.get_abstract_mesh()
    tensor = 1 if mesh.empty else mesh.shape["tensor"]
    return max(kernel_DxV.shape[1] // tensor, 1)
