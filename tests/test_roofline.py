"""Seconds from work and peaks, against sums by hand; the peaks of this machine."""

import dataclasses
import os
import types

import jax
import jax.numpy as jnp
import pytest

from cosup_jax.costs import roofline
from cosup_jax.costs.kernels import Collective, Kernel, Product, Program
from cosup_jax.costs.roofline import Chip

CHIP = Chip(
    name="toy",
    bf16_flops=1000.0,
    f32_flops=500.0,
    capacity=1e9,
    memory=((10.0, 100.0), (1000.0, 10.0)),
    network_bytes=50.0,
    transposed=((1.0, 5.0),),
    launch_s=0.25,
    fresh=((10.0, 100.0), (1000.0, 10.0)),
)


def kernel(opcode="fusion", times=1, products=(), moved=0.0, turned=False, sent=()):
    return Kernel("k", opcode, "", times, products, moved, 0.0, turned, sent)


def seconds(*kernels):
    return roofline.estimate(Program(list(kernels), []), CHIP)


def test_a_kernel_takes_as_long_as_its_slower_side():
    """Bug: products and memory added up, or the element type's rate, the loop's count or the launch
    forgotten."""
    dot = Product(1, 10, 10, 10, "bf16")  # 2000 FLOPs: 2 s, and 4 s in float32
    fast, slow = dot, dot._replace(dtype="f32")
    found = seconds(
        kernel(times=3, products=(fast,), moved=10.0),  # 2 s against 0.1 s
        kernel(products=(slow,), moved=10000.0),  # 4 s against 1000 s
    )
    assert found.products_s == pytest.approx(6.0)
    assert found.memory_s == pytest.approx(1000.0)
    assert found.launch_s == pytest.approx(1.0)
    assert found.step_s == pytest.approx(1007.0)


def test_rate_depends_on_how_much_is_moved():
    """Bug: what fits a cache priced as main memory; no interpolation; transposes at full rate."""
    assert CHIP.traffic_s(5.0) == pytest.approx(0.05)
    assert CHIP.traffic_s(100.0) == pytest.approx(100 / 1000**0.5)  # halfway by logarithms
    assert CHIP.traffic_s(1e6) == pytest.approx(1e5)
    assert CHIP.traffic_s(10.0, transposes=True) == pytest.approx(2.0)
    assert CHIP.traffic_s(0.0) == 0.0


def test_what_is_sent_beside_other_work_is_not_added():
    """Bug: overlapped collectives and prefetches added to the step, or left out where they last
    longer than all the rest."""
    aside = Collective("all-gather", 8, 100.0, overlapped=True)  # 2 s
    alone = aside._replace(overlapped=False)
    work = kernel(moved=1000.0)  # 100 s, and a launch
    found = seconds(work, kernel("all-gather-start", 1, (), 1e9, False, (aside,)))
    assert found.step_s == pytest.approx(100.25) and found.hidden_network_s == pytest.approx(2.0)
    found = seconds(work, kernel("all-reduce", 2, (), 1e9, False, (alone,)))
    assert found.step_s == pytest.approx(104.25) and found.exposed_network_s == pytest.approx(4.0)
    found = seconds(work, kernel("fusion", 100, (), 0.0, False, (aside,)))
    assert found.step_s == pytest.approx(200.0)
    found = seconds(work, kernel("copy-start", 1, (), 5000.0))
    assert found.step_s == pytest.approx(600.0)


def test_temporaries_that_the_system_gives_anew_are_paid_for():
    """Bug: a third of a small step on a CPU, in which it touches new pages, forgotten; or added
    where memory is kept from step to step."""
    program = Program([kernel(moved=10.0)], [])
    found = roofline.estimate(program, CHIP, 10000.0)
    assert found.fresh_s == pytest.approx(1000.0)
    assert found.step_s == pytest.approx(0.1 + 0.25 + 1000.0)
    assert roofline.estimate(program, dataclasses.replace(CHIP, fresh=()), 10000.0).fresh_s == 0


def test_devices_without_links_share_their_memory():
    """Bug: collectives among CPU devices for nothing."""
    assert CHIP.sent_s(100.0) == pytest.approx(2.0)
    unlinked = dataclasses.replace(CHIP, network_bytes=0.0)
    assert unlinked.sent_s(10.0) == pytest.approx(0.1)


def test_what_comes_once_is_not_in_the_seconds_of_a_function(monkeypatch):
    """Bug: a call and new memory counted as work, which makes main memory a third as fast."""
    took = iter([1.0, 9.0])
    monkeypatch.setattr(roofline, "_least_s", lambda run, x: next(took))
    assert roofline.seconds(lambda x: x, None, repeats=4) == 2.0


def test_kernels_of_one_turn_share_its_seconds(monkeypatch):
    """Bug: the 12 us that a GPU takes from turn to turn counted for every kernel of 2 us; or one
    array worked on where several are counted."""
    took = []
    monkeypatch.setattr(roofline, "_least_s", lambda run, x: took.append(run()) or len(took) * 24)
    count = roofline.seconds(lambda x: x + 1, jnp.zeros(2), repeats=4, copies=3)
    assert count == 24 / (4 * 3)
    assert [x.tolist() for x in took[1]] == [[5, 5], [6, 6], [7, 7]]


def test_a_cpu_is_timed_by_what_its_cores_worked(monkeypatch):
    """Bug: seconds of one core for those of all; or time in which others ran."""
    worked = iter([(1.0, 2.0), (5.0, 6.0)])
    used = lambda who: types.SimpleNamespace(
        **dict(zip(("ru_utime", "ru_stime"), next(worked), strict=False))
    )
    monkeypatch.setattr(roofline.resource, "getrusage", used)
    monkeypatch.setattr(roofline.os, "sched_getaffinity", lambda pid: range(4))
    assert roofline.Watch(jax.devices("cpu")[0]).seconds() == 2.0


def test_devices_of_one_cpu_share_what_it_reaches(monkeypatch):
    """Bug: eight devices of two cores, each predicted as fast as both cores."""
    monkeypatch.setattr(roofline, "seconds", lambda function, x, *counts: 1.0)
    monkeypatch.setattr(roofline, "_once_s", lambda function, x: 3.0)
    monkeypatch.setattr(roofline.jax.random, "normal", lambda key, shape, dtype: jnp.zeros(shape))
    found = []
    for count in (1, 8):
        monkeypatch.setattr(roofline.jax, "local_device_count", lambda count=count: count)
        found.append(roofline.measured(jax.devices("cpu")[0]))
    one, eight = found
    assert one.f32_flops == 8 * eight.f32_flops == 2 * 1024**3
    assert one.capacity == 8 * eight.capacity
    for name in ("memory", "transposed", "fresh"):
        for whole, part in zip(getattr(one, name), getattr(eight, name), strict=True):
            assert whole == (part[0], 8 * part[1])
    assert one.memory[-1] == (2**27, 2.0**27) and one.fresh[-1] == (2**26, 2.0**25)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("cpu", None),
    ],
)
def test_published_peaks_by_the_name_that_jax_gives(kind, name):
    """Bug: a v5e taken for a v5p, whose name it begins with; a CPU for any of them."""
    found = roofline.published(kind)
    assert (found and found.name) == name


def test_utilisation_is_by_the_peak_of_the_dtype():
    """Bug: bfloat16 by float32's peak; a measured peak, below the data sheet's, that flatters."""
    assert roofline.utilisation(5e8, dataclasses.replace(CHIP, f32_flops=1e9), "float32")[0] == 0.5
    h200 = dataclasses.replace(CHIP, name="NVIDIA H200", bf16_flops=1.0)
    share, peak = roofline.utilisation(98.9e12, h200, "bfloat16")
    assert share == pytest.approx(0.1) and peak == "the data sheet's 989,000 GFLOP/s in bfloat16"


@pytest.mark.slow
def test_measured_peaks_are_possible():
    """Bug: a loop that the compiler removes: 300 GFLOP/s are more than a core can do."""
    chip = roofline.measured(jax.devices()[0])
    cores_a_device = len(os.sched_getaffinity(0)) / jax.local_device_count()
    assert 1e8 < chip.f32_flops < 3e11 * cores_a_device
    rates = [rate for points in (chip.memory, chip.transposed, chip.fresh) for _, rate in points]
    assert all(1e7 < rate < 1e12 for rate in rates)
