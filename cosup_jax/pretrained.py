"""What a config becomes beside the weights that it names; whether towers can do what it asks."""

import dataclasses

import jax

from cosup_jax.config import SHAPE, ArchConfig, Config, LoraConfig
from cosup_jax.dotted import replace_dotted
from cosup_jax.errors import UserError
from cosup_jax.hf import sentence, weights
from cosup_jax.model.families import FAMILIES
from cosup_jax.model.rotary import rotated_features

_LAYOUT = ("frozen_dtype", "lora", "frozen_layers", "freeze_embeddings")  # of its parameters


def resolve(config: Config, shape_only: bool = False) -> Config:
    """The config with the shapes that pretrained weights bring, and Ctx's where it starts as Gen.

    `shape_only` asks the hub for no weights. Raises UserError if they are not there, or the towers
    cannot do what the config asks.
    """
    config = _with_shape(config, "gen", _shape_of(config, "gen", shape_only))
    if config.ctx.init == "gen" or config.tie_ctx_to_gen:
        same = (*SHAPE, *_LAYOUT) if config.tie_ctx_to_gen else SHAPE
        shape = {name: getattr(config.gen.arch, name) for name in same}
        config = _with_shape(config, "ctx", shape)
    else:
        config = _with_shape(config, "ctx", _shape_of(config, "ctx", shape_only))
        config = _with_reading(config, shape_only)
    _check_towers(config)
    return config


def _check_towers(config: Config) -> None:
    gen, ctx = config.gen.arch, config.ctx.arch
    if not FAMILIES[gen.family].causal:
        raise UserError(f"config.gen: a {gen.family} sees what it should predict; only Ctx may be")
    if config.compat == "official" and gen.width != ctx.width:
        raise UserError(
            f"config.gen.arch.width={gen.width} and config.ctx.arch.width={ctx.width} differ; "
            "compat='official' has no projection between them, make them equal"
        )
    if config.ctx.rotate and gen.width != ctx.width:
        raise UserError(
            f"config.ctx.rotate: Ctx's vectors of {ctx.width} features pass a learned matrix to "
            f"Gen's {gen.width} already, which would undo it; drop it"
        )
    lengths = {
        "data.max_gen_tokens": (config.data.max_gen_tokens, "gen", gen),
        "generate.context_tokens": (config.generate.context_tokens, "gen", gen),
        "data.max_ctx_tokens": (config.data.max_ctx_tokens, "ctx", ctx),
    }
    for key, (tokens, tower, arch) in lengths.items():
        if FAMILIES[arch.family].positions == "learned" and tokens > arch.max_positions:
            raise UserError(
                f"config.{key}={tokens} is beyond the {arch.max_positions} positions that "
                f"{tower}'s {arch.family} has learned; lower it"
            )
    if config.ctx.pooling == "cls" and FAMILIES[ctx.family].causal:
        raise UserError(
            f"config.ctx.pooling=cls: the first token of a {ctx.family} sees no other; take another"
        )
    for tower, arch in (("gen", gen), ("ctx", ctx)):
        if problem := _unlike_its_family(arch):
            raise UserError(f"config.{tower}.arch.{problem}")


def _unlike_its_family(arch: ArchConfig) -> str:
    """What the family does not compute, and whoever reads an export of it would not either."""
    family, kernels = FAMILIES[arch.family], arch.lora.kernels
    if arch.frozen_layers >= arch.layers:
        return (
            f"frozen_layers={arch.frozen_layers} leaves none of its {arch.layers} layers; to freeze"
            " the tower set its freeze"
        )
    if arch.window and not family.windows:
        return f"window={arch.window}: a {arch.family} has none, a mistral or qwen has; set it to 0"
    if arch.kv_heads != arch.heads and not family.groups:
        return f"kv_heads={arch.kv_heads} must be heads={arch.heads} in a {arch.family}"
    asks = "gate" in kernels.split(",") and kernels != LoraConfig().kernels
    if arch.lora.rank and asks and not family.gated:
        return f"lora.kernels={kernels}: a {arch.family} has no gate"
    rotary = family.positions == "rotary"
    unused = [] if family.partial else ["rope_fraction"]
    unused += [] if rotary else ["rope_theta", "rope_scaling"]
    for name in unused:
        if getattr(arch, name) != getattr(ArchConfig(), name):
            return f"{name} means nothing in a {arch.family}; drop it"
    if rotary and rotated_features(arch) % 2:
        return f"rope_fraction={arch.rope_fraction} of head_dim={arch.head_dim} is no even number"
    return ""


def _shape_of(config: Config, tower: str, shape_only: bool) -> dict:
    init = getattr(config, tower).init
    if init in ("scratch", "gen"):
        return {}
    found, default = weights.arch_from_hf(weights.resolve(init, shape_only)), ArchConfig()
    return {name: found.get(name, getattr(default, name)) for name in SHAPE}


def _with_shape(config: Config, tower: str, shape: dict) -> Config:
    part = getattr(config, tower)
    part = dataclasses.replace(part, arch=dataclasses.replace(part.arch, **shape))
    return dataclasses.replace(config, **{tower: part})


def _with_reading(config: Config, shape_only: bool) -> Config:
    """Where the config is silent, Ctx reads passages as sentence-transformers reads its init."""
    ctx = config.ctx
    theirs = None
    if ctx.init != "scratch":
        theirs = sentence.read_modules(weights.resolve(ctx.init, shape_only))
    if theirs is None:
        return replace_dotted(config, "ctx.pooling", ctx.pooling or "eos")
    if not ctx.pooling and theirs.pooling not in ("cls", "last", "mean"):
        raise UserError(
            f"config.ctx.init={ctx.init} pools by {theirs.pooling!r}, which is not supported; set "
            "config.ctx.pooling"
        )
    notes = [f"its {kind} is left out" for kind in theirs.more]
    if theirs.pooling != (ctx.pooling or theirs.pooling):
        notes.append(f"it was trained with ctx.pooling={theirs.pooling}")
    if jax.process_index() == 0 and notes:
        print(f"note: {ctx.init}: {'; '.join(notes)}", flush=True)
    reading = {"pooling": ctx.pooling or theirs.pooling, "prompt": ctx.prompt or theirs.prompt}
    return dataclasses.replace(config, ctx=dataclasses.replace(ctx, **reading))
