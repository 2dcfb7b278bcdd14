"""How fast the train step is on real batches, and what its parts take."""

import dataclasses
import time

import jax
import jax.numpy as jnp

from cosup_jax import assemble, cosup, optim, sharding
from cosup_jax import step as step_lib
from cosup_jax.assemble import Tokenizers
from cosup_jax.config import Config
from cosup_jax.costs import roofline
from cosup_jax.costs.roofline import Chip
from cosup_jax.data import pipeline
from cosup_jax.data.batch import Batch
from cosup_jax.data.plan import Plan
from cosup_jax.rehearsal import model_flops
from cosup_jax.runtime.telemetry import Throughput
from cosup_jax.speed.clock import Figure, in_turn, peak_gib
from cosup_jax.step import TrainState


class Trainer:
    """A run without a workdir: its state of step 0 and its compiled step."""

    def __init__(self, config: Config, mesh, tokenizers: Tokenizers):
        """Reads pretrained weights where the config names them, and compiles."""
        self.config, self.mesh = config, mesh
        self.towers = assemble.make_towers(config, tokenizers)
        self.tx = optim.make(config, config.num_steps or 1, 1)
        self._pad_id = tokenizers.gen.pad
        abstract = assemble.abstract_state(config, self.towers, self.tx, mesh)
        self.flops = model_flops(config, self.towers, abstract)
        self.state = assemble.initial_state(config, self.towers, tokenizers, self.tx, abstract)
        self._places = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def step(self, config: Config | None = None):
        """The compiled step, of this run or of another config's."""
        config = config or self.config
        places = self._places if config.bank.kind != "off" else self._places.replace(bank=None)
        parts = {"towers": self.towers, "tx": self.tx, "config": config, "pad_id": self._pad_id}
        return step_lib.compile_step(self.mesh, places, **parts)

    def objective(self, trained: dict, state: TrainState, batch: Batch, config: Config):
        """As `step.objective`."""
        return step_lib.objective(trained, state, batch, self.towers, config, self._pad_id)


def step_speed(
    trainer: Trainer, plan: Plan, steps: int, chip: Chip
) -> tuple[list[Figure], TrainState]:
    """Trains `steps` steps as a run does. Returns what it saw, and the state."""
    config, mesh, store = trainer.config, trainer.mesh, plan.store
    rows, shape = sharding.rows(mesh), plan.shape
    stream = pipeline.batches(store, plan, config, rows, rows, 0, steps + 1)
    step_fn, state, batch = trainer.step(), trainer.state, next(stream)
    begun = time.perf_counter()
    state, metrics = step_fn(state, batch)
    jax.block_until_ready(metrics)
    first_s = time.perf_counter() - begun
    clock, read = Throughput(), 0
    for number, batch in enumerate(clock.waits_for(stream), 1):
        state, metrics = step_fn(state, batch)
        clock.queued(metrics["skipped/in_a_row"], *plan.volume(number))
        read += plan.volume(number)[0]
    jax.block_until_ready((state, metrics))
    found = {key.removeprefix("perf/"): value for key, value in clock.lap().items()}
    step_s, dtype = found["step_s"], config.gen.arch.dtype
    used, peak = roofline.utilisation(trainer.flops / mesh.size / step_s, chip, dtype)
    held_gib, where = peak_gib()
    room = steps * (shape.B * shape.T + shape.U * shape.L)
    return [
        Figure("train step", step_s, "s", f"mean of {steps}; first one {first_s:.1f} s, compiled"),
        Figure("  tokens trained", found["tokens_per_s"], "/s", "of both towers, padding aside"),
        Figure("  examples trained", found["examples_per_s"], "/s"),
        Figure("  model FLOPs utilisation", 100 * used, "%", f"of {peak}, padding counted as work"),
        Figure("  padding", 100 * (1 - read / room), "%"),
        Figure("  waiting for data", 100 * found["data_wait_share"], "%"),
        Figure("  peak memory", held_gib, "GiB", where),
    ], state


def shares(trainer: Trainer, state: TrainState, batch: Batch) -> list[Figure]:
    """What the parts of a step take, as differences of programs that do more and more of it."""
    config, towers, mesh = trainer.config, trainer.towers, trainer.mesh
    alone = dataclasses.replace(config, bank=dataclasses.replace(config.bank, kind="off"))
    mute = dataclasses.replace(alone, loss=dataclasses.replace(alone.loss, ntp_weight=0.0))
    bare = state.replace(bank=None)
    trained = step_lib.trainable(state.params, config)

    def read(params):
        asked = cosup.generate(params, batch, towers, mute)[-1]
        if not config.loss.trains_nsp:
            return asked.vector_QxD
        live = cosup.condense(towers.ctx_params(params), batch, state.step, towers, mute)
        return asked.vector_QxD, live.vector_KxCxD

    loss = lambda trained: trainer.objective(trained, bare, batch, alone)[0]
    places = jax.tree.map(lambda leaf: leaf.sharding, trained)  # as the optimizer takes them
    grads = jax.jit(jax.grad(loss), out_shardings=places)
    programs = {"towers": jax.jit(read), "loss": jax.jit(loss), "grads": grads}
    given = {"towers": state.params, "loss": trained, "grads": trained}

    def within(name):
        with jax.set_mesh(mesh):
            return programs[name](given[name])

    ways = {name: lambda name=name: within(name) for name in programs}
    ways["step"] = _steps(trainer.step(alone), bare, batch)
    if config.bank.kind != "off":
        ways["with bank"] = _steps(trainer.step(), state, batch)
    taken = in_turn(ways)
    whole = taken.get("with bank", taken["step"])
    parts = {
        "forward, both towers": taken["towers"],
        "losses, forward": taken["loss"] - taken["towers"],
        "backward": taken["grads"] - taken["loss"],
        "optimizer": taken["step"] - taken["grads"],
    }
    if "with bank" in taken:
        parts["bank"] = taken["with bank"] - taken["step"]
    more = f"of {whole:.3g} s, one step alone; medians of programs run in turn, and differences"
    return [
        Figure(f"  {name}", 100 * seconds / whole, "%", f"{seconds:.3g} s {more}")
        for name, seconds in parts.items()
    ]


def _steps(step_fn, state: TrainState, batch: Batch):
    """One step after the other, from a copy of `state`, for each gives its memory to the next."""
    held = [jax.tree.map(jnp.copy, state)]

    def run():
        held[0], metrics = step_fn(held[0], batch)
        return metrics

    return run
