"""Seconds from work and peaks, against sums by hand; the peaks of this machine."""

import dataclasses
import os

import jax
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


@pytest.mark.slow
def test_measured_peaks_are_possible():
    """Bug: a loop that the compiler removes: 300 GFLOP/s are more than a core can do."""
    chip = roofline.measured(jax.devices()[0])
    cores_a_device = len(os.sched_getaffinity(0)) / jax.local_device_count()
    assert 1e8 < chip.f32_flops < 3e11 * cores_a_device
    rates = [rate for points in (chip.memory, chip.transposed, chip.fresh) for _, rate in points]
    assert all(1e7 < rate < 1e12 for rate in rates)
