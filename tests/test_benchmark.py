"""What --mode=benchmark measures."""

import json
import re
import time

from test_validate import rows, write

from cosup_jax import benchmark
from cosup_jax.config import replace_dotted
from cosup_jax.costs.roofline import Chip


def test_the_clock_starts_after_the_first_batch(tmp_path, monkeypatch, capsys):
    """Bug: the seconds that workers take to start counted as reading, so that fewer batches give
    a lower rate; or nothing to compare the rates with."""
    batches, clock, late_s = benchmark.pipeline.batches, time.perf_counter, []

    def slow_start(*args):
        late_s.append(1000.0)
        yield from batches(*args)

    monkeypatch.setattr(benchmark.pipeline, "batches", slow_start)
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock() + sum(late_s))
    config = write(tmp_path, *rows())
    small = {"gen.arch.layers": 1, "gen.arch.width": 16, "gen.arch.mlp_width": 16}
    small |= {"generate.batch_size": 2, "generate.context_tokens": 256, "generate.max_tokens": 3}
    for key, value in small.items():
        config = replace_dotted(config, key, value)
    chip = Chip("toy", 2e12, 1e12, 1e9, ((2.0**20, 1e10), (2.0**24, 5e9)), 0.0)
    monkeypatch.setattr(benchmark.roofline, "measured", lambda device: chip)
    benchmark.benchmark(config, str(tmp_path / "work"), steps=3, vectors=0, answers=3)
    out = capsys.readouterr().out
    reached = "machine: one toy does 2,000 GFLOP/s in bfloat16 and 1,000 in float32; reads and "
    assert reached + "writes, in GB/s: 1 MiB: 10.0, 16 MiB: 5.0\n" in out
    kept = json.loads((tmp_path / "work/benchmark.json").read_text())
    assert kept["chip"]["f32_flops"] == 1e12
    tokens, seconds = re.search(r"reading 3 batches: ([\d,]+) tokens in ([\d.]+) s", out).groups()
    assert float(seconds) < 500 and int(tokens.replace(",", "")) > 0
    assert "answering 3 questions, 8 at once in 256 tokens of context, 1.0 passages and 3" in out


def test_search_is_timed_beside_the_roofline(monkeypatch, capsys):
    """Bug: a roofline of another size than the search: the share is then no share."""
    monkeypatch.setattr(benchmark, "SIDE", 16)
    monkeypatch.setattr(benchmark, "SEARCHED_FOR", (1, 3))
    ticks = iter(range(10**6))
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(ticks))  # all take 1 s
    share = benchmark.search_speed(2000, 4)
    flops = 2 * 16**3  # the largest product in 1 s
    assert share == {Q: max(1.0, 2 * Q * 2000 * 4 / flops) for Q in benchmark.SEARCHED_FOR}
    assert "3 queries: 1000 ms, multiplying alone 5859 ms: 586% of the roofline" in (
        capsys.readouterr().out
    )
