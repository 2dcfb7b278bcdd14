"""How long a program takes at least on a chip, by published or by measured peaks."""

import dataclasses
import os
import resource
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from cosup_jax.kernels import COLLECTIVES, Program

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can do at most. Rates are per second."""

    name: str
    bf16_flops: float  # of matrix products
    f32_flops: float  # the same in float32, at jax's default precision
    memory_bytes: float  # read or written in main memory
    capacity: float  # bytes of main memory
    network_bytes: float  # sent to other chips, one direction, all links together
    transposed_bytes: float = 0.0  # read or written where elements change places; 0 = memory_bytes
    launch_s: float = 0.0  # seconds that every kernel takes beside its work
    measured: bool = False


def _published(name, tflops, gb_per_s, gib, network_gb_per_s, f32_share):
    flops = tflops * 1e12
    network = network_gb_per_s * 1e9
    return Chip(name, flops, flops * f32_share, gb_per_s * 1e9, gib * GIB, network)


# Dense bf16, device memory, and links of one direction, by the makers' data sheets. By default
# jax lets a TPU round float32 operands to bf16, and a GPU to TF32, at half of bf16's rate.
CHIPS = {
    "TPU v4": _published("v4", 275, 1228, 32, 300, 1.0),
    "TPU v5 lite": _published("v5e", 197, 819, 16, 200, 1.0),
    "TPU v5": _published("v5p", 459, 2765, 95, 600, 1.0),
    "TPU v6 lite": _published("v6e", 918, 1640, 32, 448, 1.0),
    "NVIDIA A100": _published("A100", 312, 2039, 74.5, 300, 0.5),
    "NVIDIA H100": _published("H100", 989, 3350, 74.5, 450, 0.5),
    "NVIDIA H200": _published("H200", 989, 4800, 131, 450, 0.5),
}


def published(device_kind: str) -> Chip | None:
    """The chip of the longest name that `device_kind` starts with."""
    names = [name for name in CHIPS if device_kind.startswith(name)]
    return CHIPS[max(names, key=len)] if names else None


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one step on one chip."""

    products_s: float  # in kernels that matrix products limit
    memory_s: float  # in kernels that main memory limits
    launch_s: float
    hidden_network_s: float  # sent beside other work
    exposed_network_s: float  # sent while nothing else runs
    step_s: float


def estimate(program: Program, chip: Chip) -> Estimate:
    """Every kernel takes as long as the slower of its matrix products and its memory traffic.

    Copies and collectives that the schedule starts and collects later run beside all of that.
    """
    products = memory = launch = hidden = exposed = beside = 0.0
    for kernel in program.kernels:
        for one in kernel.collectives:
            seconds = kernel.times * one.bytes / (chip.network_bytes or chip.memory_bytes)
            hidden, exposed = (
                (hidden + seconds, exposed) if one.overlapped else (hidden, exposed + seconds)
            )
        if kernel.opcode.removesuffix("-start") in COLLECTIVES:
            continue
        rate = chip.transposed_bytes if kernel.transposes else 0.0
        traffic = kernel.times * kernel.bytes / (rate or chip.memory_bytes)
        if kernel.opcode.endswith("-start"):
            beside += traffic
            continue
        flops = kernel.times * sum(
            product.flops / (chip.bf16_flops if product.dtype == "bf16" else chip.f32_flops)
            for product in kernel.products
        )
        launch += kernel.times * chip.launch_s
        if flops > traffic:
            products += flops
        else:
            memory += traffic
    busy = products + memory + launch
    step = max(busy, beside + memory, hidden) + exposed
    return Estimate(products, memory, launch, hidden, exposed, step)


def measured(device: jax.Device) -> Chip:
    """What this device reaches, in about ten seconds.

    On a CPU it is timed by the seconds of its cores, so that other programs do not count, for all
    cores together.
    """
    on_cpu = device.platform == "cpu"
    size = 1024 if on_cpu else 8192
    with jax.default_device(device):
        flops = {
            dtype: 2 * size**3 / seconds(lambda x: x @ x, jnp.full((size, size), 1e-3, dtype))
            for dtype in ("bfloat16", "float32")
        }
        words = jnp.ones(2**26 if on_cpu else 2**28, jnp.float32)
        stream = 8 * words.size / seconds(lambda x: 0.999 * x + 1, words, repeats=4)
        square = jnp.ones((3000, 3000), jnp.float32)
        turned = 8 * square.size / seconds(lambda x: x.T + 1, square, repeats=4)
        tiny = jnp.eye(16)
        chain = lambda x: jax.lax.fori_loop(0, 100, lambda i, x: jnp.sort(x) + 1, x)
        launch = seconds(chain, tiny) / 200
    known = published(device.device_kind)
    return Chip(
        name=device.device_kind,
        bf16_flops=flops["bfloat16"],
        f32_flops=flops["float32"],
        memory_bytes=stream,
        capacity=_capacity(device),
        network_bytes=known.network_bytes if known else 0.0,
        transposed_bytes=min(turned, stream),
        launch_s=0.0 if on_cpu else launch,
        measured=True,
    )


def seconds(function: Callable, x: jax.Array, repeats: int = 1) -> float:
    """Least seconds of `x = function(x)`, run `repeats` times on the device in a row, of five."""
    device = next(iter(x.devices()))
    run = jax.jit(lambda x: jax.lax.fori_loop(0, repeats, lambda i, x: function(x), x))
    jax.block_until_ready(run(x))
    taken = []
    for _ in range(5):
        watch = Watch(device)
        jax.block_until_ready(run(x))
        taken.append(watch.seconds())
    return min(taken) / repeats


class Watch:
    """Seconds since its making: by the clock, on a CPU those of all its cores."""

    def __init__(self, device: jax.Device):
        self._cores = len(os.sched_getaffinity(0)) if device.platform == "cpu" else 0
        self._start = self._now()

    def _now(self) -> float:
        if not self._cores:
            return time.perf_counter()
        used = resource.getrusage(resource.RUSAGE_SELF)
        return (used.ru_utime + used.ru_stime) / self._cores

    def seconds(self) -> float:
        """Since its making."""
        return self._now() - self._start


def _capacity(device: jax.Device) -> float:
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
