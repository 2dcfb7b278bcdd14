"""An arm as it would be where NSP has the part in Gen's gradient that it has in another arm.

At one nsp_weight NSP weighs more in one set-up than in another. `C@T` is C at T's gradient ratio: C
and the arms that differ from it in nsp_weight alone are a curve over that ratio, and it is read,
item by item, where T lies. The ratio is that of the first batch: later ones are outcomes, as NSP's
gradient fades where NSP is learned, and to compare at those would favour who has learned.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cosup_jax.studies.run import Metrics, Scores

AT_START = "gradient_ratio/at_start"


class Matched(NamedTuple):
    """The arms of a curve, and the one at whose ratio it is read."""

    curve: Sequence[str]
    to: str


def interpolated(curve: Sequence[Scores], to: Scores) -> Scores:
    """Of the two runs of the curve between whose ratios that of `to` lies, linear over its
    logarithm: every held-out set's metrics of the same items. Nothing beyond the curve's ends."""
    known = sorted((ratio, i) for i, scores in enumerate(curve) if (ratio := _ratio(scores)))
    at = _ratio(to)
    for (low, i), (high, j) in itertools.pairwise(known):
        if at and low <= at <= high:
            part = float(np.log(at / low) / np.log(high / low)) if high > low else 0.0
            return {
                name: _between(metrics, curve[j][name], part)
                for name, metrics in curve[i].items()
                if name and name in curve[j]
            }
    return {}


def _between(low: Metrics, high: Metrics, part: float) -> Metrics:
    of_item = lambda a, b: {item: a[item] + part * (b[item] - a[item]) for item in a}
    alike = (name for name in low if name in high and low[name].keys() == high[name].keys())
    return {name: of_item(low[name], high[name]) for name in alike}


def _ratio(scores: Mapping[str, Metrics]) -> float | None:
    return scores.get("", {}).get(AT_START, {}).get("")
