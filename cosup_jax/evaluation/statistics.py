"""How sure a mean over items is: bootstrap intervals over the items of an evaluation set."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_DRAWN = 2**20  # items drawn at once


class Interval(NamedTuple):
    """A mean over n items and where it lies with the given confidence; None where none is known."""

    mean: float | None  # None of no items
    low: float | None  # None of fewer than two items
    high: float | None
    n: int  # the denominator


def bootstrap(
    values: Sequence[float], seed: int = 0, *, samples: int = 2000, level: float = 0.95
) -> Interval:
    """Percentile bootstrap of the mean: items are drawn with replacement, `samples` times.

    Items that all score the same have an interval of no width: it says how much the mean varies
    with the items seen, and these do not vary.
    """
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        raise ValueError("a score is not a finite number: leave such items out, and say so")
    n = len(values)
    if n < 2:
        return Interval(float(values[0]) if n else None, None, None, n)
    rng, means = np.random.default_rng(seed), []
    at_once = max(1, _DRAWN // n)
    for start in range(0, samples, at_once):
        drawn = rng.integers(n, size=(min(at_once, samples - start), n))
        means.append(values[drawn].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high), n)


def paired_difference(
    values: Sequence[float],
    others: Sequence[float],
    seed: int = 0,
    *,
    samples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Mean of `values` minus mean of `others`, item by item, and its bootstrap interval.

    Both are scores of the same items in the same order; the items are drawn in pairs. An interval
    without 0 in it is a difference at this level.
    """
    if len(values) != len(others):
        raise ValueError(f"{len(values)} scores cannot be paired with {len(others)}")
    difference = np.subtract(np.asarray(values, np.float64), np.asarray(others, np.float64))
    return bootstrap(difference, seed, samples=samples, level=level)
