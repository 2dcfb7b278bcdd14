"""Low-rank adapters (LoRA, arXiv 2106.09685) after training: made part of the kernels."""

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from cosup_jax.config import ArchConfig


def merge_adapters(params: dict, arch: ArchConfig) -> dict:
    """The same function without adapters: their updates added to the kernels, in float32."""
    flat = flatten_dict(params)
    merged = {path: leaf for path, leaf in flat.items() if "_lora_" not in path[-1]}
    for path, a in flat.items():
        if path[-1].endswith("_lora_a"):
            name = (*path[:-1], path[-1].removesuffix("_lora_a"))
            kernel, b = merged[name], flat[(*name[:-1], f"{name[-1]}_lora_b")]
            layers, rank = len(kernel), arch.lora.rank
            down, up = a.reshape(layers, -1, rank), b.reshape(layers, rank, -1)
            update = jnp.matmul(down, up, precision="highest")
            update = (arch.lora.alpha / rank) * update.reshape(kernel.shape)
            merged[name] = kernel.astype(jnp.float32) + update
    return unflatten_dict(merged)
