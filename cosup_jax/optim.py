"""AdamW over both towers: warm-up, schedule, weight-decay mask, clipping."""

import jax
import jax.numpy as jnp
import optax

from cosup_jax.config import Config, OptimConfig


def schedule(config: OptimConfig, peak: float, num_steps: int, steps_per_epoch: int):
    """Learning rate at an update counted from 0; `epoch` multiplies by epoch_decay after every
    `steps_per_epoch` of them, the steps of the first epoch (others may have a few more or less)."""
    warmup = config.warmup_steps

    def learning_rate(step):
        ramp = jnp.minimum(1.0, (step + 1) / (warmup + 1))
        if config.schedule == "epoch":
            return peak * ramp * config.epoch_decay ** (step // steps_per_epoch)
        if config.schedule == "cosine":
            progress = jnp.clip((step - warmup) / max(num_steps - warmup, 1), 0.0, 1.0)
            cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
            return peak * ramp * (config.final_fraction + (1 - config.final_fraction) * cosine)
        return peak * ramp

    return learning_rate


def make(config: Config, num_steps: int, steps_per_epoch: int) -> optax.GradientTransformation:
    """The optax chain over {"gen", "ctx", "nsp"}, or those of them that are trained.

    Under compat=official clipping sees Gen's body alone, as the official code's does: Gen without
    its output head, no Ctx.
    """
    o = config.optim
    rate = lambda peak: optax.scale_by_learning_rate(schedule(o, peak, num_steps, steps_per_epoch))
    clip = optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity()
    if config.compat == "official":
        clip = optax.masked(clip, _gen_body)
    elif o.clip == "tower":
        clip = optax.partition(dict.fromkeys(("gen", "ctx", "nsp"), clip), _towers)
    return optax.chain(
        clip,
        optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps),
        optax.add_decayed_weights(o.weight_decay, _decayed) if o.weight_decay else optax.identity(),
        optax.partition(
            {
                "gen": rate(o.gen_learning_rate),
                "ctx": rate(o.ctx_learning_rate),
                "nsp": rate(o.gen_learning_rate),
            },
            _towers,
        ),
    )


def _towers(params: dict) -> dict:
    return {name: jax.tree.map(lambda _, name=name: name, tree) for name, tree in params.items()}


def _decayed(params: dict) -> dict:
    """Kernels and tables; norm scales, biases and the temperature are left alone."""
    alone = ("scale", "log_temperature", "bias")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not path[-1].key.endswith(alone), params
    )


def _gen_body(params: dict) -> dict:
    in_body = lambda path: path[0].key == "gen" and path[1].key != "head"
    return jax.tree_util.tree_map_with_path(lambda path, _: in_body(path), params)
