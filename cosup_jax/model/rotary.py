"""Rotary position embedding, and its stretching beyond the length of pretraining."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from cosup_jax.config import ArchConfig, RopeScaling


def rotate(
    x_BxTxHxE: jax.Array, positions_BxT: jax.Array, arch: ArchConfig, slots: int = 0
) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864), Llama's rotate-half layout, in float32.

    With `slots`, all positions that matter are below it: their cosines and sines come from a table,
    which XLA makes once, outside of the loop around this.
    """
    half = rotated_features(arch) // 2
    frequency = arch.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if arch.rope_scaling.kind != "none":
        frequency *= stretch(arch.rope_scaling, arch.rope_theta, half)
    at_BxT = jnp.arange(slots)[None] if slots else positions_BxT
    angle_BxTx1xh = at_BxT[:, :, None, None].astype(jnp.float32) * frequency[None, None, None]
    cos, sin = jnp.cos(angle_BxTx1xh), jnp.sin(angle_BxTx1xh)
    if slots:
        cos, sin = cos[0][positions_BxT], sin[0][positions_BxT]
    if arch.rope_scaling.kind == "yarn":
        cos, sin = cos * arch.rope_scaling.attention, sin * arch.rope_scaling.attention
    turned, straight = jnp.split(x_BxTxHxE.astype(jnp.float32), [2 * half], axis=-1)
    first, second = jnp.split(turned, 2, axis=-1)
    parts = (first * cos - second * sin, second * cos + first * sin, straight)
    return jnp.concatenate(parts, axis=-1).astype(x_BxTxHxE.dtype)


def rotated_features(arch: ArchConfig) -> int:
    """Leading features of a head that carry the position."""
    return int(arch.head_dim * arch.rope_fraction)


def stretch(scaling: RopeScaling, theta: float, half: int) -> np.ndarray:
    """[half] factor on each rotary frequency, below 1 where positions are interpolated.

    linear: arXiv 2306.15595; llama3: the Llama 3.1 release; yarn: arXiv 2309.00071.
    """
    s = scaling
    if s.kind == "linear":
        return np.full(half, 1 / s.factor, np.float32)
    feature = np.arange(half)
    if s.kind == "llama3":  # by how often a feature turns within the length of pretraining
        turns = s.original * theta ** (-feature / half) / (2 * math.pi)
        kept = (turns - s.low) / (s.high - s.low)
    else:  # yarn: the same, linear in the feature's number, between whole features
        at = lambda turns: half * math.log(s.original / (2 * math.pi * turns)) / math.log(theta)
        first, last = max(math.floor(at(s.high)), 0), min(math.ceil(at(s.low)), 2 * half - 1)
        kept = 1 - (feature - first) / max(last - first, 0.001)
    kept = np.clip(kept, 0, 1)
    return (kept + (1 - kept) / s.factor).astype(np.float32)
