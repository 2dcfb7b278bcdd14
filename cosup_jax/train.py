"""The main job: train both towers, measure on held-out questions, checkpoint, report; resume."""

import collections
import functools
import importlib.metadata
import itertools
import time
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from cosup_jax import assemble, bank, nsp, optim, sharding
from cosup_jax import held_out as held_out_lib
from cosup_jax import step as step_lib
from cosup_jax.answer import records
from cosup_jax.answer.sample import Sample
from cosup_jax.assemble import Sources, Tokenizers
from cosup_jax.checkpoint import Checkpointer, Restored, check_readable
from cosup_jax.config import Config, to_dict
from cosup_jax.contract import weights_digest
from cosup_jax.data import pipeline, tokens
from cosup_jax.data.batch import BatchShape
from cosup_jax.data.plan import Plan
from cosup_jax.dotted import differing
from cosup_jax.errors import UserError
from cosup_jax.held_out import Evaluator, HeldOut
from cosup_jax.probe import Probe
from cosup_jax.report import page
from cosup_jax.runtime import liveness, observe, processes
from cosup_jax.runtime.notices import Interrupted, Notices
from cosup_jax.runtime.telemetry import Progress, Recorder, Throughput
from cosup_jax.runtime.workdir import Workdir, checkpoints
from cosup_jax.step import TrainState
from cosup_jax.wording import counted

STEPS_AHEAD = 2  # queued behind the running one; more would only hold batches in memory


class Job(NamedTuple):
    """Everything a run holds still."""

    config: Config
    workdir: Workdir
    mesh: Mesh
    data: Sources
    tokenizers: Tokenizers
    store: tokens.TokenStore
    plan: Plan
    held_out: list[HeldOut]
    num_steps: int


def train(config: Config, workdir: str) -> str:
    """Runs to the end, or goes on from the newest checkpoint; says so if there is nothing to do.

    Returns "finished", or "stopped" where it was told to stop and has saved.

    Raises UserError for whatever is wrong with config, data or workdir.
    """
    mesh = assemble.mesh_for(config)
    with Notices() as told, Workdir(workdir) as directory:
        check_readable(checkpoints(directory.path))
        status = directory.read_status()
        given = to_dict(config)
        if status and status["state"] == "finished" and given in _read_configs(directory):
            _say(f"{directory.url} is finished: {status['step']} steps, see report.html")
            return "finished"
        job = _prepare(config, directory, mesh)
        step, stopped = _run(job, given, told)
        _say(
            f"stopped at step {step} of {job.num_steps}; the same command goes on from there"
            if stopped
            else f"done: {directory.url}/report.html"
        )
        return "stopped" if stopped else "finished"


def _prepare(config: Config, workdir: Workdir, mesh: Mesh) -> Job:
    _say("reading data")
    directory = workdir.path / "data"
    data = assemble.read_sources(config, directory)
    for line in assemble.refuse_bad_rows(data, config):
        _say(line)
    assemble.refuse_untrained(data)
    config = assemble.resolve(config)
    tokenizers = assemble.read_tokenizers(config, workdir.path, data)
    workdir.publish("tokenizer")
    store = tokens.tokenize(data.train, *tokenizers, config, directory)
    plan = Plan(store, config)
    made = {"plan of the steps": plan.fingerprint}
    processes.agree("what it made of the data", made, processes.BARRIER_SECONDS)
    held_out = held_out_lib.held_out_sets(
        data.held_out, tokenizers, config, directory, store, plan.left_out
    )
    filled = ", ".join(f"{name} {share:.0%}" for name, share in plan.utilization().items())
    _say(f"{store.num_examples:,} examples, {store.num_passages:,} passages; filled: {filled}")
    if len(plan.left_out) or store.dropped:
        _say(f"left out: {len(plan.left_out)} that fit no row, {store.dropped} without [Ret]")
    for part in held_out:
        seen = "no [Ret]"
        if len(part.seen):
            seen = f"training reads the passages of {part.seen.mean():.0%} as evidence"
        _say(f"{part.name}: {counted(len(part.examples), 'question')}, {seen}")
    num_steps = config.num_steps or plan.total_steps(config.num_epochs)
    return Job(config, workdir, mesh, data, tokenizers, store, plan, held_out, num_steps)


def _run(job: Job, given: dict[str, Any], told: Notices) -> tuple[int, bool]:
    """Trains from wherever the workdir stands; returns the steps taken, and if it was stopped.

    Nothing in the workdir changes before its checkpoint is accepted.
    """
    config, mesh = job.config, job.mesh
    towers = assemble.make_towers(config, job.tokenizers)
    # Only this schedule asks for the whole first epoch of the plan before the first step.
    epoch_steps = job.plan.steps_per_epoch(0) if config.optim.schedule == "epoch" else 0
    tx = optim.make(config, job.num_steps, epoch_steps)
    abstract = assemble.abstract_state(config, towers, tx, mesh)
    checkpointer = Checkpointer(checkpoints(job.workdir.path), config.checkpoint.keep)
    restored = checkpointer.restore(abstract, {"plan": job.plan.fingerprint}, to_dict(config))
    start = restored.step if restored else 0
    if start > job.num_steps:
        raise UserError(
            f"{job.workdir.path} is at step {start}, beyond the {job.num_steps} of this config; "
            "raise config.num_steps or give another --workdir"
        )
    if restored:
        assemble.check_contract(config, job.tokenizers, restored.meta)
        _check_unfinished(job, restored)
        for key, (was, now) in _changes(restored.meta["config"], to_dict(config)).items():
            _say(f"resuming with config.{key}={now!r}, was {was!r}")
    job.workdir.write_json("config.json", to_dict(config))
    job.workdir.write_json(".given.json", given)
    job.workdir.status("running", start)
    try:
        step, stop = _go_on(job, towers, tx, abstract, restored, checkpointer, told)
    except BaseException as error:
        liveness.await_news(error)
        state = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
        job.workdir.status(state, max([start, *checkpointer.steps()]))
        raise
    job.workdir.status("stopped" if stop else "finished", step)
    return step, stop


def _go_on(job: Job, towers, tx, abstract, restored: Restored | None, checkpointer, told: Notices):
    """From an accepted checkpoint, or from the start; returns as `_run`."""
    config, mesh, start = job.config, job.mesh, restored.step if restored else 0
    fresh = lambda: assemble.initial_state(config, towers, job.tokenizers, tx, abstract)
    state = restored.state if restored else fresh()
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
    _say(f"{count:,} parameters on {counted(mesh.size, 'device')}; step {start} of {job.num_steps}")
    if abstract.bank is not None:
        _say_bank(abstract, job.plan.shape, config)
    recorder = Recorder(job.workdir.path, restored and restored.step)
    evaluator = Evaluator(mesh, towers, config)
    parts = {"towers": towers, "tx": tx, "config": config, "pad_id": job.tokenizers.gen.pad}
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step_fn = step_lib.compile_step(mesh, places, **parts)
    rows = sharding.rows(mesh)
    batch_at = functools.partial(pipeline.batch_at, job.store, job.plan, config, rows, rows)
    probe = Probe(mesh, towers, config, job.tokenizers.gen.pad, batch_at)
    sample = Sample(job.held_out, mesh, towers, config, job.tokenizers.gen)
    measure = lambda state, step: _measure(job, evaluator, sample, probe, state, step)
    if not restored:
        recorder.record(0, measure(state, 0))
        recorder.flush()
    elif restored.meta.get("owes_measures"):  # a stop has cut them short
        recorder.amend(start, measure(state, start))
    state, step, stop = _loop(job, state, start, step_fn, recorder, measure, checkpointer, told)
    checkpointer.wait()
    if not stop:
        _finish(job, state, sample, count)
    recorder.close()
    checkpointer.close()
    return step, stop


def _loop(job: Job, state: TrainState, start, step_fn, recorder, measure, checkpointer, told):
    """The training loop; the host waits where STEPS_AHEAD more steps are queued, and to save."""
    config, num_steps = job.config, job.num_steps
    clock = Throughput(_first_start(job.workdir), recorder.busy_s)
    _say("compiling the step")
    progress, began_s = Progress(num_steps, start), time.time()
    told.enter_loop(lambda: _abandoned(job, checkpointer))
    profile = observe.Profile(config.log, job.workdir.path)
    hang = observe.HangWatch(config.log.hang_seconds, job.workdir.path)
    rows = sharding.rows(job.mesh)
    stream = pipeline.batches(job.store, job.plan, config, rows, rows, start, num_steps)
    step, stop, ahead = start, False, collections.deque()
    for batch in clock.waits_for(stream):
        profile.before(step + 1)
        state, metrics = step_fn(state, batch)
        profile.after(step + 1, metrics)
        ahead.append(metrics)
        if len(ahead) > STEPS_AHEAD:
            _check_finite(ahead.popleft(), job, checkpointer)
        clock.look()
        clock.queued(metrics["skipped/in_a_row"], *job.plan.volume(step))
        checkpointer.check()
        step += 1
        progress.advance(step)
        hang.step()
        if step == start + 1:
            jax.block_until_ready(metrics)
            progress.show(step, f"after {time.time() - began_s:.0f} s, compilation included")
            clock.restart()
        last, stop = step == num_steps, told.to_stop()
        measures = _evaluates(job, step) or _answers(job, step) or _probes(job, step)
        scheduled = measures or step % config.checkpoint.every_steps == 0
        pauses = scheduled or stop
        if step % config.log.every_steps == 0 or scheduled:  # a stop leaves no line of its own
            waited = recorder.record(step, metrics)  # for the line before, not for this step
            _show(progress, waited)
            if pauses:
                jax.block_until_ready(metrics)
            recorder.record(step, clock.lap() | observe.device_memory())
        if measures and not stop:
            try:
                with told.interruptible():
                    recorder.record(step, measure(state, step))
            except Interrupted:
                stop = True
        if pauses:
            _show(progress, recorder.flush())  # a checkpoint's lines are on disk before it is
            job.workdir.publish("metrics.jsonl", "tensorboard")
        if last or stop or step % config.checkpoint.every_steps == 0:
            checkpointer.save(step, state, _meta(job, state, measures and stop))
            job.workdir.status("running", step)
        if pauses:
            clock.restart()
        if stop:
            break
    stop = stop or told.to_stop()  # while the last step was measured and saved
    told.leave_loop()
    for watcher in (progress, profile, hang):
        watcher.close()
    for metrics in ahead:
        _check_finite(metrics, job, checkpointer)
    return state, step, stop


def _evaluates(job: Job, step: int) -> bool:
    return step == job.num_steps or step % job.config.eval.every_steps == 0


def _answers(job: Job, step: int) -> bool:
    last, settings = step == job.num_steps, job.config.eval
    return settings.answers > 0 and (
        last or (step > 0 and step % settings.answers_every_steps == 0)
    )


def _probes(job: Job, step: int) -> bool:
    every = job.config.log.probe_every_steps
    return every > 0 and step % every == 0 and step < job.num_steps


def _measure(
    job: Job, evaluator: Evaluator, sample: Sample, probe: Probe, state: TrainState, step: int
) -> dict[str, Any]:
    """What is due at this step beside the step's own metrics."""
    found = evaluator.scores(state.params, job.held_out) if _evaluates(job, step) else {}
    found |= sample.metrics(step, state.params) if _answers(job, step) else {}
    return found | (probe(state, step) if _probes(job, step) else {})


def _check_finite(metrics: dict[str, jax.Array], job: Job, checkpointer: Checkpointer) -> None:
    """Waits for a step; raises UserError if it is one bad step too many."""
    in_a_row = int(jax.block_until_ready(metrics)["skipped/in_a_row"])
    if in_a_row >= job.config.optim.max_bad_steps:
        raise UserError(
            f"loss or gradient was not finite in {in_a_row} steps in a row, none of which changed "
            f"anything; checkpoints are at steps {checkpointer.steps()}; lower "
            "config.optim.gen_learning_rate and ctx_learning_rate, or raise warmup_steps"
        )


def _abandoned(job: Job, checkpointer: Checkpointer) -> str:
    """Closes status.json where the run ends without saving; says what is left."""
    kept = checkpointer.steps()
    job.workdir.status("stopped", max(kept, default=0))
    return "stopped without saving: " + (
        f"the checkpoint of step {max(kept)} is kept" if kept else "there is no checkpoint yet"
    )


def _finish(job: Job, state: TrainState, sample: Sample, count: int) -> None:
    """Baselines, answers to read, report.html, closing table."""
    path = job.workdir.path
    baselines = held_out_lib.baselines(job.held_out, job.store, job.config)
    answers = sample.at(job.num_steps, state.params)
    if jax.process_index() != 0:
        return
    facts = {
        "steps": f"{job.num_steps:,}",
        "parameters": f"{count:,}",
        "devices": f"{job.mesh.size} x {job.mesh.devices.flat[0].device_kind}",
        "training examples": f"{job.store.num_examples:,}",
        "data": ", ".join(f"{d.name} {d.version}" for d, _ in job.data.train),
        "versions": ", ".join(
            f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "optax")
        ),
    }
    job.workdir.write_json("evaluation/training.json", {"facts": facts, "baselines": baselines})
    lines = records.lines(itertools.chain(*answers.values()))
    job.workdir.write_text("evaluation/answers.jsonl", lines)
    run = page.read_run(path, sample.shown)
    page.write_report(path / "report.html", run)
    rows = page.closing_rows(run["metrics"], run["baselines"])
    print(page.closing_table(rows), flush=True)


def _meta(job: Job, state: TrainState, owes_measures: bool) -> dict[str, Any]:
    towers = {name: state.params[name] for name in state.params if name != "nsp"}
    digest, loss = weights_digest(towers), job.config.loss
    scale = nsp.scale_of(state.params["nsp"], loss, loss.temperature)
    temperature = float(scale.temperature) if loss.learn_temperature else None
    contract = assemble.embedding_contract(job.config, job.tokenizers, digest, temperature)
    return {
        "config": to_dict(job.config),
        "contract": contract.to_dict(),
        "gen_tokenizer": job.tokenizers.gen.fingerprint,  # the contract has Ctx's
        "fingerprint": {"plan": job.plan.fingerprint},
        "owes_measures": owes_measures,  # of this step, to whoever goes on from it
    }


def _first_start(workdir: Workdir) -> float:
    """When the run was first started, Unix time in seconds."""
    path = workdir.path / ".started"
    if not path.is_file():
        workdir.write_text(".started", f"{time.time()}\n")
    try:
        return float(path.read_text()) if path.is_file() else time.time()
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}); delete it") from error


def _check_unfinished(job: Job, restored: Restored) -> None:
    """Raises UserError where other settings come to a run that has no step left to take."""
    changes = _changes(restored.meta["config"], to_dict(job.config))
    changed = ", ".join(f"config.{key}={v!r} (was {was!r})" for key, (was, v) in changes.items())
    finished = (job.workdir.read_status() or {}).get("state") == "finished"
    if finished and restored.step == job.num_steps and changed:
        raise UserError(
            f"{job.workdir.path} is finished at step {restored.step}: no step is left for "
            f"{changed}; raise config.num_steps to train on, or give another --workdir"
        )


def _changes(before: dict, now: dict) -> dict[str, tuple[Any, Any]]:
    """But for the group study, which no run reads: an arm is the same in every study's file."""
    changes = differing(before, now)
    return {key: pair for key, pair in changes.items() if not key.startswith("study.")}


def _say_bank(state: TrainState, shape: BatchShape, config: Config) -> None:
    """What the bank holds, and its FLOPs beside the layers' (6 for each weight and token)."""
    stored = bank.flops(state.bank, shape, config.loss.learn_temperature, config.loss.margin_mask)
    weights = lambda tower: sum(x.size for x in jax.tree.leaves(tower["blocks"]))
    ctx = state.params["gen" if config.tie_ctx_to_gen else "ctx"]
    layers = weights(state.params["gen"]) * shape.B * shape.T + weights(ctx) * shape.U * shape.L
    held = [f"{state.bank.passages.step_KxC.size:,} passages"]
    if state.bank.queries is not None:
        held.append(f"{state.bank.queries.step_KxC.size:,} queries")
    cost = f"{stored / 1e9:,.1f} GFLOP a step; the towers' layers take {6 * layers / 1e9:,.1f}"
    _say(f"bank of {' and '.join(held)}: {cost}")


def _show(progress: Progress, line: dict | None) -> None:
    if line is None:
        return
    short = {
        "ntp/nats_per_token": "ntp {:.3f}",
        "nsp/nats_per_ret": "nsp {:.3f}",
        "nsp/top1": "top-1 {:.2f}",
        "perf/tokens_per_s": "{:,.0f} tokens/s",
    }
    shown = [text.format(line[key]) for key, text in short.items() if line.get(key) is not None]
    recalls = {key.split("/")[1]: v for key, v in line.items() if key.endswith("/recall_at_1")}
    if len(recalls) > 3:  # the closing table has them all
        mean = sum(recalls.values()) / len(recalls)
        recalls = {f"mean of {len(recalls)} sets:": mean}
    shown += [f"{name} recall@1 {value:.3f}" for name, value in recalls.items()]
    progress.show(line["step"], "  ".join(shown))


def _read_configs(workdir: Workdir) -> list[Any]:
    """The run's config as it was asked for, and with shapes filled in."""
    names = (".given.json", "config.json")
    return [workdir.read_json(name) for name in names if (workdir.path / name).is_file()]


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)
