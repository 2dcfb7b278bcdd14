"""The model families that one transformer computes, and what sets them apart."""

from typing import NamedTuple


class Family(NamedTuple):
    """How a family computes, as far as numbers do not say it; the defaults are Llama's."""

    norm: str = "rms"  # rms | layer (mean removed, with a bias)
    block: str = "serial"  # serial | parallel (attention and MLP read the same) | post (norm last)
    positions: str = "rotary"  # rotary | learned
    gated: bool = True  # the MLP multiplies by a gate
    biases: str = ""  # kernels that have one: a letter of q, k, v, o, and m for the MLP's
    qk_norm: bool = False  # queries and keys are normed per head
    causal: bool = True  # a token sees no later one
    activation: str = "silu"


KERNELS = ("q", "k", "v", "o", "gate", "up", "down")  # of a layer, as far as the family has them
FAMILIES = {
    "llama": Family(),  # SmolLM2, TinyLlama
    "mistral": Family(),
    "qwen2": Family(biases="qkv"),  # Qwen2.5
    "qwen3": Family(qk_norm=True),
    "gpt2": Family("layer", "serial", "learned", False, "qkvom", activation="gelu_tanh"),
    "gpt_neox": Family("layer", "parallel", "rotary", False, "qkvom", activation="gelu"),  # Pythia
    "gpt_neox_serial": Family("layer", "serial", "rotary", False, "qkvom", activation="gelu"),
    "bert": Family(  # MiniLM, Contriever, E5, bge
        "layer", "post", "learned", False, "qkvom", causal=False, activation="gelu"
    ),
}
