"""The model families that one transformer computes, and what sets them apart."""

from typing import NamedTuple


class Family(NamedTuple):
    """How a family computes, as far as numbers do not say it; the defaults are Llama's."""

    norm: str = "rms"  # rms | layer (mean removed, with a bias)
    block: str = "serial"  # serial | parallel (attention and MLP read the same) | post (norm last)
    positions: str = "rotary"  # rotary | learned
    gated: bool = True  # the MLP multiplies by a gate
    biases: str = ""  # kernels that have one: a letter of q, k, v, o, and m for the MLP's
    groups: bool = True  # several query heads may share a kv head
    partial: bool = False  # a share of a head's features may be rotated
    windows: bool = False  # a token may see a stretch of what is before it
    qk_norm: bool = False  # queries and keys are normed per head
    causal: bool = True  # a token sees no later one
    activation: str = "silu"


KERNELS = ("q", "k", "v", "o", "gate", "up", "down")  # of a layer; gate where it is gated
_GPT = Family("layer", "serial", "learned", gated=False, biases="qkvom", groups=False)
_NEOX = _GPT._replace(positions="rotary", partial=True, activation="gelu")
FAMILIES = {
    "llama": Family(),  # SmolLM2, TinyLlama
    "mistral": Family(windows=True),
    "qwen2": Family(biases="qkv", windows=True),  # Qwen2.5
    "qwen3": Family(qk_norm=True, windows=True),
    "gpt2": _GPT._replace(activation="gelu_tanh"),
    "gpt_neox": _NEOX._replace(block="parallel"),  # Pythia
    "gpt_neox_serial": _NEOX,
    "bert": _GPT._replace(block="post", causal=False, activation="gelu"),  # MiniLM, E5, bge
}
