"""From the scores of finished runs to the numbers of a study: arms, differences, verdicts.

Everything is computed over the items (questions) that all runs compared have in common.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cosup_jax.errors import UserError
from cosup_jax.studies.run import Scores
from cosup_jax.studies.verdict import POINT, Estimate, estimate, verdict

Runs = Mapping[str, Sequence[Scores]]  # of each arm its seeds, in their order

# Metrics that are no shares, wherever their values lie.
_NO_SHARE = re.compile(
    "nats|drift/|alignment|uniformity|anisotropy|_rank|cosine|gradient|slope/|_over_"
)


class Claim(NamedTuple):
    """That one arm's mean of a metric lies above another's; or below it."""

    better: str
    other: str
    metric: str
    below: bool

    def __str__(self) -> str:
        return f"{self.better} {'<' if self.below else '>'} {self.other}: {self.metric}"


def claims_of(text: str, arms: Iterable[str]) -> list[Claim]:
    """`"A > B: METRIC, -METRIC; ..."`. Raises UserError for another form, or an unknown arm."""
    known, found = list(arms), []
    for part in filter(None, map(str.strip, text.split(";"))):
        form = re.fullmatch(r"(\S+) > (\S+): (.+)", part)
        if not form:
            raise UserError(f"config.study.claims: {part!r} must read 'A > B: METRIC, METRIC'")
        for arm in form.group(1, 2):
            if arm not in known:
                raise UserError(f"config.study.claims: {arm!r} is no arm of {', '.join(known)}")
        metrics = map(str.strip, form[3].split(","))
        found += [
            Claim(form[1], form[2], metric.removeprefix("-"), metric.startswith("-"))
            for metric in metrics
        ]
    return found


def values(runs: Sequence[Scores], name: str, metric: str, items: Sequence[str]) -> np.ndarray:
    """[S, I] the scores of one arm in the set `name`."""
    return np.array([[scores[name][metric][item] for item in items] for scores in runs], np.float64)


def items_of(runs: Iterable[Scores], name: str, metric: str) -> list[str]:
    """Those that every run has scored, sorted; none if a run has no such metric."""
    scored = [set(scores.get(name, {}).get(metric, ())) for scores in runs]
    return sorted(set.intersection(*scored)) if scored else []


def arm_rows(runs: Runs, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """{"set", "metric", "arm", mean, low, high, ..., "by_seed"} of all that was measured."""
    found = []
    for name in _sets(runs):
        for metric in metrics:
            for arm, seeds in runs.items():
                if items := items_of(seeds, name, metric):
                    value_SxI = values(seeds, name, metric, items)
                    told = {"set": name, "metric": metric, "arm": arm} | _numbers(value_SxI)
                    if is_share(metric) and _shares(value_SxI) and told["low"] is not None:
                        told |= {"low": max(told["low"], 0.0), "high": min(told["high"], 1.0)}
                    found.append(told)
    return found


def claim_rows(runs: Runs, claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """{"claim", "set", "verdict", mean, low, ...} of each claim in each set that can tell.

    The seeds that both arms have are compared, pair by pair: with a seed they share data and order.
    """
    found = []
    for claim in claims:
        a, b = runs[claim.better], runs[claim.other]
        seeds = min(len(a), len(b))
        for name in _sets(runs):
            items = items_of([*a[:seeds], *b[:seeds]], name, claim.metric)
            if not items:
                continue
            ours, theirs = (values(part[:seeds], name, claim.metric, items) for part in (a, b))
            difference_SxI = ours - theirs
            towards_SxI = -difference_SxI if claim.below else difference_SxI
            told = {"claim": str(claim), "set": name} | _numbers(difference_SxI)
            shares = is_share(claim.metric) and _shares(ours, theirs)
            told["log_odds"] = log_odds(ours) - log_odds(theirs) if shares else None
            told["verdict"] = verdict(towards_SxI)
            if shares and _at_an_end(ours, theirs):  # nobody can do it, or everybody
                told |= {"verdict": "undecided", "detectable": None}
            found.append(told)
    return found


def untested(judged: Sequence[Mapping[str, Any]], claims: Sequence[Claim]) -> list[str]:
    """Those without a row of `claim_rows`: no set has their metric of all runs compared."""
    told = {row["claim"] for row in judged}
    return [claim for claim in map(str, claims) if claim not in told]


def is_share(metric: str) -> bool:
    """Whether its values are shares or scores of 0 to 1, by its name."""
    return not _NO_SHARE.search(metric)


def log_odds(share_SxI: np.ndarray) -> float:
    """Of a mean share, half an item added on either side: points near 0 and 1 weigh more."""
    count, total = share_SxI.size, share_SxI.sum()
    return float(np.log((total + 0.5) / (count - total + 0.5)))


def _at_an_end(*values: np.ndarray) -> bool:
    means = [v.mean() for v in values]
    return max(means) <= POINT or min(means) >= 1 - POINT


def _shares(*values: np.ndarray) -> bool:
    return all(v.size > 1 and v.min() >= 0 and v.max() <= 1 for v in values)


def _numbers(values_SxI: np.ndarray) -> dict[str, Any]:
    found: Estimate = estimate(values_SxI)
    return found._asdict() | {"by_seed": values_SxI.mean(axis=1).tolist()}


def _sets(runs: Runs) -> list[str]:
    return list(dict.fromkeys(name for seeds in runs.values() for s in seeds for name in s))
