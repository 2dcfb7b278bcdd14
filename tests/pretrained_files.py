"""A small pretrained Llama and its tokenizer, as files."""

import json

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast

WORDS = ["</s>", "a", "b", "c", "d", "e"]
PADDING = 100.0  # what the file holds in rows that its tokenizer has no entry for


def write_llama(directory, rows: int, layers: int = 1) -> dict[str, np.ndarray]:
    """A directory as of Hugging Face; the table has `rows` rows, six of them its tokenizer's.

    Returns the tensors by name.
    """
    D, rng = 8, np.random.default_rng(0)
    make = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    padded = lambda: np.append(make(len(WORDS), D), np.full((rows - len(WORDS), D), PADDING), 0)
    names = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up")
    weights = {}
    for at in (f"layers.{layer}." for layer in range(layers)):
        weights |= {f"{at}{name}_proj": make(D, D) for name in (*names, "mlp.down")}
        weights |= {f"{at}{name}_layernorm": make(D) for name in ("input", "post_attention")}
    weights |= {"embed_tokens": padded(), "lm_head": padded(), "norm": make(D)}
    found = {f"{name}.weight": array.astype(np.float32) for name, array in weights.items()}
    save_file(found, directory / "model.safetensors")
    shape = {"hidden_size": D, "intermediate_size": D, "vocab_size": rows}
    shape |= {"num_hidden_layers": layers, "num_attention_heads": 2}
    (directory / "config.json").write_text(json.dumps(shape))
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "a"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(directory)
    return found
