"""Whether a claim about two arms holds: an interval over seeds and items, and a rule fixed before.

S seeds, I items (questions): an arm's scores are values_SxI, of the same items under every seed;
NaN where a seed has none of an item.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

LEVEL, POWER = 0.95, 0.8
POINT = 0.01  # of shares: a difference below it is none worth naming
OPPOSITE = "not seen, the opposite holds"


class Estimate(NamedTuple):
    """A mean over seeds and items, and how well it is known; None where nothing tells."""

    mean: float
    low: float | None
    high: float | None
    detectable: float | None  # the smallest true mean that shows with POWER at this LEVEL
    seeds: int
    items: int
    scores: int  # that the mean is of: one for each seed and item, or fewer
    by_seed: tuple[float | None, ...]  # means; None of a seed without a score


def estimate(values_SxI: np.ndarray) -> Estimate:
    """Mean and 95 % interval where both seeds and items are drawn at random.

    The variance of the mean is that over seeds plus that over items, each as if the other were
    fixed (two-way clustering, Cameron, Gelbach and Miller 2011); the noise of single answers, which
    is in both, is not taken out again. Each part reaches as far as Student's t of its own degrees
    of freedom says, and the reaches add up as their squares (MOVER; Zou and Donner 2008). With one
    seed the interval is over items alone, and of a metric with one item over seeds alone. Where
    scores are missing the mean is a ratio, of their sum to their number, and its errors those of
    the linearised ratio (Cochran 1977, chapter 6).

    Over seeds it counts on means that vary like a normal. Where a run either begins to learn or
    does not, three seeds hold the true mean in some 70 % of cases.
    """
    held_SxI = np.isfinite(values_SxI)
    scores = int(held_SxI.sum())
    mean = float(values_SxI[held_SxI].mean())
    off_SxI = np.where(held_SxI, values_SxI - mean, 0.0) / scores
    parts = [_part(off_SxI.sum(axis)[held_SxI.any(axis)]) for axis in (1, 0)]
    seeds = zip(values_SxI, held_SxI, strict=True)
    by_seed = tuple(float(own[held].mean()) if held.any() else None for own, held in seeds)
    return _estimate(mean, parts, by_seed, values_SxI.shape[1], scores)


def between(first_SxI: np.ndarray, other_SxJ: np.ndarray) -> Estimate:
    """Mean of the first less mean of the other, of unlike items under the same seeds."""
    by_seed = first_SxI.mean(axis=1) - other_SxJ.mean(axis=1)
    mean = float(by_seed.mean())
    parts = [_part((by_seed - mean) / len(by_seed))]
    parts += [_part((v.mean(0) - v.mean()) / v.shape[1]) for v in (first_SxI, other_SxJ)]
    items = first_SxI.shape[1] + other_SxJ.shape[1]
    return _estimate(mean, parts, tuple(by_seed.tolist()), items, len(by_seed) * items)


def _part(off_N: np.ndarray) -> tuple[int, float]:
    """Degrees of freedom, and the error of a sum of N independent terms about their mean, 0."""
    n = len(off_N)
    return n - 1, float((np.sum(off_N**2) * n / max(n - 1, 1)) ** 0.5)


def _estimate(
    mean: float,
    parts: Sequence[tuple[int, float]],
    by_seed: tuple[float | None, ...],
    items: int,
    scores: int,
) -> Estimate:
    S = sum(value is not None for value in by_seed)
    rest = (S, items, scores, by_seed)
    parts = [(freedom, error) for freedom, error in parts if freedom > 0]
    if not parts:
        return Estimate(mean, None, None, None, *rest)
    wide = (1 + LEVEL) / 2
    reach = _joined(stats.t.ppf(wide, freedom) * error for freedom, error in parts)
    shown = _joined(_shown(freedom) * error for freedom, error in parts)
    detectable = shown if S > 1 else None  # no verdict goes by one seed
    return Estimate(mean, mean - reach, mean + reach, detectable, *rest)


@functools.cache
def _shown(freedom: int) -> float:
    """By how many standard errors a mean must lie off 0, for a t-test to show it with POWER."""
    critical = stats.t.ppf((1 + LEVEL) / 2, freedom)
    power = lambda far: stats.nct.sf(critical, freedom, far)
    return optimize.brentq(lambda far: power(far) - POWER, 0, 100)


def _joined(reaches) -> float:
    return float(sum(reach**2 for reach in reaches) ** 0.5)


def verdict(found: Estimate, none: float = POINT) -> str:
    """Of the claim that a difference is positive.

    confirmed   the interval excludes 0 on that side, and every seed's mean lies there
    not seen    the interval holds nothing on that side, or nothing beyond `none`; OPPOSITE where
                the claim that it is negative would be confirmed
    undecided   anything else, and whatever a single seed shows

    Args:
      none: a difference as good as none: a point of shares; 0 where, as of nats, nothing says what
        that is.
    """
    if found.low is None or found.seeds < 2:
        return "undecided"
    if found.low > 0 and min(found.by_seed) > 0:
        return "confirmed"
    if found.high < 0 and max(found.by_seed) < 0:
        return OPPOSITE
    return "not seen" if found.high <= none else "undecided"
