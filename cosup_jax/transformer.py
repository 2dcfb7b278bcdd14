"""One decoder-only transformer of the Llama family, for Gen and for Ctx.

RMSNorm, rotary positions (rotate-half), grouped-query attention, SwiGLU; scanned layers. Flax Linen
stays inside this file: from outside, `Transformer` is functions on a plain nested dict:

    embed/table [V, D]   final_norm/scale [D]   head/kernel [D, V] (untied Gen only)
    blocks/attn_norm/scale [N, D]   blocks/attn/{q [N, D, H, E], k, v [N, D, G, E], o [N, H, E, D]}
    blocks/mlp_norm/scale [N, D]    blocks/mlp/{gate, up [N, D, F], down [N, F, D]}

N layers, D width, H query heads, G kv heads, E head_dim, F mlp_width, V padded vocabulary,
B rows, T tokens.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cosup_jax.config import ArchConfig
from cosup_jax.sharding import constrain

VOCAB_MULTIPLE = 128  # the vocabulary is padded to it, so that any tensor axis up to 128 splits it
_NEVER = -1e30  # logit of a padded vocabulary entry; finite, so that gradients stay finite


@dataclasses.dataclass(frozen=True)
class Transformer:
    """Pure functions of one tower.

    Attributes:
      arch: shape and numerics.
      vocab_size: the tokenizer's entries, before padding.
      has_head: whether `logits` exists (Gen) or not (Ctx).
    """

    arch: ArchConfig
    vocab_size: int
    has_head: bool = True

    def init(self, key: jax.Array) -> dict:
        """Random float32 parameters."""
        return nn.meta.unbox(self._boxed(key))

    def logical_axes(self) -> dict:
        """For each parameter a tuple of logical axis names, as in `sharding.RULES`."""
        boxed = jax.eval_shape(self._boxed, jax.random.key(0))
        is_boxed = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
        return jax.tree.map(lambda leaf: leaf.names, boxed, is_leaf=is_boxed)

    def hidden(self, params: dict, tokens_BxT, segments_BxT, positions_BxT) -> jax.Array:
        """Final hidden states [B, T, D], normed, in the compute dtype.

        A token sees the earlier tokens of its own segment. Segment -s marks padding that belongs
        to segment s: it sees the segment, and nothing sees it. What stands at segment 0 is
        meaningless and finite.
        """
        return self._module().apply({"params": params}, tokens_BxT, segments_BxT, positions_BxT)

    def unembedding(self, params: dict) -> jax.Array:
        """Output embedding [D, V]; columns from vocab_size on belong to no token."""
        return params["embed"]["table"].T if self.arch.tie_embeddings else params["head"]["kernel"]

    def logits(self, params: dict, hidden: jax.Array) -> jax.Array:
        """Next-token logits [..., V] in float32; padded vocabulary entries never win."""
        kernel_DxV = self.unembedding(params)
        logits = jnp.einsum(
            "...d,dv->...v",
            hidden,
            kernel_DxV.astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )
        return jnp.where(jnp.arange(kernel_DxV.shape[1]) < self.vocab_size, logits, _NEVER)

    def _module(self) -> nn.Module:
        return _Decoder(self.arch, padded_vocab(self.vocab_size), self.has_head)

    def _boxed(self, key: jax.Array) -> dict:
        x = jnp.ones((1, 2), jnp.int32)
        return self._module().init(key, x, x, x)["params"]


def padded_vocab(vocab_size: int) -> int:
    """Rows of the embedding table for a tokenizer of `vocab_size` entries."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def attention_mask(segments_BxT: jax.Array) -> jax.Array:
    """[B, 1, T, T], True where row token t may look at token s."""
    T = segments_BxT.shape[1]
    key_BxT = segments_BxT[:, None, :]
    same = jnp.abs(segments_BxT)[:, :, None] == key_BxT  # a negative or zero key never matches > 0
    causal = jnp.tril(jnp.ones((T, T), bool))
    return (same & (key_BxT > 0) & causal[None])[:, None]


def rotate(x_BxTxHxE: jax.Array, positions_BxT: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864), Llama's rotate-half layout, in float32."""
    half = x_BxTxHxE.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BxTx1xh = (
        positions_BxT[:, :, None, None].astype(jnp.float32) * frequency[None, None, None]
    )
    cos, sin = jnp.cos(angle_BxTx1xh), jnp.sin(angle_BxTx1xh)
    first, second = jnp.split(x_BxTxHxE.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return rotated.astype(x_BxTxHxE.dtype)


def _attend(arch: ArchConfig, q_BxTxHxE, k_BxTxGxE, v_BxTxGxE, mask_Bx1xTxT):
    # cuDNN's fused kernel takes no segments: fed a mask it would build the whole [B, H, T, T] bias,
    # so packed rows take XLA's path on every platform.
    implementation = "cudnn" if arch.attention == "cudnn" else "xla"
    return jax.nn.dot_product_attention(
        q_BxTxHxE, k_BxTxGxE, v_BxTxGxE, mask=mask_Bx1xTxT, implementation=implementation
    )


def _param(module: nn.Module, name: str, shape, axes, fan_in: int, gain: float = 1.0) -> jax.Array:
    init = nn.with_logical_partitioning(nn.initializers.normal(gain * fan_in**-0.5), axes)
    return module.param(name, init, shape, jnp.float32)


class _RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x):
        ones = nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",))
        scale_D = constrain(self.param("scale", ones, (x.shape[-1],), jnp.float32), None)
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + self.eps)
        return jnp.einsum("...d,d->...d", normed, scale_D).astype(x.dtype)


class _Attention(nn.Module):
    arch: ArchConfig

    @nn.compact
    def __call__(self, x_BxTxD, mask_Bx1xTxT, positions_BxT):
        a, dtype = self.arch, x_BxTxD.dtype
        D, H, G, E = x_BxTxD.shape[-1], a.heads, a.kv_heads, a.head_dim
        # Attention starts almost uniform, so that [Ret] first reads all of its context alike: a
        # contrastive loss that starts from sharp random attention can collapse.
        q_DxHxE = _param(self, "q", (D, H, E), ("embed", "q_heads", "head_dim"), D, gain=0.1)
        k_DxGxE = _param(self, "k", (D, G, E), ("embed", "kv_heads", "head_dim"), D)
        v_DxGxE = _param(self, "v", (D, G, E), ("embed", "kv_heads", "head_dim"), D)
        o_HxExD = _param(self, "o", (H, E, D), ("q_heads", "head_dim", "embed"), H * E, _branch(a))
        project = lambda kernel: jnp.einsum("btd,dhe->bthe", x_BxTxD, kernel.astype(dtype))
        q_BxTxHxE = rotate(project(q_DxHxE), positions_BxT, a.rope_theta)
        k_BxTxGxE = rotate(project(k_DxGxE), positions_BxT, a.rope_theta)
        out_BxTxHxE = _attend(a, q_BxTxHxE, k_BxTxGxE, project(v_DxGxE), mask_Bx1xTxT)
        return jnp.einsum("bthe,hed->btd", out_BxTxHxE, o_HxExD.astype(dtype))


class _SwiGLU(nn.Module):
    arch: ArchConfig

    @nn.compact
    def __call__(self, x_BxTxD):
        D, F, dtype = x_BxTxD.shape[-1], self.arch.mlp_width, x_BxTxD.dtype
        gate_DxF = _param(self, "gate", (D, F), ("embed", "mlp"), D)
        up_DxF = _param(self, "up", (D, F), ("embed", "mlp"), D)
        down_FxD = _param(self, "down", (F, D), ("mlp", "embed"), F, 0.1 * _branch(self.arch))
        inner_BxTxF = nn.silu(x_BxTxD @ gate_DxF.astype(dtype)) * (x_BxTxD @ up_DxF.astype(dtype))
        return inner_BxTxF @ down_FxD.astype(dtype)


class _Block(nn.Module):
    arch: ArchConfig

    @nn.compact
    def __call__(self, x_BxTxD, mask_Bx1xTxT, positions_BxT):
        a = self.arch
        normed_BxTxD = _RMSNorm(a.norm_eps, name="attn_norm")(x_BxTxD)
        x_BxTxD += _Attention(a, name="attn")(normed_BxTxD, mask_Bx1xTxT, positions_BxT)
        x_BxTxD = constrain(x_BxTxD, "batch", None, None)
        x_BxTxD += _SwiGLU(a, name="mlp")(_RMSNorm(a.norm_eps, name="mlp_norm")(x_BxTxD))
        return constrain(x_BxTxD, "batch", None, None), None


class _Decoder(nn.Module):
    arch: ArchConfig
    padded_vocab: int
    has_head: bool

    @nn.compact
    def __call__(self, tokens_BxT, segments_BxT, positions_BxT):
        a, V = self.arch, self.padded_vocab
        table_VxD = _Table((V, a.width), ("vocab", "embed"), "table", name="embed")()
        table_VxD = constrain(table_VxD.astype(a.dtype), "vocab", None)  # gathered over fsdp once
        x_BxTxD = constrain(table_VxD[tokens_BxT], "batch", None, None)
        blocks = nn.scan(
            _remat(_Block, a.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=a.layers,
            unroll=a.scan_unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(a, name="blocks")
        x_BxTxD, _ = blocks(x_BxTxD, attention_mask(segments_BxT), positions_BxT)
        if self.has_head and not a.tie_embeddings and self.is_initializing():
            _Table((a.width, V), ("embed", "vocab"), "kernel", name="head")()
        x_BxTxD = _RMSNorm(a.norm_eps, name="final_norm")(x_BxTxD)
        return constrain(x_BxTxD, "batch", None, None)


class _Table(nn.Module):
    """One matrix of embeddings, input or output, under a name of its own."""

    shape: tuple[int, int]
    axes: tuple[str, str]
    param_name: str

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), self.axes)
        return self.param(self.param_name, init, self.shape, jnp.float32)


def _branch(arch: ArchConfig) -> float:
    """Gain of the kernels that write to the residual stream: keeps its variance at depth 2N."""
    return (2 * arch.layers) ** -0.5


def _remat(block: Any, policy: str) -> Any:
    if policy == "none":
        return block
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "dots" else None
    return nn.remat(block, policy=keep, prevent_cse=False)
