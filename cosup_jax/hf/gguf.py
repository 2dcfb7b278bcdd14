"""GGUF files (llama.cpp, Ollama) read as if they were Hugging Face model directories.

Names and layouts are llama.cpp's. What we cannot tell for certain is an error, never a guess.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from cosup_jax.errors import UserError
from cosup_jax.hf.names import LAYOUTS, TABLE

_ROPE_FACTORS = "rope_freqs.weight"  # divisors of the rotary frequencies, no weight


class ProblemError(Exception):
    """Becomes a UserError where the file's name is known."""


class GgufFile:
    """A model file, mapped and not read.

    `config` is the model's config.json; `names` are its tensors as Hugging Face names them, without
    the prefix that the model's class puts before them all ("model.", "transformer.", ...).

    Raises UserError for a file that is no whole GGUF file, or of a model that is not supported.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        stored, metadata = open_gguf(self.path)
        kind = metadata.get("general.architecture")
        if kind not in _ARCHITECTURES:
            raise UserError(
                f"{path}: architecture {kind!r} is not supported, only {', '.join(_ARCHITECTURES)}"
            )
        known = _ARCHITECTURES[kind]
        prefix = f"{kind}."
        settings = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
        factors = stored.pop(_ROPE_FACTORS, None)
        try:
            named = {_hf_name(known, name): tensor for name, tensor in stored.items()}
            self.config = _config(known, settings, named)
            if factors is not None:
                if "rope_scaling" in self.config:
                    raise ProblemError(
                        f"rope.scaling beside {_ROPE_FACTORS} is not supported; keep one of them"
                    )
                self.config["rope_scaling"] = _llama3(self.config, np.asarray(factors.data))
            self._tensors = {
                name: _Tensor(self.path, tensor, *_layout(known, self.config, tensor))
                for name, tensor in named.items()
            }
        except ProblemError as problem:
            raise UserError(f"{path}: {kind}: {problem}") from problem
        self.names = frozenset(self._tensors)

    def tensor(self, name: str) -> "_Tensor":
        """A slice object in Hugging Face's layout: `[...]` reads and dequantises that part."""
        return self._tensors[name]


class _Tensor:
    """One tensor in Hugging Face's layout; nothing is kept of what has been read."""

    def __init__(
        self, path: Path, stored: gguf.ReaderTensor, order: np.ndarray | None, transposed: bool
    ):
        self._path, self._stored = path, stored
        self._order, self._transposed = order, transposed  # the stored row of each of our rows

    def get_shape(self) -> list[int]:
        """As Hugging Face stores it."""
        shape = [int(n) for n in self._stored.shape]  # innermost first
        return shape if self._transposed else shape[::-1]

    def __getitem__(self, index: Any) -> np.ndarray:
        """float32 of a slice per axis, of fewer, or of `...`; only its rows are dequantised."""
        given = () if index is Ellipsis else index if isinstance(index, tuple) else (index,)
        cut = (*given, *[slice(None)] * (len(self._stored.shape) - len(given)))
        rows, *columns = cut[::-1] if self._transposed else cut
        if self._order is not None:
            rows = self._order[rows]
        if not columns:
            return self._dequantise(self._stored.data)[rows]
        found = self._dequantise(self._stored.data[rows])[:, *columns]
        return found.T if self._transposed else found

    def _dequantise(self, data: np.ndarray) -> np.ndarray:
        kind = self._stored.tensor_type
        try:
            return np.asarray(gguf.dequantize(data, kind))
        except NotImplementedError as error:
            raise UserError(
                f"{self._path}: tensor {self._stored.name} has values of type {kind.name}, which "
                "cannot be read; get the model as Q8_0 or F16"
            ) from error


def open_gguf(path: Path) -> tuple[dict[str, gguf.ReaderTensor], dict[str, Any]]:
    """The tensors by llama.cpp's names, mapped and not read, and the metadata.

    Raises UserError for a file that is no whole GGUF file.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read as GGUF ({error.strerror}); check it") from error
    tensors, metadata = _open(path, found.st_size, found.st_mtime_ns)
    return dict(tensors), dict(metadata)


# Reading the metadata takes seconds, and shape, tokenizer and weights each ask for it.
@functools.lru_cache(maxsize=2)
def _open(path: Path, size: int, mtime_ns: int) -> tuple[Mapping, Mapping]:
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (OSError, ValueError, LookupError, ArithmeticError, MemoryError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{path} cannot be read as GGUF ({line}); is the file whole?") from error
    if reader.byte_order != "I":
        raise UserError(f"{path} is of the other byte order; convert the model on this machine")
    parts = metadata.get("split.count", 1)
    if parts > 1:
        raise UserError(f"{path} is one of {parts} parts; join them: llama-gguf-split --merge")
    return {tensor.name: tensor for tensor in reader.tensors}, metadata


# Architectures ----------------------------------------------------------------------------------

_Axes = tuple[tuple[int, int, int], tuple[int, int]]


class _Architecture(NamedTuple):
    model_type: str
    required: Mapping[str, str]  # key of config.json -> key of the file, the architecture before it
    optional: Mapping[str, str]
    fixed: Mapping[str, Any]  # what config.json says of every such model
    finish: Callable[[dict[str, Any], Mapping, Mapping], None] = lambda *_: None
    rows: Mapping[str, Callable[[Mapping], _Axes]] = {}  # stored rows as a block, and axes to swap
    transposed: tuple[str, ...] = ()


_LEAVES = {  # tensor of the file -> our leaf, whose name at Hugging Face is in names.py
    "token_embd": "embed/table",
    "position_embd": "embed/positions",
    "token_types": "embed/types",
    "token_embd_norm": "embed/norm/scale",
    "output_norm": "final_norm/scale",
    "output": "head/kernel",
    "attn_norm": "blocks/attn_norm/scale",
    "attn_output_norm": "blocks/attn_norm/scale",
    "attn_q": "blocks/attn/q",
    "attn_k": "blocks/attn/k",
    "attn_v": "blocks/attn/v",
    "attn_qkv": "blocks/attn/q",  # with k and v in the same tensor
    "attn_q_norm": "blocks/attn/q_norm/scale",
    "attn_k_norm": "blocks/attn/k_norm/scale",
    "attn_output": "blocks/attn/o",
    "ffn_norm": "blocks/mlp_norm/scale",
    "layer_output_norm": "blocks/mlp_norm/scale",
    "ffn_gate": "blocks/mlp/gate",
    "ffn_up": "blocks/mlp/up",
    "ffn_down": "blocks/mlp/down",
}


def _hf_name(known: _Architecture, name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    block, layer, part = (*stem.split("."), "", "")[:3]
    found = LAYOUTS[known.model_type].table.get(_LEAVES.get(part if layer else block, ""))
    fused = part == "attn_qkv"
    if found is None or suffix not in ("weight", "bias") or fused != ("#" in found.theirs):
        raise ProblemError(f"tensor {name} is not supported, only those of a plain text model")
    return f"{found.name.format(layer).removesuffix('.weight')}.{suffix}"


def _config(known: _Architecture, settings: Mapping, named: Mapping) -> dict[str, Any]:
    config: dict[str, Any] = {"model_type": known.model_type, **known.fixed}
    for key, stored in {**known.required, **known.optional}.items():
        value = settings.get(stored)
        if isinstance(value, list):
            raise ProblemError(f"{stored} differs between layers, which is not supported")
        if key in known.required and not value:
            raise ProblemError(f"{stored} is missing; convert the model anew")
        if value is not None:
            config[key] = _short(value)
    if settings["embedding_length"] < settings["attention.head_count"]:
        raise ProblemError("attention.head_count is above embedding_length; get the file anew")
    layout = LAYOUTS[known.model_type]
    embedding = layout.table[TABLE].name
    if embedding not in named:
        raise ProblemError("tensor token_embd.weight is missing; get the whole file")
    config["vocab_size"] = int(named[embedding].shape[-1])
    config["tie_word_embeddings"] = layout.head not in named
    known.finish(config, settings, named)
    return config


def _layout(
    known: _Architecture, config: Mapping, stored: gguf.ReaderTensor
) -> tuple[np.ndarray | None, bool]:
    """The stored row of each of Hugging Face's rows, None for the same, and whether transposed."""
    part = stored.name.split(".")[-2]
    transposed = part in known.transposed and len(stored.shape) == 2
    if part not in known.rows:
        return None, transposed
    shape, swapped = known.rows[part](config)
    rows = int(stored.shape[-1])
    if not np.prod(shape) or rows % abs(np.prod(shape)):
        raise ProblemError(f"tensor {stored.name} has {rows} rows, no whole number of heads")
    return np.arange(rows).reshape(shape).swapaxes(*swapped).ravel(), transposed


def _short(value: Any) -> Any:
    """A float32 as it was written: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


# Llama and its kin ------------------------------------------------------------------------------


def _finish_llama(config: dict[str, Any], settings: Mapping, named: Mapping) -> None:
    heads = config["num_attention_heads"]
    head_dim = config["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
    config.setdefault("num_key_value_heads", heads)
    config.setdefault("rope_theta", 10000.0)
    rotated = settings.get("rope.dimension_count", head_dim)
    if rotated != head_dim:
        config["partial_rotary_factor"] = rotated / head_dim
    if scaling := _rope_scaling(settings):
        config["rope_scaling"] = scaling
    if config["model_type"] == "llama":
        config["mlp_bias"] = "layers.0.mlp.up_proj.bias" in named
        if config.get("sliding_window"):  # Llama has none; Mistral goes by the same name
            config["model_type"] = "mistral"
    if config["model_type"] != "qwen2":
        config["attention_bias"] = "layers.0.self_attn.q_proj.bias" in named


def _rope_scaling(settings: Mapping) -> dict[str, Any]:
    """As llama.cpp reads it: linear where no type is named, and a factor of 0 is 1."""
    prefix = "rope.scaling."
    stored = {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)}
    kind = stored.pop("type", "linear")
    if kind == "none":
        return {}
    if "rope.scale_linear" in settings:  # the key of the first files
        stored.setdefault("factor", settings["rope.scale_linear"])
    stored.pop("finetuned", None)
    keys = {"factor": "factor", "original_context_length": "original_max_position_embeddings"}
    if unknown := sorted(stored.keys() - keys):
        raise ProblemError(f"{prefix}{unknown[0]} is not supported")
    if kind == "linear" and stored.get("factor", 0) in (0, 1):
        return {}
    return {"rope_type": kind, **{keys[key]: _short(value) for key, value in stored.items()}}


def _llama3(config: Mapping, factors: np.ndarray) -> dict[str, Any]:
    """Llama 3.1's scaling, of which the file holds the outcome only."""
    low, high, original, factor = 1.0, 4.0, 8192, float(factors.max())
    head_dim, theta = config.get("head_dim", 1), config.get("rope_theta", 1.0)
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    kept = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    expected = 1 / ((1 - kept) / factor + kept)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise ProblemError(
            f"{_ROPE_FACTORS} is not the RoPE scaling of Llama 3.1 and 3.2, the one that is known"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _pairs_apart(config: Mapping) -> _Axes:
    """llama.cpp has the two rows of a rotation side by side, we half a head apart."""
    return (-1, config["head_dim"] // 2, 2), (1, 2)


_LLAMA = _Architecture(
    "llama",
    {
        "hidden_size": "embedding_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "intermediate_size": "feed_forward_length",
        "max_position_embeddings": "context_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    },
    {
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "rope_theta": "rope.freq_base",
        "sliding_window": "attention.sliding_window",
    },
    {"hidden_act": "silu"},
    _finish_llama,
    rows={"attn_q": _pairs_apart, "attn_k": _pairs_apart},
)
_QWEN2 = _LLAMA._replace(model_type="qwen2", rows={})
_QWEN3 = _QWEN2._replace(model_type="qwen3")


# GPT-2, GPT-NeoX, BERT --------------------------------------------------------------------------


def _finish_neox(config: dict[str, Any], settings: Mapping, named: Mapping) -> None:
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    config["rotary_pct"] = settings.get("rope.dimension_count", head_dim) / head_dim
    if _rope_scaling(settings):
        raise ProblemError("rope.scaling is not supported")


def _head_by_head(config: Mapping) -> _Axes:
    """llama.cpp has all queries first, then keys and values; GPT-NeoX has them head by head."""
    return (3, config["num_attention_heads"], -1), (0, 1)


def _finish_bert(config: dict[str, Any], settings: Mapping, named: Mapping) -> None:
    types = named.get("embeddings.token_type_embeddings.weight")
    config["type_vocab_size"] = 0 if types is None else int(types.shape[-1])


_GPT2 = _Architecture(
    "gpt2",
    {
        "n_embd": "embedding_length",
        "n_layer": "block_count",
        "n_head": "attention.head_count",
        "n_inner": "feed_forward_length",
        "n_positions": "context_length",
        "layer_norm_epsilon": "attention.layer_norm_epsilon",
    },
    {},
    {"activation_function": "gelu_new"},
    transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
)
_LAYER_NORM = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "layer_norm_eps": "attention.layer_norm_epsilon",
}
_NEOX = _Architecture(
    "gpt_neox",
    _LAYER_NORM,
    {"use_parallel_residual": "use_parallel_residual", "rotary_emb_base": "rope.freq_base"},
    {"hidden_act": "gelu"},
    _finish_neox,
    rows={"attn_qkv": _head_by_head},
)
_BERT = _Architecture(
    "bert",
    _LAYER_NORM,
    {},
    {"hidden_act": "gelu"},
    _finish_bert,
)
_ARCHITECTURES = {
    "llama": _LLAMA,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "gpt2": _GPT2,
    "gptneox": _NEOX,
    "bert": _BERT,
}
