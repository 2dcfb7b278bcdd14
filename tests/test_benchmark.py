"""What --mode=benchmark measures."""

import dataclasses
import json
import math
import time

import jax
import pytest
from test_validate import rows, write

from cosup_jax import benchmark
from cosup_jax.config import Config
from cosup_jax.costs.roofline import Chip
from cosup_jax.data.batch import batch_shape
from cosup_jax.dotted import replace_dotted
from cosup_jax.errors import UserError
from cosup_jax.speed import clock, curves, serving
from cosup_jax.speed.clock import Figure

CHIP = Chip("toy", 2e12, 1e12, 1e9, ((2.0**20, 1e10), (2.0**24, 5e9)), 0.0)
SMALL = {
    **{"gen.arch.layers": 1, "gen.arch.width": 16, "gen.arch.mlp_width": 16, "bank.size": 64},
    **{"generate.batch_size": 2, "generate.context_tokens": 256, "generate.max_tokens": 3},
    **{"bank.kind": "passage", "num_steps": 4},
}


def measured(path, **counts):
    """The rows by name, of a benchmark whose reader takes 1,000 s for its first batch."""
    config = write(path, *rows())
    for key, value in SMALL.items():
        config = replace_dotted(config, key, value)
    batches, now, late_s = benchmark.pipeline.batches, time.perf_counter, []

    def slow_start(*args):
        late_s.append(1000.0)
        yield from batches(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark.pipeline, "batches", slow_start)
        patch.setattr(benchmark.time, "perf_counter", lambda: now() + sum(late_s))
        patch.setattr(benchmark.roofline, "measured", lambda device: CHIP)
        benchmark.benchmark(config, str(path / "work"), **counts)
    kept = json.loads((path / "work/benchmark.json").read_text())
    assert kept["chip"]["f32_flops"] == 1e12
    return config, {row["what"].strip(): Figure(**row) for row in kept["figures"]}


def test_the_clock_starts_after_the_first_batch(tmp_path, capsys, monkeypatch):
    """Bug: the seconds that workers take to start counted as reading, so that fewer batches give
    a lower rate; or nothing to compare the rates with; or rows of what was not asked for; or a
    slope that one device has not ends the mode, as JSON has no such number."""
    nothing = {"steps": 0, "passages": 0, "vectors": 0, "answers": 0}
    monkeypatch.setattr(curves, "_points", lambda *_: iter(()))
    _, found = measured(tmp_path, batches=3, curves="devices", **nothing)
    assert found["reading 3 batches"].value > 10 and len(found) == 3
    assert found["devices"].value is None
    reached = "machine: one toy does 2,000 GFLOP/s in bfloat16 and 1,000 in float32; reads and "
    assert reached + "writes, in GB/s: 1 MiB: 10.0, 16 MiB: 5.0\n" in capsys.readouterr().out


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark")
    return measured(path, steps=3, batches=3, passages=50, vectors=0, answers=3)


@pytest.mark.slow
def test_rates_of_a_step_are_of_the_same_step(table):
    """Bug: rates of other seconds than the step's, or from its compilation on; padding that
    counts what is read; tokens of other batches than those trained on."""
    config, found = table
    shape, step_s = batch_shape(config), found["train step"].value
    read = found["tokens trained"].value * step_s
    in_batches = int(found["reading 3 batches"].more.partition(" ")[0].replace(",", ""))
    assert read == pytest.approx(in_batches / 3, rel=1e-6)  # each has all of this small set
    padding = 1 - read / (shape.B * shape.T + shape.U * shape.L)
    assert found["padding"].value == pytest.approx(100 * padding, abs=0.2)
    examples = found["examples trained"].value * step_s
    assert examples == pytest.approx(round(examples)) and examples >= 1
    assert 0 < found["waiting for data"].value < 100 and step_s < 100


@pytest.mark.slow
def test_parts_of_a_step_make_up_the_step(table):
    """Bug: shares of another whole; a bank that is on and not told."""
    _, found = table
    names = ("forward, both towers", "losses, forward", "backward", "optimizer", "bank")
    assert sum(found[name].value for name in names) == pytest.approx(100)


@pytest.mark.slow
def test_encoding_and_answering_count_what_was_done(table):
    """Bug: passages asked for, where there were fewer; a rate without its questions."""
    _, found = table
    assert found["encoding"].more.startswith("8 passages of ")  # all there are
    assert found["answering"].more.startswith("3 of them, 3 at once in 256 tokens of context, 1.0")


def test_medians_of_rounds_without_the_first(monkeypatch):
    """Bug: compilation in the median; one way's rounds all before the other's."""
    ticks, order = iter([0, 9, 10, 19, 20, 21, 30, 32, 40, 45, 50, 58, 60, 62, 70, 71]), []
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(ticks))
    ways = {name: lambda name=name: order.append(name) or 0 for name in "ab"}
    assert clock.in_turn(ways, rounds=3) == {"a": 2.0, "b": 2.0}
    assert "".join(order) == "abababab"


def test_search_is_timed_beside_the_roofline(monkeypatch):
    """Bug: a roofline of another size than the search: the share is then no share."""
    monkeypatch.setattr(serving, "SIDE", 16)
    monkeypatch.setattr(serving, "SEARCHED_FOR", (1, 3))
    ticks = iter(range(10**6))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(ticks))  # all take 1 s
    machine, one, three = serving.search_speed(2000, 4)
    flops = 2 * 16**3  # the largest product in 1 s
    assert (machine.value, one.value, three.value) == (2000 * 4 * 4 / 1e9, 1.0, 3.0)
    share = 2 * 3 * 2000 * 4 / flops
    assert three.more == f"1000 ms; multiplying alone 5859 ms: {share:.0%} of the roofline"


def test_a_slope_is_that_of_the_logarithms(monkeypatch):
    """Bug: a slope of seconds by size, which no two machines share; a size that is not grown."""
    seen, devices_there = [], jax.device_count()

    def cost(point, _):
        _, config, devices = point
        seen.append((config.batch_size, config.data.ctx_rows, config.bank.kind, len(devices)))
        return 3.0 * (config.batch_size / 8) ** 0.5 * (len(devices) / devices_there)

    monkeypatch.setattr(curves, "_seconds", cost)
    config = dataclasses.replace(Config(), num_steps=1)
    found = list(curves.curves(["batch", "bank", "devices"], config))
    assert [round(figure.value, 6) for figure in found] == [0.5, 0.0, 1.0]
    assert seen[:3] == [(B, B, "off", devices_there) for B in (8, 16, 32)]
    assert [kind for _, _, kind, _ in seen[3:6]] == ["passage"] * 3
    assert [count for *_, count in seen[6:]] == [1, 2, 4, 8]
    assert found[0].more == "8: 3 s, 16: 4.24 s, 32: 6 s"


def test_one_device_has_no_slope(monkeypatch):
    """Bug: a fit through one point."""
    monkeypatch.setattr(curves, "_seconds", lambda *_: 1.0)
    one = jax.devices()[:1]
    monkeypatch.setattr(curves.jax, "devices", lambda: one)
    (found,) = curves.curves(["devices"], Config())
    assert math.isnan(found.value) and "nothing to compare" in found.more


def test_curves_are_checked_before_anything_is_measured():
    """Bug: minutes of measuring before a typo is told, or a size that cannot be measured."""
    config = replace_dotted(replace_dotted(Config(), "batch_size", 64), "data.ctx_rows", 64)
    assert curves.check(" batch,bank ", config) == ["batch", "bank"]
    assert curves.check("", config) == [] and curves.check("all", config) == list(curves.CURVES)
    with pytest.raises(UserError, match="--curves=bach is none of batch"):
        curves.check("bach", config)
    halves = replace_dotted(replace_dotted(config, "mesh.data", 4), "mesh.fsdp", 2)
    assert curves.check("sequence", halves)
    with pytest.raises(UserError, match=r"devices at 1: config.mesh data=4 .* not make 1 devices"):
        curves.check("devices", halves)
    with pytest.raises(UserError, match=r"batch at 4: config.batch_size=4 is no multiple of 8"):
        curves.check("batch", replace_dotted(config, "batch_size", 8))
    large = replace_dotted(replace_dotted(config, "bank.kind", "passage"), "bank.size", 64)
    with pytest.raises(UserError, match=r"batch at 32: config.bank.size=64 is smaller than one"):
        curves.check("batch", large)


def test_what_is_added_is_told_beside_the_plain_step(monkeypatch):
    """Bug: a bank's cost beside a step that has a bank or micro-batches itself; seconds that other
    programs on the machine make longer."""
    seen = []

    def cost(point, which):
        seen.append(point.config)
        return (2.0, 2.1, 2.2, 3.0, 2.5, 2.6)[point.size] if which == "step_s" else 9.0

    monkeypatch.setattr(curves, "_seconds", cost)
    given = replace_dotted(replace_dotted(Config(), "bank.kind", "dual"), "micro_batches", 2)
    found = list(curves.curves(["added"], given))
    assert [round(figure.value, 6) for figure in found] == [5.0, 10.0, 50.0, 25.0, 30.0]
    kinds = ["off", "passage", "dual", "dual", "off", "off"]
    assert [config.bank.kind for config in seen] == kinds
    assert [config.micro_batches for config in seen] == [1, 1, 1, 1, 2, 4]
    assert found[0].more == "2.1 s for 2"


def test_figures_line_up():
    """Bug: a table whose columns wander."""
    lines = [str(Figure("a", 12345.6, "/s")), str(Figure("  b", 0.01234, "s", "more"))]
    assert lines[0].index("/s") == lines[1].index("s ") == 47
    assert "12,346" in lines[0] and "0.0123" in lines[1]
