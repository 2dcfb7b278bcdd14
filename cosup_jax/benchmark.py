"""--mode=benchmark: how fast this machine tokenises, and reads batches from cached tokens."""

import resource
import tempfile
import time
from collections.abc import Callable

import jax

from cosup_jax import assemble, sharding
from cosup_jax.config import Config
from cosup_jax.data import pipeline, tokens
from cosup_jax.data.batch import Batch
from cosup_jax.data.plan import Plan
from cosup_jax.errors import UserError
from cosup_jax.workdir import Workdir


def benchmark(config: Config, workdir: str, steps: int = 400) -> None:
    """Prints tokens per second, by the clock and for each second of one core.

    Raises UserError for whatever is wrong with config or data.
    """
    if steps < 1:
        raise UserError("--steps=0 reads nothing; give at least 1")
    mesh = assemble.mesh_for(config)
    with Workdir(workdir) as directory:
        data = assemble.read_sources(config, directory.path / "data")
        for line in assemble.refuse_bad_rows(data, config):
            print(line)
        config = assemble.resolve(config)
        tokenizers = assemble.read_tokenizers(config, directory.path, data)
        with tempfile.TemporaryDirectory(dir=directory.path) as fresh:
            store = lambda: tokens.tokenize(data.train, *tokenizers, config, fresh)
            _print("tokenising", store, lambda found: len(found.gen_tokens) + len(found.ctx_tokens))
        store = tokens.tokenize(data.train, *tokenizers, config, directory.path / "data")
        plan, rows = Plan(store, config), sharding.rows(mesh)
        plan.locate(steps + 1)  # planning is not what is measured

        reader = pipeline.batches(store, plan, config, rows, rows, 0, steps + 2)
        for _ in range(2):  # starts Grain and its workers, and compiles what it needs
            jax.block_until_ready(next(reader))
        _print(f"reading {steps} batches", lambda: sum(map(_tokens, reader)), int)


def _tokens(batch: Batch) -> int:
    jax.block_until_ready(batch)
    return int((batch.gen_segments_BxT > 0).sum()) + int((batch.ctx_segments_UxL > 0).sum())


def _print(what: str, run: Callable, tokens_of: Callable) -> None:
    clock_s, core_s = time.perf_counter(), _core_s()
    count = tokens_of(run())
    clock_s, core_s = time.perf_counter() - clock_s, _core_s() - core_s
    print(
        f"{what}: {count:,} tokens in {clock_s:.2f} s, {count / clock_s:,.0f} tokens/s; "
        f"{core_s:.2f} s of cores, {count / core_s:,.0f} tokens/s for each",
        flush=True,
    )


def _core_s() -> float:
    """User and system time of this process and of workers that have ended, their start included."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)
