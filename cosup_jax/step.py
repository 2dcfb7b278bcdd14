"""The train state, the pure train step, and their compilation over a mesh."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from cosup_jax import bank as bank_lib
from cosup_jax import cosup, nsp, official, sharding
from cosup_jax.config import Config
from cosup_jax.cosup import Factors
from cosup_jax.data.batch import Batch, batch_shape
from cosup_jax.errors import UserError
from cosup_jax.runtime.compiling import release_memory
from cosup_jax.towers import Towers


class Skipped(NamedTuple):
    """Steps without an update, as loss or gradient was not finite; int32."""

    total: jax.Array
    in_a_row: jax.Array


@flax.struct.dataclass
class TrainState:
    """Everything a step changes."""

    step: jax.Array  # int32, steps taken
    params: dict  # {"gen", "ctx", "nsp"}; no "ctx" if the towers are tied
    opt_state: Any
    bank: Any  # bank.Bank or None
    ema_ctx: Any  # moving average of what is trained of Ctx, or None
    skipped: Skipped
    key: jax.Array


def init_params(key: jax.Array, towers: Towers, config: Config) -> dict:
    """Random parameters; with ctx.init="gen" both towers start from the same weights.

    They are float32; what is not trained is as config.*.arch.frozen_dtype says.
    """
    key_gen, key_ctx = jax.random.split(key)
    params = {"gen": towers.gen.init(key_gen), "nsp": {}}
    if not towers.tied:
        params["ctx"] = towers.ctx.init(key_ctx)
    if not towers.tied and config.ctx.init == "gen" and config.gen.init == "scratch":
        # Adapters are each tower's own, of a rank of its own.
        shared = {p: x for p, x in flatten_dict(params["gen"]).items() if "_lora_" not in p[-1]}
        params["ctx"] = overlaid(params["ctx"], unflatten_dict(shared))
    if towers.projects:
        shape, scale = (towers.ctx.width, towers.gen.width), towers.ctx.width**-0.5
        key = jax.random.fold_in(key_ctx, 1)
        params["ctx"]["projection"] = scale * jax.random.normal(key, shape)
    if config.ctx.rotate:
        with jax.default_matmul_precision("highest"):  # accelerators would bend it
            rotation_DxD = jax.random.orthogonal(jax.random.fold_in(key_ctx, 1), towers.gen.width)
        params["ctx"]["projection"] = rotation_DxD
    if config.loss.learn_temperature:
        params["nsp"]["log_temperature"] = jnp.log(jnp.float32(config.loss.temperature))
        if config.loss.contrastive == "sigmoid":
            params["nsp"]["bias"] = jnp.float32(config.loss.sigmoid_bias)
    hold = lambda path, x: x.astype(_dtype(_keys(path), config))
    return jax.tree_util.tree_map_with_path(hold, params)


def overlaid(base: dict, other: dict) -> dict:
    """`base`, with those of its leaves that `other` has too taken from there."""
    return {
        name: (overlaid(tree, other[name]) if isinstance(tree, dict) else other[name])
        if name in other
        else tree
        for name, tree in base.items()
    }


def trainable(params: dict, config: Config) -> dict:
    """The part of `params` that is trained, towers without such a part left out.

    That is what a loss reaches of a tower that is not frozen; of one with adapters these and the
    embeddings, which the added tokens need.
    """
    flat = flatten_dict(params)
    return unflatten_dict({path: x for path, x in flat.items() if _is_trained(path, config)})


def _averaged(params: dict, config: Config) -> dict:
    """What bank.ema_decay averages: of Ctx, or of a tied Gen, all that is trained."""
    trained = trainable(params, config)
    return trained["gen" if config.tie_ctx_to_gen else "ctx"]


def _dtype(path: tuple[str, ...], config: Config) -> str:
    whole = path[0] == "nsp" or path[-1] == "projection" or _is_trained(path, config)
    return "float32" if whole else getattr(config, path[0]).arch.frozen_dtype


def _is_trained(path: tuple[str, ...], config: Config) -> bool:
    tower, *_, leaf = path
    if tower != "gen" and not config.loss.trains_nsp:
        return False
    if leaf == "projection":
        return not config.ctx.rotate
    if tower == "nsp":
        return True
    given, part = getattr(config, tower), path[1]
    if given.freeze or part == "frozen_blocks":
        return False
    if part == "head" and not config.loss.ntp_weight:
        return False
    if part in ("embed", "head"):
        return not given.arch.freeze_embeddings
    return not given.arch.lora.rank or "_lora_" in leaf


def param_axes(towers: Towers, config: Config) -> dict:
    """Logical axis names of every parameter, as `init_params` nests them."""
    axes = {"gen": towers.gen.logical_axes(), "nsp": {}}
    if not towers.tied:
        axes["ctx"] = towers.ctx.logical_axes()
    if towers.projects or config.ctx.rotate:
        axes["ctx"]["projection"] = ("embed", None)
    if config.loss.learn_temperature:
        axes["nsp"]["log_temperature"] = ()
        if config.loss.contrastive == "sigmoid":
            axes["nsp"]["bias"] = ()
    return axes


def init_state(params: dict, key: jax.Array, tx: optax.GradientTransformation, config: Config):
    """A fresh state around parameters."""
    shape, width = batch_shape(config), params["gen"]["embed"]["table"].shape[1]
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=tx.init(trainable(params, config)),
        bank=bank_lib.init(config.bank, shape, width),
        ema_ctx=_averaged(params, config) if config.bank.ema_decay else None,
        skipped=Skipped(jnp.int32(0), jnp.int32(0)),
        key=key,
    )


def fresh_state(config: Config, towers: Towers, tx, pretrained: dict | None = None) -> TrainState:
    """Step 0; random where `pretrained` has nothing."""
    key_params, key_state = jax.random.split(jax.random.key(config.seed))
    params = overlaid(init_params(key_params, towers, config), pretrained or {})
    return init_state(params, key_state, tx, config)


def objective(
    trained: dict,
    state: TrainState,
    batch: Batch,
    towers: Towers,
    config: Config,
    pad_id: int,
    factors: Factors | None = None,
) -> tuple[jax.Array, cosup.Terms]:
    """The loss of a batch at `state`, its trained parameters replaced by `trained`, and `factors`
    in place of those of config.loss; compat=official, which fixes these, ignores them."""
    params = overlaid(state.params, trained)
    if config.compat == "official":
        return official.loss(params, batch, towers, pad_id, config)
    return cosup.loss(params, batch, state.bank, state.step, towers, config, factors)


def train_step(
    state: TrainState,
    batch: Batch,
    factors: Factors,
    *,
    towers: Towers,
    tx: optax.GradientTransformation,
    config: Config,
    pad_id: int = 0,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update, or none if loss or gradient is not finite: then all but the count of such steps
    stays as it was, bit by bit. Pure; the bank is scored as it stood and filled afterwards.
    """
    trained = trainable(state.params, config)
    loss = lambda trained: objective(trained, state, batch, towers, config, pad_id, factors)
    (total, found), grads = jax.value_and_grad(loss, has_aux=True)(trained)
    updates, opt_state = tx.update(grads, state.opt_state, trained)
    good = jnp.isfinite(total) & jnp.isfinite(optax.tree.norm(grads))
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
    updated = optax.apply_updates(trained, updates)
    if "nsp" in updated:
        updated |= {"nsp": nsp.within_range(updated["nsp"])}
    trained = keep(updated, trained)
    params = overlaid(state.params, trained)
    skipped = Skipped(
        total=state.skipped.total + ~good,
        in_a_row=jnp.where(good, 0, state.skipped.in_a_row + 1),
    )
    live, ema_ctx = found.live, state.ema_ctx
    if ema_ctx is not None:
        averaged = overlaid(towers.ctx_params(state.params), ema_ctx)
        live = cosup.condense(averaged, batch, state.step, towers, config)
        decay = config.bank.ema_decay
        average = lambda old, new: decay * old + (1 - decay) * new
        ema_ctx = keep(jax.tree.map(average, ema_ctx, _averaged(params, config)), ema_ctx)
    metrics = found.metrics | {
        f"grad/norm_{name}": optax.tree.norm(grads[name])
        for name in ("gen", "ctx")
        if name in grads
    }
    metrics |= {"skipped/total": skipped.total, "skipped/in_a_row": skipped.in_a_row}
    return (
        state.replace(
            step=state.step + 1,
            params=params,
            opt_state=keep(opt_state, state.opt_state),
            bank=bank_lib.fill(state.bank, live, found.asked, state.step, good),
            ema_ctx=ema_ctx,
            skipped=skipped,
        ),
        metrics,
    )


def state_shardings(abstract: TrainState, mesh: Mesh, towers: Towers, config: Config) -> TrainState:
    """A NamedSharding for every leaf of the state; optimizer moments lie as their parameters do.

    Raises UserError if an axis of the mesh leaves more than 5 % of the parameter bytes whole.
    """
    params = sharding.tree_shardings(mesh, param_axes(towers, config), abstract.params)
    for axis, share in sharding.replicated_share(params, abstract.params).items():
        if share > 0.05:
            raise UserError(
                f"config.mesh.{axis} would leave {share:.0%} of the parameter bytes whole on each "
                f"of its {mesh.shape[axis]} devices; choose a size that divides width, heads and "
                "mlp_width"
            )
    by_path = {_keys(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def like_param(path, leaf):
        keys = _keys(path)
        owner = next((by_path[keys[i:]] for i in range(len(keys)) if keys[i:] in by_path), None)
        return owner if owner is not None else sharding.replicated(mesh)

    bank = bank_lib.logical_axes(abstract.bank)
    return TrainState(
        step=sharding.replicated(mesh),
        params=params,
        opt_state=jax.tree_util.tree_map_with_path(like_param, abstract.opt_state),
        bank=bank and sharding.tree_shardings(mesh, bank, abstract.bank),
        ema_ctx=abstract.ema_ctx and _averaged(params, config),
        skipped=Skipped(sharding.replicated(mesh), sharding.replicated(mesh)),
        key=sharding.replicated(mesh),
    )


def compile_step(
    mesh: Mesh, shardings: TrainState, **parts: Any
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """`train_step` compiled for each shape of batch when it first comes: explicit shardings, the
    old state's memory given to the new one, the factors of config.loss for its last argument.

    Args:
      mesh: where it runs.
      shardings: of the state, from `state_shardings`.
      parts: towers, tx, config, pad_id of `train_step`.
    """
    whole, factors = sharding.replicated(mesh), Factors.of(parts["config"].loss)
    jitted = jax.jit(
        functools.partial(train_step, **parts),
        in_shardings=(shardings, sharding.rows(mesh), whole),
        out_shardings=(shardings, whole),
        donate_argnums=0,
    )
    programs = {}  # by the lengths of Gen and Ctx rows
    lower = lambda state, batch: jitted.lower(state, batch, factors)
    put = lambda x: jax.make_array_from_callback((), whole, lambda _: x)
    placed = functools.cache(lambda: jax.tree.map(put, factors))

    def step(state: TrainState, batch: Batch):
        lengths = batch.gen_tokens_BxT.shape[1], batch.ctx_tokens_UxL.shape[1]
        if lengths not in programs:
            with jax.set_mesh(mesh):
                programs[lengths] = lower(state, batch).compile()
            release_memory()
        return programs[lengths](state, batch, placed())

    step.lower = lower
    return step


def _keys(path) -> tuple[str, ...]:
    return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
