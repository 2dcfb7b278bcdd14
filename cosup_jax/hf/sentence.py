"""What makes the transformers directory of Ctx a sentence-transformers model as well."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

_MODES = ("pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_lasttoken")


def save_modules(
    directory: Path,
    pooling: str,
    prompt: str,
    max_tokens: int,
    normalize: bool,
    widths: tuple[int, int],
    projection_DxW: np.ndarray | None = None,
) -> None:
    """Pooling, projection and normalisation, as `towers.passage_vectors` computes them.

    Args:
      directory: holds the model and its tokenizer, which appends what is pooled.
      pooling: config.ctx.pooling.
      prompt: put before every text.
      max_tokens: of a text, control tokens included; the rest is cut.
      normalize: vectors have length 1; compared by dot product otherwise.
      widths: features of a hidden state, and of a vector.
      projection_DxW: between the two.
    """
    steps = ["Transformer", "Pooling"]
    steps += ["Dense"] if projection_DxW is not None else []
    steps += ["Normalize"] if normalize else []
    modules = []
    for number, step in enumerate(steps):
        path = f"{number}_{step}" if number else ""
        (directory / path).mkdir(exist_ok=True)
        kind = f"sentence_transformers.models.{step}"
        modules.append({"idx": number, "name": str(number), "path": path, "type": kind})
    _write(directory / "modules.json", modules)
    _write(directory / "sentence_bert_config.json", {"max_seq_length": max_tokens})
    about = {
        "prompts": {"passage": prompt} if prompt else {},
        "default_prompt_name": "passage" if prompt else None,
        "similarity_fn_name": "cosine" if normalize else "dot",
    }
    _write(directory / "config_sentence_transformers.json", about)
    first, mean, last = _MODES
    modes = dict.fromkeys(_MODES, False) | {{"cls": first, "mean": mean}.get(pooling, last): True}
    settings = {"word_embedding_dimension": widths[0], **modes, "include_prompt": True}
    _write(directory / "1_Pooling" / "config.json", settings)
    if projection_DxW is not None:
        identity = "torch.nn.modules.linear.Identity"
        shape = {"in_features": widths[0], "out_features": widths[1], "bias": False}
        _write(directory / "2_Dense" / "config.json", shape | {"activation_function": identity})
        weight = {"linear.weight": np.ascontiguousarray(projection_DxW.T.astype(np.float32))}
        safetensors.numpy.save_file(weight, directory / "2_Dense" / "model.safetensors")


def _write(path: Path, value: Mapping[str, Any] | list) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
