"""How long things take, and how that is told."""

import resource
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from cosup_jax.runtime.observe import device_memory

K = TypeVar("K", bound=Hashable)
ROUNDS = 5  # of which medians are taken


class Figure(NamedTuple):
    """A row of the table that --mode=benchmark prints."""

    what: str
    value: float
    unit: str
    more: str = ""  # how it came about

    def __str__(self) -> str:
        number = f"{self.value:,.0f}" if abs(self.value) >= 100 else f"{self.value:.3g}"
        return f"{self.what:34}{number:>12} {self.unit:14}{self.more}".rstrip()


def in_turn(ways: Mapping[K, Callable[[], Any]], rounds: int = ROUNDS) -> dict[K, float]:
    """Median seconds of each way. All run in every round, so that what else the machine does
    slows all of them; the first round, which compiles, does not count."""
    took_s: dict[K, list[float]] = {way: [] for way in ways}
    for _ in range(1 + rounds):
        for way, run in ways.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            took_s[way].append(time.perf_counter() - start)
    return {way: float(np.median(took[1:])) for way, took in took_s.items()}


def core_s() -> float:
    """User and system time of this process and of workers that have ended, their start included."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


def peak_gib() -> tuple[float, str]:
    """What this process held at most, of the fullest device's memory or else of the host's."""
    found = device_memory().get("perf/memory_peak_gib")
    if found is not None:
        return found, "of the fullest device"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "of the host"
