"""config.json of a Hugging Face model <-> ArchConfig, one pair of functions a family."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cosup_jax.config import ArchConfig, RopeScaling
from cosup_jax.errors import UserError
from cosup_jax.hf.names import LAYOUTS
from cosup_jax.model.families import FAMILIES


def arch_fields(config: Mapping[str, Any], where: Any) -> dict[str, Any]:
    """The ArchConfig fields that weights determine, and `vocab_size`, from config.json.

    Raises UserError, naming the key, for what our transformer does not compute.
    """
    kind = config.get("model_type", "llama")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        raise UserError(f"{where}: model_type {kind!r} is not supported; these are: {known}")
    if config.get("quantization_config"):
        raise UserError(
            f"{where}: quantised weights are not supported; take the original or a GGUF"
        )
    config = _DEFAULTS.get(kind, {}) | dict(config)
    try:
        fields = _FAMILIES[kind].read(config) | {"vocab_size": config["vocab_size"]}
    except KeyError as error:
        raise UserError(f"{where}: key {error} is missing; is this a {kind} model?") from None
    except _UnsupportedError as error:
        raise UserError(f"{where}: {error}") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{where}: a number is no number ({error}); get the file anew") from None
    scaling = dataclasses.asdict(fields.get("rope_scaling", RopeScaling()))
    for name, value in {**fields, **scaling}.items():
        if not _is_sound(name, value):
            raise UserError(f"{where}: {name} is {value!r}; get the file anew")
    if fields["heads"] % fields["kv_heads"]:
        raise UserError(
            f"{where}: {fields['heads']} heads are no multiple of {fields['kv_heads']} key/value "
            "heads; get the file anew"
        )
    return {"family": kind, **fields}


def _is_sound(name: str, value: Any) -> bool:
    default = {"vocab_size": 1, **vars(ArchConfig()), **vars(RopeScaling())}[name]
    if type(value) is not type(default):
        return False
    number = type(value) in (int, float)
    return not number or 0 < value < math.inf or (name == "window" and value == 0)


def config_json(arch: ArchConfig, vocab_size: int, has_head: bool) -> dict[str, Any]:
    """config.json of an exported tower; tokenizer ids and dtype are the caller's."""
    kind = "gpt_neox" if arch.family == "gpt_neox_serial" else arch.family
    return {
        "model_type": kind,
        "architectures": [LAYOUTS[arch.family].models[not has_head]],
        **_FAMILIES[kind].write(arch),
        "tie_word_embeddings": arch.tie_embeddings and has_head,
        "vocab_size": vocab_size,
    }


class _UnsupportedError(Exception):
    pass


_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768}
_DEFAULTS = {  # of transformers, where a file is silent and they are not Llama's
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    "bert": {"max_position_embeddings": 512},
}


def _only(config: Mapping[str, Any], **fine: tuple) -> None:
    """Refuses what would load and then compute something else."""
    for key, values in fine.items():
        if config.get(key, values[0]) not in values:
            raise _UnsupportedError(f"{key} {config[key]!r} is not supported, only {values[0]!r}")


def _read_llama(config: Mapping[str, Any]) -> dict[str, Any]:
    _only(config, attention_bias=(False, None), mlp_bias=(False, None))
    _only(_rope(config), partial_rotary_factor=(1.0, None))
    width, heads = config["hidden_size"], config["num_attention_heads"]
    return {
        **_read_shape(config, "silu"),
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or width // heads,
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "window": _window(config),
        **_read_rope(config),
    }


def _write_llama(arch: ArchConfig) -> dict[str, Any]:
    windows = {}
    if FAMILIES[arch.family].windows:
        windows = {"sliding_window": arch.window or None}
    if arch.family.startswith("qwen"):
        windows |= {"use_sliding_window": bool(arch.window), "max_window_layers": 0}
    return {
        **_write_shape(arch),
        "num_key_value_heads": arch.kv_heads,
        "head_dim": arch.head_dim,
        "rms_norm_eps": arch.norm_eps,
        **windows,
        **_write_rope(arch),
    }


def _window(config: Mapping[str, Any]) -> int:
    """Tokens that every layer sees, 0 for all."""
    kind, window = config.get("model_type", "llama"), config.get("sliding_window", 4096) or 0
    if kind == "mistral":
        return window
    if kind == "llama" or not config.get("use_sliding_window", False):
        return 0
    layers, full = config["num_hidden_layers"], config.get("max_window_layers", 28)
    sees_all = config.get("layer_types") or ["full_attention"] * full + ["sliding"] * (
        layers - full
    )
    sees_all = [kind == "full_attention" for kind in sees_all[:layers]]
    if any(sees_all) and not all(sees_all):
        raise _UnsupportedError(f"a sliding_window ({window}) in some layers only is not supported")
    return 0 if all(sees_all) else window


def _read_gpt2(config: Mapping[str, Any]) -> dict[str, Any]:
    _only(config, scale_attn_by_inverse_layer_idx=(False,), scale_attn_weights=(True,))
    _only(config, add_cross_attention=(False,))
    width = config["n_embd"]
    return {
        "layers": config["n_layer"],
        **_heads(width, config["n_head"]),
        "mlp_width": config.get("n_inner") or 4 * width,
        "activation": _activation(config.get("activation_function", "gelu_new")),
        "max_positions": config["n_positions"],
        "norm_eps": float(config.get("layer_norm_epsilon", 1e-5)),
        "tie_embeddings": config.get("tie_word_embeddings", True),
    }


def _write_gpt2(arch: ArchConfig) -> dict[str, Any]:
    return {
        "n_embd": arch.width,
        "n_layer": arch.layers,
        "n_head": arch.heads,
        "n_inner": arch.mlp_width,
        "n_positions": arch.max_positions,
        "activation_function": _write_activation(arch),
        "layer_norm_epsilon": arch.norm_eps,
    }


def _read_neox(config: Mapping[str, Any]) -> dict[str, Any]:
    _only(config, attention_bias=(True,))
    share = config.get("rotary_pct", 0.25)
    return {
        **({} if config.get("use_parallel_residual", True) else {"family": "gpt_neox_serial"}),
        **_read_shape(config, "gelu"),
        "norm_eps": float(config.get("layer_norm_eps", 1e-5)),
        "tie_embeddings": config.get("tie_word_embeddings", False),
        **_read_rope(config, config.get("rotary_emb_base", 10000.0), share),
    }


def _write_neox(arch: ArchConfig) -> dict[str, Any]:
    return {
        **_write_shape(arch),
        "layer_norm_eps": arch.norm_eps,
        "use_parallel_residual": arch.family == "gpt_neox",
        "rotary_pct": arch.rope_fraction,
        "rotary_emb_base": arch.rope_theta,
        **_write_rope(arch),
    }


def _read_bert(config: Mapping[str, Any]) -> dict[str, Any]:
    _only(config, position_embedding_type=("absolute", None), is_decoder=(False,))
    _only(config, type_vocab_size=(2,))
    return {
        **_read_shape(config, "gelu"),
        "norm_eps": float(config.get("layer_norm_eps", 1e-12)),
        "tie_embeddings": True,
    }


def _write_bert(arch: ArchConfig) -> dict[str, Any]:
    return {
        **_write_shape(arch),
        "layer_norm_eps": arch.norm_eps,
        "type_vocab_size": 2,
        "position_embedding_type": "absolute",
    }


def _read_shape(config: Mapping[str, Any], activation: str) -> dict[str, Any]:
    """What all but GPT-2 call alike."""
    return {
        **_heads(config["hidden_size"], config["num_attention_heads"]),
        "layers": config["num_hidden_layers"],
        "mlp_width": config["intermediate_size"],
        "activation": _activation(config.get("hidden_act", activation)),
        "max_positions": config.get("max_position_embeddings", 2048),
    }


def _write_shape(arch: ArchConfig) -> dict[str, Any]:
    return {
        "hidden_size": arch.width,
        "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads,
        "intermediate_size": arch.mlp_width,
        "hidden_act": _write_activation(arch),
        "max_position_embeddings": arch.max_positions,
    }


_HIDDEN_ACT = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new"}
_ACTIVATION = {
    **{"silu": "silu", "swish": "silu", "gelu": "gelu"},
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh"),
}


def _activation(name: str) -> str:
    if name not in _ACTIVATION:
        raise _UnsupportedError(f"activation {name!r} is not supported; {', '.join(_ACTIVATION)}")
    return _ACTIVATION[name]


def _write_activation(arch: ArchConfig) -> str:
    return _HIDDEN_ACT[arch.activation or FAMILIES[arch.family].activation]


def _heads(width: int, heads: int) -> dict[str, int]:
    return {"width": width, "heads": heads, "kv_heads": heads, "head_dim": width // heads}


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings: `rope_parameters` in new files, `rope_theta` and `rope_scaling` in old."""
    old = {name: config[name] for name in ("rope_theta", "partial_rotary_factor") if name in config}
    return {**old, **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}


def _read_rope(
    config: Mapping[str, Any], theta: float = 10000.0, fraction: float = 1.0
) -> dict[str, Any]:
    rope, length = _rope(config), "original_max_position_embeddings"
    kind = rope.get("rope_type") or rope.get("type") or "default"
    found = {
        "rope_theta": float(rope.get("rope_theta", theta)),
        "rope_fraction": float(rope.get("partial_rotary_factor") or fraction),
    }
    if kind == "default":
        return found
    factor = float(rope.get("factor", 1.0))
    original = config.get(length) or rope.get(length) or config.get("max_position_embeddings", 0)
    if kind == "linear":
        scaling = RopeScaling("linear", factor)
    elif kind == "llama3":
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        scaling = RopeScaling("llama3", factor, original, low, high)
    elif kind == "yarn" and not (rope.keys() & {"mscale", "mscale_all_dim"} or not original):
        attention = rope.get("attention_factor")
        attention = 0.1 * math.log(factor) + 1 if attention is None and factor > 1 else attention
        low, high = float(rope.get("beta_slow") or 1), float(rope.get("beta_fast") or 32)
        if not rope.get("truncate", True):
            raise _UnsupportedError("rope scaling 'yarn' with truncate=false is not supported")
        scaling = RopeScaling("yarn", factor, original, low, high, float(attention or 1.0))
    else:
        raise _UnsupportedError(
            f"rope scaling {kind!r} is not supported, only default, linear, llama3 and plain yarn"
        )
    return found | {"rope_scaling": scaling}


def _write_rope(arch: ArchConfig) -> dict[str, Any]:
    """Under the old names, which every version of transformers reads; the new are 5's alone."""
    s, old = arch.rope_scaling, {"rope_theta": arch.rope_theta}
    if s.kind == "none":
        return old
    scaling = {"rope_type": s.kind, "factor": s.factor}
    if s.kind in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = s.original
    if s.kind == "llama3":
        scaling |= {"low_freq_factor": s.low, "high_freq_factor": s.high}
    if s.kind == "yarn":
        scaling |= {"beta_slow": s.low, "beta_fast": s.high, "attention_factor": s.attention}
    return old | {"rope_scaling": scaling}


class _Family(NamedTuple):
    read: Callable[[Mapping], dict]  # KeyError for a missing key
    write: Callable[[ArchConfig], dict]


_FAMILIES = {  # by model_type
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _Family(_read_llama, _write_llama)),
    "gpt2": _Family(_read_gpt2, _write_gpt2),
    "gpt_neox": _Family(_read_neox, _write_neox),
    "bert": _Family(_read_bert, _write_bert),
}
