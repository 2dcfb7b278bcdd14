"""--mode=benchmark: how fast this machine tokenises, reads, trains, encodes, searches, answers.

A table as it is measured, and WORKDIR/benchmark.json: the peaks of the machine and every row.
"""

import dataclasses
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable

import jax

from cosup_jax import assemble, sharding
from cosup_jax.config import Config
from cosup_jax.costs import roofline
from cosup_jax.data import pipeline, tokens
from cosup_jax.data.batch import Batch
from cosup_jax.data.plan import Plan
from cosup_jax.rehearsal import Rehearsal
from cosup_jax.runtime.workdir import Workdir
from cosup_jax.speed import curves as curves_lib
from cosup_jax.speed import serving, training
from cosup_jax.speed.clock import Figure, core_s


def benchmark(
    config: Config,
    workdir: str,
    steps: int = 10,
    batches: int = 400,
    passages: int = 1000,
    vectors: int = 1_000_000,
    width: int = 0,
    answers: int = 128,
    curves: str = "",
) -> None:
    """Prints the table. 0 of anything leaves its rows out.

    Args:
      steps: that are trained.
      batches: that are read.
      passages: that are encoded.
      vectors: float32 vectors that are searched.
      width: of these; 0: as Gen's.
      answers: questions that are answered.
      curves: names of `speed.curves.CURVES`, comma-separated, or all.

    Raises:
      UserError: whatever is wrong with config or data.
    """
    mesh = assemble.mesh_for(config)
    wanted = curves_lib.check(curves, config)
    with Workdir(workdir) as directory:
        data = assemble.read_sources(config, directory.path / "data")
        for line in assemble.refuse_bad_rows(data, config):
            print(line)
        _say("the machine's peaks")
        chip, found = roofline.measured(mesh.devices.flat[0]), []
        print(f"machine: {roofline.ceilings(chip)}", flush=True)

        def show(figures: Iterable[Figure]) -> None:
            for figure in figures:
                print(figure, flush=True)
                value = figure.value if math.isfinite(figure.value) else None  # as JSON has none
                found.append(figure._asdict() | {"value": value})
                kept = {"chip": dataclasses.asdict(chip), "figures": found}
                directory.write_json("benchmark.json", kept)

        given, config = config, assemble.resolve(config)
        tokenizers = assemble.read_tokenizers(config, directory.path, data)
        _say("tokenising")
        with tempfile.TemporaryDirectory(".part", ".benchmark.", directory.path) as fresh:
            store = lambda: tokens.tokenize(data.train, *tokenizers, config, fresh)
            show(_rate("tokenising", store, lambda s: len(s.gen_tokens) + len(s.ctx_tokens)))
        store = tokens.tokenize(data.train, *tokenizers, config, directory.path / "data")
        plan, rows = Plan(store, config), sharding.rows(mesh)
        if batches:
            _say("reading")
            plan.locate(batches + 1)  # planning is not what is measured
            reader = pipeline.batches(store, plan, config, rows, rows, 0, batches + 2)
            for _ in range(2):  # starts Grain and its workers, and compiles what it needs
                batch = jax.block_until_ready(next(reader))
            show(_rate(f"reading {batches} batches", lambda: sum(map(_tokens, reader)), int))
        job = Rehearsal(config, mesh, tokenizers)
        if steps or passages or answers:
            state = assemble.initial_state(config, job.towers, tokenizers, job.tx, job.state)
        if steps:
            _say("training")
            figures, state = training.step_speed(job, state, plan, steps, chip)
            show(figures)
            batch = pipeline.batch_at(store, plan, config, rows, rows, 0)
            show(training.shares(job, state, batch))
        if passages or answers:
            first, served = data.train[0][0], (tokenizers, job.towers, config, mesh, state.params)
        if passages:
            _say("encoding")
            show(serving.encode_speed(first, passages, *served, directory.path / "data"))
        if vectors:
            _say("searching")
            show(serving.search_speed(vectors, width or config.gen.arch.width))
        if answers:
            _say("answering")
            show(serving.answer_speed(first, answers, *served))
        show(curves_lib.curves(wanted, given))


def _say(what: str) -> None:
    """What is measured now, which can take a minute without a row."""
    print(f"measuring: {what}", file=sys.stderr, flush=True)


def _tokens(batch: Batch) -> int:
    jax.block_until_ready(batch)
    return int((batch.gen_segments_BxT > 0).sum()) + int((batch.ctx_segments_UxL > 0).sum())


def _rate(what: str, run: Callable, tokens_of: Callable) -> list[Figure]:
    clock_s, cores_s = time.perf_counter(), core_s()
    count = tokens_of(run())
    clock_s, cores_s = time.perf_counter() - clock_s, core_s() - cores_s
    more = f"{count:,} in {clock_s:.2f} s; {count / cores_s:,.0f}/s of CPU time"
    return [Figure(what, count / clock_s, "tokens/s", more)]
