"""ConfigDict -> frozen Config: types, ranges, choices, and settings that contradict each other."""

import dataclasses
import math
import typing
from typing import Any

import ml_collections

from cosup_jax.config import ARMS, SHAPE, TEMPERATURE_RANGE, Config, RopeScaling, sources
from cosup_jax.dotted import get_dotted, replace_dotted
from cosup_jax.errors import UserError
from cosup_jax.model.families import FAMILIES, KERNELS

_ROPE_SCALING = {  # what each kind reads
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "original", "low", "high"),
    "yarn": ("factor", "original", "low", "high", "attention"),
}
_ARCH = {
    "family": tuple(FAMILIES),
    "activation": ("", "silu", "gelu", "gelu_tanh"),
    "rope_scaling.kind": tuple(_ROPE_SCALING),
    "dtype": ("float32", "bfloat16"),
    "frozen_dtype": ("float32", "bfloat16"),
    "remat": ("none", "dots", "full"),
    "attention": ("auto", "xla", "cudnn", "splash"),
}
_CHOICES = {
    "compat": ("", "official"),
    **{f"{tower}.arch.{name}": kinds for tower in ("gen", "ctx") for name, kinds in _ARCH.items()},
    "ctx.pooling": ("", "last", "eos", "token", "pad", "cls", "mean"),
    "loss.contrastive": ("softmax", "sigmoid"),
    "loss.remote_negatives": ("full", "detached"),
    "bank.kind": ("off", "passage", "dual"),
    "bank.dtype": ("float32", "bfloat16"),
    "data.bad_rows": ("refuse", "drop"),
    "generate.retrieval": tuple(ARMS),
    "index.dtype": ("float32", "bfloat16", "int8"),
    "export.dtype": ("float32", "bfloat16", "float16"),
    "optim.clip": ("global", "tower"),
    "optim.schedule": ("constant", "cosine", "epoch"),
}
_LARGEST = 2**31 - 1  # as steps are counted
_AT_MOST = {"optim.final_fraction": 1.0, "optim.epoch_decay": 1.0}
_BELOW_ONE = ("optim.b1", "optim.b2")
_MAY_BE_ZERO = {
    *("seed", "num_steps", "num_epochs", "data.workers", "data.no_evidence_fraction"),
    *("loss.ntp_weight", "loss.nsp_weight", "loss.nsp_ramp_steps", "loss.nsp_ramp_from"),
    *("loss.sigmoid_bias", "loss.margin", "loss.tile_mib", "bank.start_step", "bank.ema_decay"),
    *("generate.examples", "generate.max_retrievals", "generate.seed", "generate.temperature"),
    *("index.mine_margin", "generate.ret_threshold", "log.probe_every_steps", "data.dev_fraction"),
    *("eval.seed", "eval.answers", "eval.questions"),
    *("log.profile_from", "log.hang_seconds"),
    *("optim.warmup_steps", "optim.final_fraction", "optim.weight_decay", "optim.clip_norm"),
    *("optim.gen_learning_rate", "optim.ctx_learning_rate"),
    *(f"{t}.arch.{name}" for t in ("gen", "ctx") for name in ("window", "lora.rank")),
    *("gen.arch.frozen_layers", "ctx.arch.frozen_layers"),
}
_MAY_BE_MINUS_ONE = {"mesh.data", "mesh.fsdp", "mesh.tensor"}
_MAY_BE_NEGATIVE = {"loss.sigmoid_bias"}

# What the official code does (arXiv 2403.09024's repository), as far as it is a setting.
OFFICIAL = {
    "loss.ntp_weight": 1.0,
    "loss.nsp_weight": 0.01,
    "loss.normalize": False,
    "loss.temperature": 1.0,
    "loss.learn_temperature": False,
    "loss.contrastive": "softmax",
    "loss.margin_mask": False,
    "loss.nsp_ramp_steps": 0,
    "loss.mask_evidence": False,
    "loss.remote_negatives": "detached",
    "bank.kind": "off",
    "data.packing": False,
    "data.pure_steps": False,
    "data.drop_without_ret": True,
    "ctx.pooling": "last",
    "ctx.rotate": False,
    "bank.ema_decay": 0.0,
    "optim.clip": "global",
    "gen.freeze": False,
    "ctx.freeze": False,
    "micro_batches": 1,
}


def freeze(config: ml_collections.ConfigDict, explicit: frozenset[str] = frozenset()) -> Config:
    """ConfigDict -> Config, checked.

    Args:
      config: as `make` returns it, command-line overrides applied.
      explicit: dotted keys given on the command line; compat may not overrule them.

    Raises:
      UserError: unknown key, wrong type, value out of range, or keys that contradict each other.
    """
    frozen = _freeze_group(Config, config, "")
    if frozen.compat == "official":
        frozen = _apply_official(frozen, explicit)
    _check(frozen)
    _check_shapes(frozen, explicit)
    if not frozen.ctx.pooling and (frozen.tie_ctx_to_gen or frozen.ctx.init in ("scratch", "gen")):
        frozen = replace_dotted(frozen, "ctx.pooling", "eos")  # no files of its own tell another
    return frozen


def _check_shapes(config: Config, explicit: frozenset[str]) -> None:
    """Refuses a shape on the command line for a tower that has its shape from elsewhere."""
    inits = {"gen": config.gen.init, "ctx": "gen" if config.tie_ctx_to_gen else config.ctx.init}
    for key in sorted(explicit):
        tower, *name = key.split(".")
        if name[:1] == ["arch"] and name[1] in SHAPE and inits[tower] != "scratch":
            raise UserError(
                f"config.{key} means nothing: {tower} takes its shape from {inits[tower]!r}; drop "
                f"it, or set config.{tower}.init=scratch"
            )


def _freeze_group(cls, group, prefix: str):
    if not isinstance(group, ml_collections.ConfigDict):
        raise UserError(f"config.{prefix.rstrip('.')} must be a group of keys, not {group!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    types = typing.get_type_hints(cls)
    unknown = sorted(set(group) - set(fields))
    if unknown:
        raise UserError(f"unknown config key {prefix + unknown[0]!r} in the config file")
    missing = sorted(set(fields) - set(group))
    if missing:
        raise UserError(f"config key {prefix + missing[0]!r} is missing; build on config.make")
    values = {}
    for name in fields:
        dotted, value = prefix + name, group[name]
        if dataclasses.is_dataclass(types[name]):
            values[name] = _freeze_group(types[name], value, dotted + ".")
        else:
            values[name] = _typed(dotted, value, types[name])
    return cls(**values)


def _typed(dotted: str, value: Any, kind: type) -> Any:
    if kind is str and isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
        return ",".join(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"config.{dotted} must be {kind.__name__}, not {value!r}")
    if dotted in _CHOICES and value not in _CHOICES[dotted]:
        options = ", ".join(repr(option) for option in _CHOICES[dotted])
        raise UserError(f"config.{dotted} must be one of {options}, not {value!r}")
    if kind in (int, float):
        if kind is float and not math.isfinite(value):
            raise UserError(f"config.{dotted} must be a finite number, not {value!r}")
        most = _AT_MOST.get(dotted, math.inf if kind is float else _LARGEST)
        if value > most and not dotted.endswith("seed"):  # 32 bits, checked below; eval.seed: any
            raise UserError(f"config.{dotted} must be {most} or less, not {value!r}")
        if dotted in _BELOW_ONE and value >= 1:
            raise UserError(f"config.{dotted} must be less than 1, not {value!r}")
        low_ok = value > 0 or (value == 0 and dotted in _MAY_BE_ZERO) or dotted in _MAY_BE_NEGATIVE
        if not low_ok and not (value == -1 and dotted in _MAY_BE_MINUS_ONE):
            low = "0 or more" if dotted in _MAY_BE_ZERO else "positive"
            raise UserError(f"config.{dotted} must be {low}, not {value!r}")
    return value


def _apply_official(config: Config, explicit: frozenset[str]) -> Config:
    if "loss.identity_mask" in explicit:
        raise UserError(
            "config.loss.identity_mask means nothing with compat='official', which finds positives "
            "by position; drop one of the two"
        )
    default = Config()
    for dotted, official in OFFICIAL.items():
        value = get_dotted(config, dotted)
        if value != official and (dotted in explicit or value != get_dotted(default, dotted)):
            raise UserError(
                f"config.{dotted}={value!r} contradicts compat='official', which means "
                f"{official!r}; drop one of the two"
            )
        config = replace_dotted(config, dotted, official)
    return config


def _check(config: Config) -> None:
    _check_towers(config)
    _check_objective(config)
    _check_evaluation(config)
    if (config.num_steps > 0) == (config.num_epochs > 0):
        raise UserError(
            f"set exactly one of config.num_steps (now {config.num_steps}) and config.num_epochs "
            f"(now {config.num_epochs}) to a positive number"
        )
    if config.loss.remote_negatives == "detached" and config.compat != "official":
        raise UserError(
            "config.loss.remote_negatives='detached' exists only under compat='official'; "
            "set config.compat=official or remote_negatives=full"
        )
    if config.compat == "official" and config.batch_size % config.loss.compat_ranks:
        raise UserError(
            f"config.batch_size={config.batch_size} is no multiple of config.loss.compat_ranks="
            f"{config.loss.compat_ranks}"
        )
    if config.batch_size % config.micro_batches:
        raise UserError(
            f"config.batch_size={config.batch_size} is no multiple of config.micro_batches="
            f"{config.micro_batches}"
        )
    for dotted in ("seed", "generate.seed"):  # jax.random.key keeps no more
        if (seed := get_dotted(config, dotted)) >= 2**32:
            raise UserError(f"config.{dotted}={seed} must fit 32 bits")
    for dotted in (
        *("data.no_evidence_fraction", "data.dev_fraction"),
        *("generate.ret_threshold", "generate.top_p"),
    ):
        if get_dotted(config, dotted) > 1:
            raise UserError(f"config.{dotted} is a share: at most 1")
    if config.data.packing and config.data.max_ctx_tokens > config.data.ctx_row_tokens:
        raise UserError(
            f"config.data.max_ctx_tokens={config.data.max_ctx_tokens} does not fit a Ctx row of "
            f"config.data.ctx_row_tokens={config.data.ctx_row_tokens}"
        )
    for dotted in ("data.train", "data.eval"):
        if not sources(get_dotted(config, dotted)):
            raise UserError(
                f"config.{dotted} names no source; give --config.{dotted}=FILE.jsonl,... or "
                "tfds:NAME"
            )
    for name, weight in sources(config.data.eval):
        if weight != 1:
            raise UserError(
                f"config.data.eval: {name}@{weight:g} means nothing, as each question is asked "
                "once; drop the weight"
            )


def _check_towers(config: Config) -> None:
    """What each tower is, and starts from."""
    for tower in ("gen", "ctx"):
        init, arch = getattr(config, tower).init, getattr(config, tower).arch
        if not init:
            raise UserError(f"config.{tower}.init is empty; give weights, or scratch")
        if arch.heads % arch.kv_heads:
            raise UserError(
                f"config.{tower}.arch.heads={arch.heads} is no multiple of kv_heads={arch.kv_heads}"
            )
        if arch.head_dim % 2:
            raise UserError(f"config.{tower}.arch.head_dim={arch.head_dim} must be even (RoPE)")
        for name in arch.lora.kernels.split(",") if arch.lora.rank else ():
            if name not in KERNELS:
                raise UserError(
                    f"config.{tower}.arch.lora.kernels: {name!r} is none of {', '.join(KERNELS)}"
                )
        if arch.frozen_layers and (config.gen.init if init == "gen" else init) == "scratch":
            raise UserError(
                f"config.{tower}.arch.frozen_layers={arch.frozen_layers} would freeze random "
                f"weights; set config.{tower}.init"
            )
        if arch.rope_fraction > 1:
            raise UserError(f"config.{tower}.arch.rope_fraction={arch.rope_fraction} is a share")
        kind = arch.rope_scaling.kind
        for name, default in vars(RopeScaling()).items():
            given = getattr(arch.rope_scaling, name) != default
            if given and name != "kind" and name not in _ROPE_SCALING[kind]:
                raise UserError(
                    f"config.{tower}.arch.rope_scaling.{name} means nothing with kind={kind}; drop "
                    "it, or set the kind"
                )
    for name in ("pooling", "prompt", "rotate"):
        if getattr(config.gen, name) != getattr(Config().gen, name):
            raise UserError(
                f"config.gen.{name} means nothing: Gen reads no passages; set it for ctx"
            )
    if config.gen.init == "gen":
        raise UserError("config.gen.init='gen' is circular; only ctx.init may be 'gen'")


def _check_objective(config: Config) -> None:
    """What is trained by what."""
    if config.tie_ctx_to_gen and config.ctx.rotate:
        raise UserError(
            "config.ctx.rotate needs a Ctx of its own: drop it, or tie_ctx_to_gen (ctx.init=gen "
            "starts with the same weights)"
        )
    if config.tie_ctx_to_gen and config.ctx.freeze:
        raise UserError(
            "config.ctx.freeze means nothing with tie_ctx_to_gen: there is one tower; set "
            "config.gen.freeze, or untie"
        )
    if config.gen.freeze and (config.ctx.freeze or config.tie_ctx_to_gen):
        raise UserError(
            "config.gen.freeze and config.ctx.freeze leave nothing to train; unfreeze one tower"
        )
    if config.gen.freeze and not config.loss.trains_nsp:
        raise UserError(
            "config.gen.freeze with config.loss.nsp_weight=0 leaves nothing to train; drop one"
        )
    if not config.loss.ntp_weight and not config.loss.trains_nsp:
        raise UserError("config.loss.ntp_weight and nsp_weight are both 0: nothing to train")
    if config.loss.nsp_ramp_from and not config.loss.nsp_ramp_steps:
        raise UserError("config.loss.nsp_ramp_from means nothing without nsp_ramp_steps; set both")
    low, high = TEMPERATURE_RANGE
    if config.loss.learn_temperature and not low <= config.loss.temperature <= high:
        raise UserError(
            f"config.loss.temperature={config.loss.temperature} is outside [{low}, {high}], where "
            "a learned one stays"
        )
    if config.bank.ema_decay and (config.bank.kind == "off" or config.ctx.freeze):
        raise UserError(
            "config.bank.ema_decay averages a Ctx that is trained, for a bank; set bank.kind and "
            "unfreeze ctx, or drop it"
        )
    if config.bank.kind != "off" and not config.loss.trains_nsp:
        raise UserError("config.bank.kind means nothing with nsp_weight=0; set bank.kind=off")
    if config.bank.kind != "off" and not config.loss.identity_mask:
        raise UserError(
            f"config.loss.identity_mask=False and config.bank.kind={config.bank.kind} exclude each "
            "other: a bank knows its passages by identity; set bank.kind=off, or identity_mask=True"
        )
    if config.log.probe_bank and config.bank.kind != "dual":
        raise UserError("config.log.probe_bank compares what a dual bank holds; set bank.kind=dual")
    if config.bank.ema_decay >= 1:
        raise UserError(f"config.bank.ema_decay={config.bank.ema_decay} must be below 1")


def _check_evaluation(config: Config) -> None:
    names = config.eval.arm_names
    for name in names:
        if name not in ARMS or names.count(name) > 1:
            raise UserError(
                f"config.eval.arms={config.eval.arms!r}: name some of {', '.join(ARMS)}, each once"
            )
    for key, sizes in (("corpus_sizes", "sizes"), ("hard_corpus_sizes", "hard_sizes")):
        try:
            least = min(getattr(config.eval, sizes), default=1)
        except ValueError:
            least = 0
        if least < 1:
            raise UserError(
                f"config.eval.{key}={getattr(config.eval, key)!r} must be numbers of passages, "
                "comma-separated, such as 100,1000; empty for none but all"
            )
