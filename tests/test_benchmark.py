"""What --mode=benchmark measures."""

import re
import time

from test_validate import rows, write

from cosup_jax import benchmark


def test_the_clock_starts_after_the_first_batch(tmp_path, monkeypatch, capsys):
    """Bug: the seconds that workers take to start counted as reading, so that fewer batches give
    a lower rate."""
    batches, clock, late_s = benchmark.pipeline.batches, time.perf_counter, []

    def slow_start(*args):
        late_s.append(1000.0)
        yield from batches(*args)

    monkeypatch.setattr(benchmark.pipeline, "batches", slow_start)
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock() + sum(late_s))
    benchmark.benchmark(write(tmp_path, *rows()), str(tmp_path / "work"), steps=3)
    out = capsys.readouterr().out
    tokens, seconds = re.search(r"reading 3 batches: ([\d,]+) tokens in ([\d.]+) s", out).groups()
    assert float(seconds) < 500 and int(tokens.replace(",", "")) > 0
