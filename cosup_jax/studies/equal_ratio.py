"""An arm as it would be at another arm's gradient_ratio: two set-ups compared not at one
nsp_weight, which weighs more in one than in the other, but where NSP has the same part in Gen.

`C@T` is C at T's ratio: C and the arms that differ from it in nsp_weight alone are a curve over
that ratio, and it is read, question by question, where T lies. So it is an arm like any other,
without a run.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cosup_jax.studies.run import Scores

RATIO = "gradient_ratio/step_"  # of `gradients_over_training`: of all of them, the mean


class Read(NamedTuple):
    """Of which arms a curve is made, and at whose ratio it is read."""

    curve: Sequence[str]
    at: str


def ratio(scores: Scores) -> float | None:
    """Mean over a run's checkpoints; None where it was not measured, or has none."""
    found = [values for name, values in scores.get("", {}).items() if name.startswith(RATIO)]
    return float(np.mean([np.mean([*values.values()]) for values in found])) if found else None


def read(curve: Sequence[Scores], at: float | None) -> Scores:
    """The scores of the two of the curve between which the ratio `at` lies, each item's by linear
    interpolation over the ratio's logarithm; none where it lies beyond the ends."""
    known = sorted(((r, i) for i, scores in enumerate(curve) if (r := ratio(scores))))
    for (low, i), (high, j) in itertools.pairwise(known):
        if at and low <= at <= high:
            part = np.log(at / low) / np.log(high / low) if high > low else 0.0
            return _between(curve[i], curve[j], float(part))
    return {}


def _between(low: Scores, high: Scores, part: float) -> Scores:
    """Of what both have."""

    def metric(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
        return {item: a[item] + part * (b[item] - a[item]) for item in a if item in b}

    return {
        name: {
            key: values
            for key in metrics
            if key in high[name] and (values := metric(metrics[key], high[name][key]))
        }
        for name, metrics in low.items()
        if name in high
    }
