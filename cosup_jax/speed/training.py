"""How fast the train step is on real batches, and what its parts take."""

import dataclasses
import time

import jax
import jax.numpy as jnp

from cosup_jax import cosup, sharding
from cosup_jax import step as step_lib
from cosup_jax.costs import roofline
from cosup_jax.costs.roofline import Chip
from cosup_jax.data import pipeline
from cosup_jax.data.batch import Batch
from cosup_jax.data.plan import Plan
from cosup_jax.rehearsal import Rehearsal, model_flops
from cosup_jax.runtime.telemetry import Throughput
from cosup_jax.speed.clock import Figure, in_turn, peak_gib
from cosup_jax.step import TrainState


def step_speed(
    job: Rehearsal, state: TrainState, plan: Plan, steps: int, chip: Chip
) -> tuple[list[Figure], TrainState]:
    """Trains `steps` steps as a run does. Returns what it saw, and the state."""
    config, mesh, store = job.config, job.mesh, plan.store
    rows, shape = sharding.rows(mesh), plan.shape
    stream = pipeline.batches(store, plan, config, rows, rows, 0, steps + 1)
    step_fn, batch = job.step(), next(stream)
    begun = time.perf_counter()
    state, metrics = step_fn(state, batch)
    jax.block_until_ready(metrics)
    first_s = time.perf_counter() - begun
    clock, read = Throughput(), 0
    for number, batch in enumerate(clock.waits_for(stream), 1):
        state, metrics = step_fn(state, batch)
        tokens, examples = plan.volume(number)
        clock.queued(metrics["skipped/in_a_row"], tokens, examples)
        read += tokens
    jax.block_until_ready((state, metrics))
    found = {key.removeprefix("perf/"): value for key, value in clock.lap().items()}
    step_s, dtype = found["step_s"], config.gen.arch.dtype
    flops = model_flops(config, job.towers, job.state) / mesh.size
    used, peak = roofline.utilisation(flops / step_s, chip, dtype)
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


def shares(job: Rehearsal, state: TrainState, batch: Batch) -> list[Figure]:
    """What the parts of a step take, as differences of programs that do more and more of it."""
    config, towers, mesh = job.config, job.towers, job.mesh
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

    how = (towers, alone, job.pad_id)
    loss = lambda trained: step_lib.objective(trained, bare, batch, *how)[0]
    places = jax.tree.map(lambda leaf: leaf.sharding, trained)  # as the optimizer takes them
    grads = jax.jit(jax.grad(loss), out_shardings=places)
    programs = {"towers": jax.jit(read), "loss": jax.jit(loss), "grads": grads}
    given = {"towers": state.params, "loss": trained, "grads": trained}

    def within(name):
        with jax.set_mesh(mesh):
            return programs[name](given[name])

    ways = {name: lambda name=name: within(name) for name in programs}
    ways["step"] = _steps(job.step(alone), bare, batch)
    if config.bank.kind != "off":
        ways["with bank"] = _steps(job.step(), state, batch)
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
