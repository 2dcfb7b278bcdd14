"""Small models of every family: shapes as published files give them, weights by tensor name.

So a case needs no stored weights: with the names and shapes of its tensors, `write` rebuilds the
directory that Hugging Face's save_pretrained writes. Some config.json are of the old style
(rope_theta, rope_scaling), some of the new (rope_parameters).
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import save_file

from cosup_jax.config import ArchConfig
from cosup_jax.hf import weights
from cosup_jax.model.transformer import Transformer

V, T = 300, 48  # vocabulary, padded to 384; tokens of a recorded row
LENGTHS = (48, 29)  # real tokens of the recorded rows
SHAPE = {
    **{"vocab_size": V, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "max_position_embeddings": 64},
}
# Epsilons are large, so that another one shows; so are rotary bases small.
RMS = {**SHAPE, "num_key_value_heads": 2, "rms_norm_eps": 0.01, "tie_word_embeddings": False}
LAYER = {**SHAPE, "layer_norm_eps": 0.01}
LLAMA = {**RMS, "model_type": "llama", "rope_theta": 500.0}
NEW_LLAMA = {**RMS, "model_type": "llama"}
QWEN2 = {  # a window that is not to be used, as published
    **{**RMS, "model_type": "qwen2", "use_sliding_window": False},
    **{"sliding_window": 5, "max_window_layers": 1},
}
NEOX = {**LAYER, "model_type": "gpt_neox", "num_attention_heads": 2, "hidden_act": "gelu"}
LLAMA3 = {  # of 4 frequencies 1 is high, 1 in the middle, 2 are low
    **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
YARN = {  # of 8 frequencies 2 are high, 2 in the middle, 4 are low; no bound is a whole number
    **{"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "beta_fast": 3.0},
    **{"beta_slow": 0.75, "original_max_position_embeddings": 64, "attention_factor": 1.3},
}
CASES = {
    "llama_mha": {**LLAMA, "num_key_value_heads": 4},
    "llama_gqa": {**NEW_LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "llama_tied": {**LLAMA, "tie_word_embeddings": True},
    "llama_head_dim": {**LLAMA, "head_dim": 12},
    "llama_linear": {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama_llama3": {**LLAMA, "rope_scaling": LLAMA3, "max_position_embeddings": 512},
    "llama_yarn": {
        **{**NEW_LLAMA, "head_dim": 16, "max_position_embeddings": 256},
        "rope_parameters": YARN,
    },
    "mistral": {**RMS, "model_type": "mistral", "rope_theta": 500.0, "sliding_window": 5},
    "qwen2_yarn": {  # as Qwen2.5 gives it; the middle band ends beyond the last frequency
        **{**QWEN2, "head_dim": 16, "rope_theta": 10000.0, "max_position_embeddings": 32768},
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    },
    "qwen2_tied": {**QWEN2, "rope_theta": 500.0, "tie_word_embeddings": True},
    "qwen3": {
        **{**RMS, "model_type": "qwen3", "head_dim": 12},
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "gpt2": {
        **{"model_type": "gpt2", "vocab_size": V, "n_embd": 32, "n_layer": 3, "n_head": 4},
        **{"n_positions": 64, "layer_norm_epsilon": 0.01, "activation_function": "gelu_new"},
    },
    "gpt_neox": {
        **{**NEOX, "rotary_pct": 0.25, "rotary_emb_base": 500},
        **{"use_parallel_residual": True, "tie_word_embeddings": False},
    },
    "gpt_neox_serial": {
        **{**NEOX, "use_parallel_residual": False, "hidden_act": "gelu_fast"},
        "rope_parameters": {
            **{"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
        },
    },
    "bert": {**LAYER, "model_type": "bert", "hidden_act": "gelu", "type_vocab_size": 2},
}
CAUSAL = [name for name in CASES if name != "bert"]


def weight(name: str, shape: Sequence[int]) -> np.ndarray:
    """Larger than at initialisation, so that attention is far from uniform; norms around 1."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))  # frozen: gives the same for ever
    is_norm = len(shape) == 1 and name.endswith("weight")
    return (is_norm + 0.2 * rng.standard_normal(shape)).astype(np.float32)


def write(directory: Path, name: str, shapes: Mapping[str, Sequence[int]]) -> None:
    """The case as a Hugging Face directory."""
    (directory / "config.json").write_text(json.dumps(CASES[name]))
    tensors = {tensor: weight(tensor, shape) for tensor, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors")


def model_of(directory: Path, name: str) -> Transformer:
    """Ours, shaped by the directory's config.json."""
    arch = weights.arch_from_hf(directory)
    vocab = arch.pop("vocab_size")
    return Transformer(ArchConfig(**arch), vocab, has_head=name in CAUSAL)


def load(directory: Path, model: Transformer) -> dict:
    """Our parameters from the directory, on one device."""
    place = SingleDeviceSharding(jax.devices()[0])
    leaf = lambda like: jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=place)
    abstract = jax.tree.map(leaf, jax.eval_shape(model.init, jax.random.key(0)))
    return (weights.load_gen if model.has_head else weights.load_ctx)(directory, abstract)


def outputs(model: Transformer, params: dict, tokens, segments, positions) -> tuple:
    """Final hidden states and, where there is a head, the logits of the tokens that exist."""
    hidden = model.hidden(params, tokens, segments, positions)
    return (hidden, model.logits(params, hidden)[..., :V]) if model.has_head else (hidden,)


def excerpt(real, hidden, logits=None) -> dict[str, np.ndarray]:
    """What is recorded of the outputs: every real token's state, every eighth one's logits."""
    logits = {} if logits is None else {"logits": logits[real][::8]}
    return {"hidden": hidden[real], **logits}


def rows() -> tuple[np.ndarray, np.ndarray]:
    """Recorded tokens [B, T], and which of them are real: padding is on the right."""
    tokens = np.random.RandomState(0).randint(V, size=(len(LENGTHS), T))
    return tokens, np.arange(T) < np.array(LENGTHS)[:, None]
