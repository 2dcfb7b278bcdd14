"""What a token looks at: masks, attention within a row, and over a cache of keys and values.

B rows, T tokens, S slots, H query heads, G kv heads, E features of a head, N layers.
"""

import jax
import jax.numpy as jnp

from cosup_jax.model import fused

_CHUNKS = 4  # of a row's queries: 5/8 of the scores are computed
_NEVER = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite: a row without anything to see stays so


def mask(segments_BxT: jax.Array, causal: bool = True, window: int = 0) -> jax.Array:
    """[B, 1, T, T], True where row token t may look at token s."""
    T = segments_BxT.shape[1]
    key_BxT = segments_BxT[:, None, :]
    same = jnp.abs(segments_BxT)[:, :, None] == key_BxT  # a negative or zero key never matches > 0
    near = jnp.ones((T, T), bool)
    near = jnp.tril(near) if causal else near
    near &= jnp.triu(near, 1 - window) if window else near  # segments have no gaps
    return (same & (key_BxT > 0) & near[None])[:, None]


def attend(
    q_BxTxHxE, k_BxTxGxE, v_BxTxGxE, seen, kind: str, window: int = 0, causal: bool = True
) -> jax.Array:
    """[B, T, H, E]; `kind` as `fused.kernel` chooses it.

    `seen`: the mask [B, 1, T, T], for splash the segments [B, T]; `causal`: it has no later token.
    """
    parts = (q_BxTxHxE, k_BxTxGxE, v_BxTxGxE, seen)
    if kind == "splash":
        return fused.splash(*parts, window)
    if kind == "cudnn":
        return fused.cudnn(*parts)
    if causal:
        return _causal(*parts)
    return jax.nn.dot_product_attention(*parts[:3], mask=seen, implementation="xla")


@jax.checkpoint  # the backward pass computes the scores again
def _causal(q_BxTxHxE, k_BxTxGxE, v_BxTxGxE, mask_Bx1xTxT) -> jax.Array:
    """A chunk of queries at a time, over the keys up to its end: none of the others is seen."""
    T = q_BxTxHxE.shape[1]
    size = -(-T // _CHUNKS)
    k_BxGxExT, v_BxGxTxE = k_BxTxGxE.transpose(0, 2, 3, 1), v_BxTxGxE.transpose(0, 2, 1, 3)

    def chunk(start: int):
        own, seen = slice(start, start + size), slice(start + size)
        keys, values = k_BxGxExT[..., seen], v_BxGxTxE[:, :, seen]
        return _mix(q_BxTxHxE[:, own], keys, values, mask_Bx1xTxT[:, :, own, seen])

    return jnp.concatenate([chunk(start) for start in range(0, T, size)], axis=1)


def cache_mask(positions_BxT: jax.Array, slots: int, window: int = 0) -> jax.Array:
    """[B, 1, T, S], True where a token may look at a slot: slot s holds the token at position s."""
    slot_S, at_BxTx1 = jnp.arange(slots)[None, None], positions_BxT[:, :, None]
    seen_BxTxS = slot_S <= at_BxTx1
    seen_BxTxS &= slot_S > at_BxTx1 - window if window else True
    return seen_BxTxS[:, None]


def empty(layers: int, rows: int, heads: int, slots: int, features: int, dtype) -> dict:
    """A cache without a token: keys [N, B, G, E, S] and values [N, B, G, S, E].

    Both lie as the products need them: on a CPU that is several times as fast as [B, S, G, E].
    """
    return {
        "k": jnp.zeros((layers, rows, heads, features, slots), dtype),
        "v": jnp.zeros((layers, rows, heads, slots, features), dtype),
    }


def slots(cache: dict) -> int:
    """S of a cache, or of a dict of caches."""
    return cache["k"].shape[-1] if "k" in cache else slots(next(iter(cache.values())))


def cut(cache: dict, rows, reach: int) -> dict:
    """Some rows of a dict of caches, and the first `reach` slots of them."""
    take = {"k": lambda x: x[:, rows, :, :, :reach], "v": lambda x: x[:, rows, :, :reach]}
    return {name: {k: take[k](x) for k, x in part.items()} for name, part in cache.items()}


def paste(cache: dict, own: dict, rows) -> dict:
    """What `cut` gave, back in its place."""
    reach = slots(own)
    at = {"k": lambda x: x.at[:, rows, :, :, :reach], "v": lambda x: x.at[:, rows, :, :reach]}
    put = lambda name, k, x: at[k](x).set(own[name][k])
    return {name: {k: put(name, k, x) for k, x in part.items()} for name, part in cache.items()}


def put(cache: dict, layer, positions_BxT, k_BxTxGxE, v_BxTxGxE) -> dict:
    """A cache with a layer's keys and values at their slots; those beyond its slots are dropped."""
    rows_Bx1 = jnp.arange(len(positions_BxT))[:, None]
    k, v = cache["k"], cache["v"]
    k = k.at[layer, rows_Bx1, :, :, positions_BxT].set(k_BxTxGxE, mode="drop")
    v = v.at[layer, rows_Bx1, :, positions_BxT].set(v_BxTxGxE, mode="drop")
    return {"k": k, "v": v}


def recall(q_BxTxHxE, cache: dict, layer, mask_Bx1xTxS) -> jax.Array:
    """[B, T, H, E]: attention over the slots of a layer that the mask lets through."""
    return _mix(q_BxTxHxE, cache["k"][layer], cache["v"][layer], mask_Bx1xTxS)


def _mix(q_BxTxHxE, k_BxGxExS, v_BxGxSxE, mask_Bx1xTxS) -> jax.Array:
    """[B, T, H, E]: values, mixed by the softmax of the scores that the mask lets through.

    The query heads of a group, and their tokens, are the M rows of one matrix.
    """
    B, T, H, E = q_BxTxHxE.shape
    G = k_BxGxExS.shape[1]
    q_BxGxMxE = q_BxTxHxE.reshape(B, T, G, H // G, E).transpose(0, 2, 3, 1, 4).reshape(B, G, -1, E)
    score_BxGxMxS = jnp.einsum(
        "bgme,bges->bgms", q_BxGxMxE, k_BxGxExS, preferred_element_type=jnp.float32
    )
    score_BxGxhxTxS = score_BxGxMxS.reshape(B, G, H // G, T, -1) * E**-0.5
    score_BxGxhxTxS = jnp.where(mask_Bx1xTxS[:, :, None], score_BxGxhxTxS, _NEVER)
    most_BxGxhxTx1 = jax.lax.stop_gradient(jnp.max(score_BxGxhxTxS, axis=-1, keepdims=True))
    share_BxGxhxTxS = jnp.exp(score_BxGxhxTxS - most_BxGxhxTx1)
    all_BxGxMx1 = jnp.sum(share_BxGxhxTxS, axis=-1).reshape(B, G, -1, 1)
    share_BxGxMxS = share_BxGxhxTxS.reshape(score_BxGxMxS.shape).astype(q_BxTxHxE.dtype)
    out_BxGxMxE = jnp.einsum(
        "bgms,bgse->bgme", share_BxGxMxS, v_BxGxSxE, preferred_element_type=jnp.float32
    )
    out_BxGxMxE = (out_BxGxMxE / all_BxGxMx1).astype(q_BxTxHxE.dtype)
    out_BxGxhxTxE = out_BxGxMxE.reshape(B, G, H // G, T, E)
    return out_BxGxhxTxE.transpose(0, 3, 1, 2, 4).reshape(B, T, H, E)
