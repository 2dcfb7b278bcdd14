"""One transformer for Gen and for Ctx; what sets its families apart is in families.py.

Scanned layers. Flax Linen stays inside this file: from outside, `Transformer` is functions on a
plain nested dict:

    embed/table [V, D]   final_norm/scale [D]   head/kernel [D, V] (untied Gen only)
    blocks/attn_norm/scale [N, D]   blocks/attn/{q [N, D, H, E], k, v [N, D, G, E], o [N, H, E, D]}
    blocks/mlp_norm/scale [N, D]    blocks/mlp/{gate, up [N, D, F], down [N, F, D]}

Beside a kernel `q` may stand `q_bias` and the adapters `q_lora_a`, `q_lora_b`; beside a scale a
bias; beside embed/table `positions` and `types`. Layers that are frozen lie in `frozen_blocks`.

N layers, D width, H query heads, G kv heads, E head_dim, F mlp_width, V padded vocabulary,
B rows, T tokens, S slots of the cache.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cosup_jax.config import ArchConfig, LoraConfig
from cosup_jax.model import attention, fused
from cosup_jax.model.families import FAMILIES
from cosup_jax.model.rotary import rotate
from cosup_jax.sharding import constrain, lookup, product

VOCAB_MULTIPLE = 128  # the vocabulary is padded to it, so that any tensor axis up to 128 splits it
_NEVER = -1e30  # logit of a padded vocabulary entry; finite, so that gradients stay finite
ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": nn.gelu,
}
_AXES = {"d": "embed", "h": "q_heads", "g": "kv_heads", "e": "head_dim", "f": "mlp", "r": "lora"}
BERT_TYPES = 2  # token types of a BERT; a passage is all of the first


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

    @property
    def width(self) -> int:
        """Features of a hidden state."""
        return self.arch.width

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

        A token sees the earlier tokens of its own segment, in an encoder all of them. Segment -s
        marks padding that belongs to segment s: it sees the segment, and nothing sees it. What
        stands at segment 0 is meaningless and finite.
        """
        a, causal = self.arch, FAMILIES[self.arch.family].causal
        kind = fused.kernel(a, causal, *tokens_BxT.shape)
        seen = segments_BxT if kind == "splash" else attention.mask(segments_BxT, causal, a.window)
        module = self._module(kind=kind)
        return module.apply({"params": params}, tokens_BxT, seen, positions_BxT)

    def cache(self, rows: int, slots: int) -> dict:
        """Room for the keys and values of `slots` tokens a row, in the compute dtype."""
        a, family = self.arch, FAMILIES[self.arch.family]
        if not family.causal:
            raise ValueError(f"a {a.family} sees later tokens: nothing of it can be kept")
        parts = _stacks(a)
        if _unrolls(a):
            parts = {f"{name}_{i}": 1 for name, layers in parts.items() for i in range(layers)}
        empty = lambda layers: attention.empty(layers, rows, a.kv_heads, slots, a.head_dim, a.dtype)
        return {name: empty(layers) for name, layers in parts.items()}

    def unstack(self, params: dict) -> dict:
        """The parameters of each layer by themselves, where the scan over them is unrolled.

        For a loop around `extend`, which would else cut them out anew each time.
        """
        if not _unrolls(self.arch):
            return params
        found = {name: part for name, part in params.items() if name not in _stacks(self.arch)}
        for name, layers in _stacks(self.arch).items() if len(found) < len(params) else ():
            for i in range(layers):
                found[f"{name}_{i}"] = jax.tree.map(lambda x, i=i: x[i], params[name])
        return found

    def extend(self, params: dict, cache: dict, tokens_BxT, starts_B) -> tuple[jax.Array, dict]:
        """Final hidden states [B, T, D] of tokens behind those in the cache, and the new cache.

        Row b's tokens stand at positions starts_B[b], starts_B[b] + 1, ... and see all before
        them. Whatever the cache held from there on is forgotten: a lower start takes tokens back,
        and padding behind a row's tokens is gone with the next start. Tokens beyond the cache's
        slots are not kept, and their states are meaningless.
        """
        T = tokens_BxT.shape[1]
        positions_BxT = starts_B[:, None] + jnp.arange(T)[None]
        slots = attention.slots(cache)
        mask_Bx1xTxS = attention.cache_mask(positions_BxT, slots, self.arch.window)
        module = self._module(stacked=not _unrolls(self.arch))
        inputs = (tokens_BxT, mask_Bx1xTxS, positions_BxT, cache)
        return module.apply({"params": self.unstack(params)}, *inputs)

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

    def next_logits(self, params: dict, hidden_BxD) -> jax.Array:
        """[V, B], the logits of one token a row, padding included.

        In this order a CPU reads a tied table as it lies, which is up to a third faster.
        """
        kernel_VxD = self.unembedding(params).T.astype(hidden_BxD.dtype)
        return jnp.dot(kernel_VxD, hidden_BxD.T, preferred_element_type=jnp.float32)

    def _module(self, stacked: bool = True, kind: str = "xla") -> nn.Module:
        arch = dataclasses.replace(self.arch, attention=kind)
        return _Decoder(arch, padded_vocab(self.vocab_size), self.has_head, stacked)

    def _boxed(self, key: jax.Array) -> dict:
        x = jnp.ones((1, 2), jnp.int32)
        return self._module().init(key, x, attention.mask(x), x)["params"]


def padded_vocab(vocab_size: int) -> int:
    """Rows of the embedding table for a tokenizer of `vocab_size` entries."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _param(module: nn.Module, name: str, shape, axes, init) -> jax.Array:
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


def _linear(module: nn.Module, name: str, x, spec: str, gain: float = 1.0, bias: bool = False):
    """x [B, T, in] -> [B, T, out] by a kernel, for spec "in->out" in letters of `_AXES`."""
    a = module.arch
    size = {"d": a.width, "h": a.heads, "g": a.kv_heads, "e": a.head_dim, "f": a.mlp_width}
    size["r"] = a.lora.rank
    shape = lambda letters: tuple(size[letter] for letter in letters)
    axes = lambda letters: tuple(_AXES[letter] for letter in letters)
    normal, zeros = nn.initializers.normal, nn.initializers.zeros_init()
    inputs, outputs = spec.split("->")
    over = inputs + outputs
    scale = math.prod(shape(inputs)) ** -0.5
    kernel = _param(module, name, shape(over), axes(over), normal(gain * scale))
    y = product(f"bt{inputs},{over}->bt{outputs}", x, kernel.astype(x.dtype))
    if bias:
        bias = _param(module, f"{name}_bias", shape(outputs), axes(outputs), zeros)
        bias = constrain(bias, *[None] * len(outputs))[None, None]
        y = (y.astype(jnp.float32) + bias).astype(x.dtype)  # float32: its gradient is a sum
    if a.lora.rank and name in a.lora.kernels.split(","):
        down, up = inputs + "r", "r" + outputs
        lora_a = _param(module, f"{name}_lora_a", shape(down), axes(down), normal(scale))
        lora_b = _param(module, f"{name}_lora_b", shape(up), axes(up), zeros)
        low = jnp.einsum(f"bt{inputs},{down}->btr", x, lora_a.astype(x.dtype))
        update = jnp.einsum(f"btr,{up}->bt{outputs}", low, lora_b.astype(x.dtype))
        y += update * (a.lora.alpha / a.lora.rank)
    return y


class _Norm(nn.Module):
    """RMSNorm, or LayerNorm where the family asks; over the last axis, in float32."""

    arch: ArchConfig
    features: str = "embed"  # the axis that is normed

    @nn.compact
    def __call__(self, x):
        a, layer = self.arch, FAMILIES[self.arch.family].norm == "layer"
        make = lambda name, init: constrain(
            _param(self, name, (x.shape[-1],), (self.features,), init), None
        ).astype(jnp.float32)
        scale_D = make("scale", nn.initializers.ones_init())
        x32 = x.astype(jnp.float32)
        if layer:
            x32 -= jnp.mean(x32, axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + a.norm_eps)
        normed = jnp.einsum("...d,d->...d", normed, scale_D)
        if layer:
            bias_D = make("bias", nn.initializers.zeros_init())
            normed += jnp.expand_dims(bias_D, range(x.ndim - 1))
        return normed.astype(x.dtype)


class _Attention(nn.Module):
    arch: ArchConfig

    @nn.compact
    def __call__(self, x_BxTxD, seen, positions_BxT, cache, layer):
        a, family = self.arch, FAMILIES[self.arch.family]
        linear = lambda name, *args: _linear(self, name, *args, bias=name in family.biases)
        # Attention starts almost uniform, so that [Ret] first reads all of its context alike: a
        # contrastive loss that starts from sharp random attention can collapse.
        q_BxTxHxE = linear("q", x_BxTxD, "d->he", 0.1)
        k_BxTxGxE = linear("k", x_BxTxD, "d->ge")
        v_BxTxGxE = linear("v", x_BxTxD, "d->ge")
        if family.qk_norm:
            q_BxTxHxE = _Norm(a, "head_dim", name="q_norm")(q_BxTxHxE)
            k_BxTxGxE = _Norm(a, "head_dim", name="k_norm")(k_BxTxGxE)
        if family.positions == "rotary":
            slots = attention.slots(cache) if cache else 0
            q_BxTxHxE = rotate(q_BxTxHxE, positions_BxT, a, slots)
            k_BxTxGxE = rotate(k_BxTxGxE, positions_BxT, a, slots)
        if cache is None:
            parts = (q_BxTxHxE, k_BxTxGxE, v_BxTxGxE)
            out_BxTxHxE = attention.attend(*parts, seen, a.attention, a.window, family.causal)
        else:
            cache = attention.put(cache, layer, positions_BxT, k_BxTxGxE, v_BxTxGxE)
            out_BxTxHxE = attention.recall(q_BxTxHxE, cache, layer, seen)
        return linear("o", out_BxTxHxE, "he->d", _branch(a)), cache


class _MLP(nn.Module):
    arch: ArchConfig

    @nn.compact
    def __call__(self, x_BxTxD):
        a, family = self.arch, FAMILIES[self.arch.family]
        linear = lambda module, *args: _linear(module, *args, bias="m" in family.biases)
        activate = ACTIVATIONS[a.activation or family.activation]
        names = ("gate", "up") if family.gated else ("up",)

        def down(module, first_BxTxF, *rest):
            inner_BxTxF = math.prod(rest, start=activate(first_BxTxF))
            return linear(module, "down", inner_BxTxF, "f->d", 0.1 * _branch(a))

        # The backward pass computes the activation again, which costs less than to keep it.
        return nn.remat(down)(self, *(linear(self, name, x_BxTxD, "d->f") for name in names))


class _Block(nn.Module):
    arch: ArchConfig

    @nn.compact
    def __call__(self, carry, layer, seen, positions_BxT):
        """`carry` is [B, T, D] and the stack's cache, or None; `layer` the number within it.

        `seen` is a mask [B, 1, T, T or slots], or what else the kernel wants of `attention.attend`.
        """
        x_BxTxD, cache = carry
        a, kind = self.arch, FAMILIES[self.arch.family].block
        attn_norm, mlp_norm = _Norm(a, name="attn_norm"), _Norm(a, name="mlp_norm")
        attn, mlp = _Attention(a, name="attn"), _MLP(a, name="mlp")
        settle = lambda x: constrain(x, "batch", None, None)
        read_BxTxD = x_BxTxD if kind == "post" else attn_norm(x_BxTxD)
        attended_BxTxD, cache = attn(read_BxTxD, seen, positions_BxT, cache, layer)
        if kind == "post":
            x_BxTxD = settle(attn_norm(x_BxTxD + attended_BxTxD))
            x_BxTxD = mlp_norm(x_BxTxD + mlp(x_BxTxD))
        elif kind == "parallel":
            x_BxTxD = x_BxTxD + attended_BxTxD + mlp(mlp_norm(x_BxTxD))
        else:
            x_BxTxD = settle(x_BxTxD + attended_BxTxD)
            x_BxTxD = x_BxTxD + mlp(mlp_norm(x_BxTxD))
        return (settle(x_BxTxD), cache), None


class _Decoder(nn.Module):
    arch: ArchConfig
    padded_vocab: int
    has_head: bool
    stacked: bool = True

    @nn.compact
    def __call__(self, tokens_BxT, seen, positions_BxT, cache=None):
        """Final states; with a cache also the new cache."""
        a, family = self.arch, FAMILIES[self.arch.family]
        x_BxTxD = _Embedding(a, self.padded_vocab, name="embed")(tokens_BxT, positions_BxT)
        kept = {}
        for name, layers in _stacks(a).items():
            arch = _plain(a) if name == "frozen_blocks" else a
            if not self.stacked:
                for layer in (f"{name}_{i}" for i in range(layers)):
                    carry = (x_BxTxD, cache[layer])
                    carry, _ = _Block(arch, name=layer)(carry, 0, seen, positions_BxT)
                    x_BxTxD, kept[layer] = carry
                continue
            blocks = nn.scan(
                _remat(_Block, a.remat),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=layers,
                unroll=min(a.scan_unroll, layers),
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(arch, name=name)
            number = None if cache is None else jnp.arange(layers)
            carry = (x_BxTxD, None if cache is None else cache[name])
            (x_BxTxD, kept[name]), _ = blocks(carry, number, seen, positions_BxT)
        if self.has_head and not a.tie_embeddings and self.is_initializing():
            _Table((a.width, self.padded_vocab), ("embed", "vocab"), "kernel", name="head")()
        if family.block != "post":
            x_BxTxD = _Norm(a, name="final_norm")(x_BxTxD)
        x_BxTxD = constrain(x_BxTxD, "batch", None, None)
        return x_BxTxD if cache is None else (x_BxTxD, kept)


class _Embedding(nn.Module):
    """Tokens, and where the family learns them positions and token types -> [B, T, D]."""

    arch: ArchConfig
    padded_vocab: int

    @nn.compact
    def __call__(self, tokens_BxT, positions_BxT):
        a, family = self.arch, FAMILIES[self.arch.family]

        def rows(name, count, axis, ids_BxT):
            normal = nn.initializers.normal(0.02)
            table = _param(self, name, (count, a.width), (axis, "embed"), normal)
            return constrain(lookup(table, ids_BxT, axis, a.dtype), "batch", None, None)

        x_BxTxD = rows("table", self.padded_vocab, "vocab", tokens_BxT)
        if family.positions == "learned":
            x_BxTxD += rows("positions", a.max_positions, None, positions_BxT)
        if family.block == "post":
            x_BxTxD += rows("types", BERT_TYPES, None, jnp.zeros_like(tokens_BxT))
            x_BxTxD = _Norm(a, name="norm")(x_BxTxD)
        return constrain(x_BxTxD, "batch", None, None)


class _Table(nn.Module):
    """One matrix under a name of its own."""

    shape: tuple[int, int]
    axes: tuple[str, str]
    param_name: str

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.initializers.normal(0.02)
        return _param(self, self.param_name, self.shape, self.axes, init)


def _stacks(arch: ArchConfig) -> dict[str, int]:
    """Layers of each scanned stack, lowest first; a stack without any is left out."""
    stacks = {"frozen_blocks": arch.frozen_layers, "blocks": arch.layers - arch.frozen_layers}
    return {name: layers for name, layers in stacks.items() if layers}


def _unrolls(arch: ArchConfig) -> bool:
    """Whether no stack is looped over."""
    return arch.scan_unroll >= max(_stacks(arch).values())


def _plain(arch: ArchConfig) -> ArchConfig:
    """Layers that are frozen have no adapters."""
    return dataclasses.replace(arch, lora=LoraConfig())


def _branch(arch: ArchConfig) -> float:
    """Gain of the kernels that write to the residual stream: keeps its variance at depth 2N."""
    return (2 * arch.layers) ** -0.5


def _remat(block: Any, policy: str) -> Any:
    if policy == "none":
        return block
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "dots" else None
    return nn.remat(block, policy=keep, prevent_cse=False)
