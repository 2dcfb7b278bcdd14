"""What makes a transformers directory a sentence-transformers model as well: read, and written."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from cosup_jax.errors import UserError

FILES = ["modules.json", "*Pooling/config.json", "config_sentence_transformers.json"]  # are read
_OURS = {"cls": "cls", "mean": "mean", "lasttoken": "last"}  # their pooling as config.ctx.pooling
_FLAGS = {  # what older files say
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}


class Reading(NamedTuple):
    """How a model makes its vectors."""

    pooling: str  # as config.ctx.pooling, or by their name where it is none of ours
    prompt: str  # before every text that asks for no other
    more: tuple[str, ...] = ()  # modules that change a vector in other ways than by its length


def read_modules(directory: Path) -> Reading | None:
    """What the directory's files say of its vectors; None if it is no sentence-transformers model.

    Raises UserError for files that cannot be read.
    """
    if not (directory / "modules.json").is_file():
        return None
    file = directory / "modules.json"
    try:
        kinds = {m["type"].split(".")[-1]: m["path"] for m in json.loads(file.read_text())}
        path = kinds["Pooling"]
        file = directory / path / "config.json"
        found = json.loads(file.read_text())
        modes = found.get("pooling_mode") or [m for flag, m in _FLAGS.items() if found.get(flag)]
        theirs = modes if isinstance(modes, str) else "+".join(modes)
        file = directory / "config_sentence_transformers.json"
        about = json.loads(file.read_text()) if file.is_file() else {}
        prompt = (about.get("prompts") or {}).get(about.get("default_prompt_name"), "")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read ({error}); get the model anew") from None
    more = tuple(kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize"))
    return Reading(_OURS.get(theirs, theirs), prompt, more)


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
    theirs = pooling if pooling in ("cls", "mean") else "lasttoken"
    modes = {flag: name == theirs for flag, name in _FLAGS.items()}
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
