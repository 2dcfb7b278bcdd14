"""How long a program takes at least on a chip, by published or by measured peaks."""

import dataclasses
import math
import os
import resource
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cosup_jax.costs.kernels import COLLECTIVES, Program

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can do at most. Rates are per second."""

    name: str
    bf16_flops: float  # of matrix products
    f32_flops: float  # the same in float32, at jax's default precision
    capacity: float  # bytes of its memory
    # What a kernel reads and writes there, by how much that is: (bytes, bytes per second), ...
    memory: tuple[tuple[float, float], ...]
    network_bytes: float  # sent to other chips, one direction, all links together
    transposed: tuple[tuple[float, float], ...] = ()  # as `memory`, where neighbours are parted
    launch_s: float = 0.0  # that every kernel takes beside its work
    # As `memory`, for what a program first asks the system for; () where none is given back.
    fresh: tuple[tuple[float, float], ...] = ()
    measured: bool = False

    def traffic_s(self, size: float, transposes: bool = False) -> float:
        """Seconds to read and write `size` bytes."""
        return _interpolated((self.transposed if transposes else ()) or self.memory, size)

    def fresh_s(self, size: float) -> float:
        """Seconds until the system has given `size` bytes."""
        return _interpolated(self.fresh, size)

    def sent_s(self, size: float) -> float:
        """Seconds to send `size` bytes; devices without links share their memory."""
        return size / self.network_bytes if self.network_bytes else self.traffic_s(size)


def _interpolated(points: tuple[tuple[float, float], ...], size: float) -> float:
    """Seconds for `size` bytes; between the points by the logarithm of both."""
    if not size or not points:
        return 0.0
    sizes, rates = (np.log([point[i] for point in points]) for i in (0, 1))
    return size / math.exp(np.interp(math.log(size), sizes, rates))


def _published(name, tflops, gb_per_s, gib, network_gb_per_s, f32_share):
    flops = tflops * 1e12
    network = network_gb_per_s * 1e9
    return Chip(name, flops, flops * f32_share, gib * GIB, ((1.0, gb_per_s * 1e9),), network)


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


def utilisation(flops_per_s: float, chip: Chip, dtype: str) -> tuple[float, str]:
    """A chip's share of its peak, the data sheet's where there is one, and what that peak is."""
    sheet = published(chip.name)
    peak = sheet or chip
    rate = peak.bf16_flops if dtype == "bfloat16" else peak.f32_flops
    whose = "the data sheet's" if sheet else "the measured"
    return flops_per_s / rate, f"{whose} {rate / 1e9:,.0f} GFLOP/s in {dtype}"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one step on one chip."""

    products_s: float  # in kernels that matrix products limit
    memory_s: float  # in kernels that main memory limits
    launch_s: float
    hidden_network_s: float  # sent beside other work
    exposed_network_s: float  # sent while nothing else runs
    fresh_s: float  # until the system has given the memory of the temporaries
    step_s: float


def estimate(program: Program, chip: Chip, temporaries: float = 0.0) -> Estimate:
    """Every kernel takes as long as the slower of its matrix products and its memory traffic.

    Copies and collectives that the schedule starts and collects later run beside all of that.
    `temporaries`: bytes; a CPU gets them from the system, page by page, in each step.
    """
    products = memory = launch = hidden = exposed = beside = 0.0
    for kernel in program.kernels:
        for one in kernel.collectives:
            sent = kernel.times * chip.sent_s(one.bytes)
            hidden += sent * one.overlapped
            exposed += sent * (not one.overlapped)
        if kernel.opcode.removesuffix("-start") in COLLECTIVES:
            continue
        traffic = kernel.times * chip.traffic_s(kernel.bytes, kernel.transposes)
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
    fresh = chip.fresh_s(temporaries)
    step = max(products + memory + launch, beside + memory, hidden) + exposed + fresh
    return Estimate(products, memory, launch, hidden, exposed, fresh, step)


def measured(device: jax.Device) -> Chip:
    """What this device reaches, in about ten seconds.

    On a CPU it is timed by the seconds of its cores, so that other programs do not count; several
    CPU devices share what it reaches.
    """
    on_cpu = device.platform == "cpu"
    share = 1 / jax.local_device_count() if on_cpu else 1.0
    # What is moved: 2, 16, 128 MiB; 16, 128, 1024.
    rows = (2**10, 2**13, 2**16) if on_cpu else (2**13, 2**16, 2**19)
    random = lambda *shape, dtype="float32": jax.random.normal(jax.random.key(0), shape, dtype)
    # So many kernels in each turn of a loop, which takes an accelerator longer than a small one.
    copies = lambda n: 1 if on_cpu else min(2 * rows[-1] // n, 32)
    flops, memory, transposed, fresh = {}, [], [], []
    with jax.default_device(device):
        for dtype in ("bfloat16", "float32"):
            n = 1024 if on_cpu else 8192
            taken = seconds(lambda x: x @ x * x.shape[0] ** -0.5, random(n, n, dtype=dtype))
            flops[dtype] = share * 2 * n**3 / taken
        for n in rows:
            # 1 KiB wide, between the 64 of a head and the 4,096 of features.
            x, repeats = random(n, 256), 4 * rows[-1] // n
            turn = lambda x: (x.T + 1).reshape(x.shape)  # and back, in a stream ten times as fast
            for points, function in ((memory, jax.nn.silu), (transposed, turn)):
                taken = seconds(function, x, repeats, copies(n))
                points.append((2 * x.nbytes, share * 2 * x.nbytes / taken))
            if on_cpu:
                double = lambda x: 2 * x
                extra = max(_once_s(double, x) - seconds(double, x, repeats), 1e-9)
                fresh.append((x.nbytes, share * x.nbytes / extra))
        small = random(16, 16)
        if on_cpu:
            launch = seconds(lambda x: jnp.sort(x) + 1, small, 1000) / 2
        else:
            launch = seconds(jnp.sort, small, 1000, copies(len(small)))
    known = published(device.device_kind)
    return Chip(
        name=device.device_kind,
        bf16_flops=flops["bfloat16"],
        f32_flops=flops["float32"],
        capacity=share * _capacity(device),
        memory=tuple(memory),
        network_bytes=known.network_bytes if known else 0.0,
        transposed=tuple(transposed),
        launch_s=launch,
        fresh=tuple(fresh),
        measured=True,
    )


def seconds(function: Callable, x: jax.Array, repeats: int = 4, copies: int = 1) -> float:
    """Seconds of `x = function(x)` on the device, as the last `repeats` of `repeats` + 1 in a row.

    What comes once, the call and its memory, is not in it. The least of three.
    `copies`: so many of `x` are worked on in turn, each for itself.
    """
    every = lambda i, xs: [function(x) for x in xs]
    run = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, every, [x + i for i in range(copies)]))
    once, all_ = (_least_s(lambda n=n: run(x, n), x) for n in (1, 1 + repeats))
    return (all_ - once) / (repeats * copies)


def _once_s(function: Callable, x: jax.Array) -> float:
    """Seconds of one call, with the memory of its result. The least of three."""
    run = jax.jit(function)
    return _least_s(lambda: run(x), x)


def _least_s(run: Callable, x: jax.Array) -> float:
    device = next(iter(x.devices()))
    jax.block_until_ready(run())
    taken = []
    for _ in range(3):
        watch = Watch(device)
        jax.block_until_ready(run())
        taken.append(watch.seconds())
    return min(taken)


def ceilings(chip: Chip) -> str:
    """What `chip` reaches, in a line."""
    points = ", ".join(f"{size / 2**20:.0f} MiB: {rate / 1e9:.1f}" for size, rate in chip.memory)
    return (
        f"one {chip.name} does {chip.bf16_flops / 1e9:,.0f} GFLOP/s in bfloat16 and "
        f"{chip.f32_flops / 1e9:,.0f} in float32; reads and writes, in GB/s: {points}"
    )


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
