"""Whether a claim about two arms holds: an interval over seeds and items, and a rule fixed before.

S seeds, I items (questions): an arm's scores are values_SxI, of the same items under every seed.
"""

import functools
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

LEVEL, POWER = 0.95, 0.8
POINT = 0.01  # of shares: a difference below it is none worth naming


class Estimate(NamedTuple):
    """A mean over seeds and items, and how well it is known; None where nothing tells."""

    mean: float
    low: float | None
    high: float | None
    detectable: float | None  # the smallest true mean that shows with POWER at this LEVEL
    seeds: int
    items: int


def estimate(values_SxI: np.ndarray) -> Estimate:
    """Mean and 95 % interval where both seeds and items are drawn at random.

    The variance of the mean is that over seeds plus that over items, each as if the other were
    fixed (two-way clustering, Cameron, Gelbach and Miller 2011); the noise of single answers, which
    is in both, is not taken out again. Each part reaches as far as Student's t of its own degrees
    of freedom says, and the reaches add up as their squares (MOVER; Zou and Donner 2008). With one
    seed the interval is over items alone, and of a metric with one item over seeds alone.

    Over seeds it counts on means that vary like a normal. Where a run either begins to learn or
    does not, three seeds hold the true mean in some 70 % of cases.
    """
    S, I = values_SxI.shape  # noqa: E741
    mean = float(values_SxI.mean())
    parts = [(S, values_SxI.mean(axis=1)), (I, values_SxI.mean(axis=0))]
    parts = [(n - 1, np.std(means, ddof=1) / n**0.5) for n, means in parts if n > 1]
    if not parts:
        return Estimate(mean, None, None, None, S, I)
    wide = (1 + LEVEL) / 2
    reach = _joined(stats.t.ppf(wide, freedom) * error for freedom, error in parts)
    shown = _joined(_shown(freedom) * error for freedom, error in parts)
    detectable = shown if S > 1 else None  # no verdict goes by one seed
    return Estimate(mean, mean - reach, mean + reach, detectable, S, I)


@functools.cache
def _shown(freedom: int) -> float:
    """By how many standard errors a mean must lie off 0, for a t-test to show it with POWER."""
    critical = stats.t.ppf((1 + LEVEL) / 2, freedom)
    power = lambda far: stats.nct.sf(critical, freedom, far)
    return optimize.brentq(lambda far: power(far) - POWER, 0, 100)


def _joined(reaches) -> float:
    return float(sum(reach**2 for reach in reaches) ** 0.5)


def verdict(difference_SxI: np.ndarray, none: float = POINT) -> str:
    """Of the claim that a difference is positive.

    confirmed   the interval excludes 0 on that side, and every seed's mean lies there
    not seen    the interval holds nothing on that side, or nothing beyond `none`
    undecided   anything else, and whatever a single seed shows

    Args:
      none: a difference as good as none: a point of shares; 0 where, as of nats, nothing says what
        that is.
    """
    found = estimate(difference_SxI)
    if found.low is None or found.seeds < 2:
        return "undecided"
    if found.low > 0 and (difference_SxI.mean(axis=1) > 0).all():
        return "confirmed"
    return "not seen" if found.high <= none else "undecided"
