"""Attention kernels that keep no [T, T] of scores: cuDNN's on a GPU, splash attention on a TPU.

B rows, T tokens, H query heads, G kv heads, h = H / G, E features of a head. Causal rows only.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from cosup_jax.config import ArchConfig
from cosup_jax.errors import UserError
from cosup_jax.sharding import RULES, row_parts

_NEEDS = {
    "cudnn": "a GPU of compute capability 8 or more, arch.dtype=bfloat16, rows of an even number "
    "of tokens and a head_dim that is a multiple of 8 up to 128",
    "splash": "a TPU, rows of a multiple of 128 tokens, a head_dim of 64 or a multiple of 128, "
    "kv_heads that mesh.tensor divides and rows that the rest of the mesh does",
}


def kernel(arch: ArchConfig, causal: bool, rows: int, tokens: int) -> str:
    """xla, cudnn or splash: what arch.attention names, auto the fused one where there is one.

    Raises UserError where a kernel is named that there is none of.
    """
    mesh = jax.sharding.get_abstract_mesh()
    described = None if mesh.empty else mesh.abstract_device
    platform = described.platform if described is not None else jax.default_backend()
    there = {"xla"}
    if causal and platform == "tpu" and not mesh.empty:
        splits = rows % row_parts(mesh) == 0 and arch.kv_heads % mesh.shape["tensor"] == 0
        fits = tokens % 128 == 0 and (arch.head_dim == 64 or arch.head_dim % 128 == 0)
        there |= {"splash"} if splits and fits else set()
    elif causal and platform != "cpu" and has_cudnn(arch, tokens, jax.devices()[0]):
        there.add("cudnn")
    if arch.attention == "auto":
        return next((kind for kind in ("splash", "cudnn") if kind in there), "xla")
    if arch.attention not in there:
        needs = _NEEDS[arch.attention]
        raise UserError(
            f"arch.attention={arch.attention} needs a causal family, {needs}; set it to auto"
        )
    return arch.attention


def has_cudnn(arch: ArchConfig, tokens: int, device: jax.Device) -> bool:
    """Whether cuDNN has a kernel, by its own rules."""
    if device.platform != "gpu" or arch.dtype != "bfloat16" or tokens % 2:
        return False
    capability = str(getattr(device, "compute_capability", ""))  # of AMD's a name, as gfx90a
    known = capability[:1].isdigit() and float(capability) >= 8
    return known and arch.head_dim % 8 == 0 and arch.head_dim <= 128


def cudnn(q_BxTxHxE, k_BxTxGxE, v_BxTxGxE, mask_Bx1xTxT) -> jax.Array:
    """[B, T, H, E]. The mask becomes a bias that all heads share."""
    blind_Bx1xTx1 = ~jnp.any(mask_Bx1xTxT, axis=-1, keepdims=True)  # else NaN there
    parts = q_BxTxHxE, k_BxTxGxE, v_BxTxGxE
    return jax.nn.dot_product_attention(
        *parts, mask=mask_Bx1xTxT | blind_Bx1xTx1, is_causal=True, implementation="cudnn"
    )


def splash(
    q_BxTxHxE, k_BxTxGxE, v_BxTxGxE, segments_BxT, window: int, interpret: bool = False
) -> jax.Array:
    """[B, T, H, E], by JAX's own kernel on every device's rows and heads.

    `interpret`: runs on any platform, slowly; for tests.
    """
    heads = P(RULES["batch"], None, "tensor", None)
    apart = jax.shard_map(
        lambda *parts: _splash(*parts, window, interpret),
        in_specs=(heads, heads, heads, P(RULES["batch"], None)),
        out_specs=heads,
        check_vma=False,
    )
    return apart(q_BxTxHxE, k_BxTxGxE, v_BxTxGxE, segments_BxT)


def _splash(q_BxTxHxE, k_BxTxGxE, v_BxTxGxE, segments_BxT, window: int, interpret: bool):
    # Importing it takes a second that no other platform needs.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    B, T, H, E = q_BxTxHxE.shape
    G = k_BxTxGxE.shape[2]
    block = next(size for size in (512, 256, 128) if T % size == 0)
    sides = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv")
    sides += ("block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    mask = masks.LocalMask((T, T), (window - 1, 0), 0) if window else masks.CausalMask((T, T))
    attend = kernels.make_splash_mqa_single_device(
        masks.MultiHeadMask([mask] * (H // G)),
        block_sizes=kernels.BlockSizes(**dict.fromkeys(sides, block)),
        interpret=interpret,
    )
    # A key of a negative segment is nobody's; padding sees padding, for it must see something.
    key_BxT = jnp.where(segments_BxT >= 0, segments_BxT, -1)
    ids = kernels.SegmentIds(jnp.abs(segments_BxT), key_BxT)
    q_BxTxGxhxE = q_BxTxHxE.reshape(B, T, G, H // G, E) * E**-0.5
    of_groups = jax.vmap(attend, (0, 0, 0, None))
    out_BxGxhxTxE = jax.vmap(of_groups)(
        q_BxTxGxhxE.transpose(0, 2, 3, 1, 4),
        k_BxTxGxE.transpose(0, 2, 1, 3),
        v_BxTxGxE.transpose(0, 2, 1, 3),
        ids,
    )
    return out_BxGxhxTxE.transpose(0, 3, 1, 2, 4).reshape(B, T, H, E)
