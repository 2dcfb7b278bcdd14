"""Costly metrics, every so many steps and off the hot path: what the two losses do to the towers,
how stale the bank is, and whether it points where a large live batch would."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from cosup_jax import bank as bank_lib
from cosup_jax import cosup, nsp, sharding
from cosup_jax import step as step_lib
from cosup_jax.config import Config
from cosup_jax.contrast import EMPTY
from cosup_jax.cosup import Factors
from cosup_jax.data.batch import Batch
from cosup_jax.runtime.notices import safepoint
from cosup_jax.step import TrainState
from cosup_jax.towers import Towers

Metrics = dict[str, jax.Array]


class Probe:
    """Compiled when first called; changes nothing."""

    def __init__(
        self,
        mesh: Mesh,
        towers: Towers,
        config: Config,
        pad_id: int,
        batch_at: Callable[[int], Batch],
    ):
        """Args: as of `step.train_step`; batch_at gives the batch of any step, on the mesh."""
        self._mesh, self._config, self._batch_at = mesh, config, batch_at
        self._factors = Factors.of(config.loss)
        on_mesh = lambda f: jax.jit(f, out_shardings=sharding.replicated(mesh))
        self._losses = on_mesh(lambda *at: losses(*at, towers, config, pad_id))
        self._steps = on_mesh(lambda state: bank_lib.steps(state.bank, state.step, config.bank))
        self._drift = on_mesh(lambda *at: drift(*at, towers, config))
        self._directions = on_mesh(lambda *at: directions(*at, towers, config))
        self._refresh = jax.jit(lambda *at: refresh(*at, towers, config), donate_argnums=0)

    def __call__(self, state: TrainState, step: int) -> Metrics:
        """Metrics at `state`, which has taken `step` steps, on the batch that comes next."""
        config, batch = self._config, self._batch_at(step)
        with jax.set_mesh(self._mesh):
            metrics = self._losses(state, batch, self._factors)
            if state.bank is None:
                return metrics
            held = [set(np.asarray(steps_K).tolist()) - {EMPTY} for steps_K in self._steps(state)]
            if held[0]:
                oldest = min(held[0])
                metrics |= self._drift(state, self._batch_at(oldest), oldest)
            if config.log.probe_bank and held[0] and step >= config.bank.start_step:
                fresh = jax.tree.map(jnp.copy, state.bank)
                for past in sorted(set.union(*held)):
                    safepoint()
                    fresh = self._refresh(fresh, state.params, self._batch_at(past), past)
                metrics |= self._directions(state, fresh, batch, self._factors)
        return metrics


def losses(
    state: TrainState, batch: Batch, factors: Factors, towers: Towers, config: Config, pad_id: int
) -> Metrics:
    """Gradient norm of each loss in each tower, unweighted, and how the two meet in Gen.

    `grad/nsp_over_ntp_gen` is the ratio as trained, weights included.
    """

    def both(trained):
        found = step_lib.objective(trained, state, batch, towers, config, pad_id, factors)[1]
        return found.ntp, found.nsp

    trained = step_lib.trainable(state.params, config)
    _, pull = jax.vjp(both, trained)
    one, none = jnp.float32(1), jnp.float32(0)
    (of_ntp,), (of_nsp,) = pull((one, none)), pull((none, one))
    metrics = {}
    if config.loss.ntp_weight and "gen" in trained:
        metrics["grad/norm_ntp_gen"] = ntp_gen = optax.tree.norm(of_ntp["gen"])
    if config.loss.trains_nsp:
        for tower in ("gen", "ctx"):
            if tower in trained:
                metrics[f"grad/norm_nsp_{tower}"] = optax.tree.norm(of_nsp[tower])
    if metrics.keys() >= {"grad/norm_ntp_gen", "grad/norm_nsp_gen"}:
        weight = cosup.nsp_weight(state.step, config.loss, factors) / factors.ntp_weight
        metrics["grad/nsp_over_ntp_gen"] = weight * _ratio(metrics["grad/norm_nsp_gen"], ntp_gen)
        metrics["grad/cosine_ntp_nsp_gen"] = _cosine(of_ntp["gen"], of_nsp["gen"])
    return metrics


def drift(state: TrainState, batch: Batch, step, towers: Towers, config: Config) -> Metrics:
    """Mean cosine of what `step` stored against its batch encoded now, and the ages in the bank."""
    live = cosup.condense(towers.ctx_params(state.params), batch, step, towers, config)
    stored_CxD, there_C = bank_lib.stored(state.bank, step)
    cosine_C = jax.vmap(_cosine)(stored_CxD, live.vector_KxCxD[0])
    age, count = bank_lib.age(state.bank, state.step, config.bank)
    return {
        "bank/drift_cosine": jnp.mean(cosine_C, where=there_C),
        "bank/drift_age": jnp.float32(state.step - step),
        "bank/mean_age": age,
        "bank/passages": count,
    }


def refresh(bank, params: dict, batch: Batch, step, towers: Towers, config: Config) -> Any:
    """The bank with what `step` stored encoded anew."""
    *_, asked = cosup.generate(params, batch, towers, config)
    live = cosup.condense(towers.ctx_params(params), batch, step, towers, config)
    return bank_lib.fill(bank, live, asked, step, jnp.bool_(True))


def directions(
    state: TrainState, fresh, batch: Batch, factors: Factors, towers: Towers, config: Config
) -> Metrics:
    """Cosine of the NSP gradient of the live vectors with that of one large live batch, for every
    kind of bank that can be had from a dual one.

    The large batch is this one and all that the bank holds, encoded now (`fresh`).
    """
    *_, asked = cosup.generate(state.params, batch, towers, config)
    params = towers.ctx_params(state.params)
    live = cosup.condense(params, batch, state.step, towers, config)
    scale = nsp.scale_of(state.params["nsp"], config.loss, factors.temperature)

    def gradient(bank):
        def loss(queries_QxD, passages_KxCxD):
            rows = asked._replace(vector_QxD=queries_QxD)
            columns = live.replace(vector_KxCxD=passages_KxCxD)
            return cosup.next_sequence(rows, columns, bank, state.step, scale, config)[0]

        return jax.grad(loss, argnums=(0, 1))(asked.vector_QxD, live.vector_KxCxD)

    wanted, metrics = gradient(fresh), {}
    kinds = {"off": None, "passage": state.bank._replace(queries=None), "dual": state.bank}
    for kind, bank in kinds.items():
        for name, a, b in zip(("queries", "passages"), gradient(bank), wanted, strict=True):
            metrics[f"bank/direction_{name}_{kind}"] = _cosine(a, b)
    return metrics


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    return a / jnp.maximum(b, 1e-30)


def _cosine(a: Any, b: Any) -> jax.Array:
    return _ratio(optax.tree.vdot(a, b), optax.tree.norm(a) * optax.tree.norm(b))
