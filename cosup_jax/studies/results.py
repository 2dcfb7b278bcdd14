"""From the scores of finished runs to the numbers of a study: arms, differences, verdicts.

Everything is computed over the items (questions) that all runs compared have in common.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cosup_jax.errors import UserError
from cosup_jax.studies.run import LESS, NUMBER, POINTS, SHARE, Scores
from cosup_jax.studies.verdict import POINT, Estimate, estimate, verdict

Runs = Mapping[str, Sequence[Scores]]  # of each arm its seeds, in their order
Kinds = Mapping[str, str]  # of each metric, as `run.Gives` has them

GIVEN = ("bm25", "gold", "wrong", "none")  # arms of config.eval: passages that no run retrieves
MAJORITY, FOUND = "majority", "retrieval_hit"  # rows of the matrix that no arm has written


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
                raise UserError(
                    f"config.study.claims: {arm!r} is no arm of {', '.join(known)}; add it to "
                    "config.study.arms, or drop the claim"
                )
        metrics = map(str.strip, form[3].split(","))
        found += [
            Claim(form[1], form[2], metric.removeprefix("-").strip(), metric.startswith("-"))
            for metric in metrics
        ]
    return found


def values(runs: Sequence[Scores], name: str, metric: str, items: Sequence[str]) -> np.ndarray:
    """[S, I] the scores of one arm in the set `name`; of `"A - B"` what A has more than B."""
    of = lambda one: [[scores[name][one][item] for item in items] for scores in runs]
    first, *less = (np.array(of(one), np.float64) for one in metric.split(LESS))
    return first - less[0] if less else first


def items_of(runs: Iterable[Scores], name: str, metric: str) -> list[str]:
    """Those that every run has scored, sorted; none if a run has no such metric."""
    metrics = metric.split(LESS)
    scored = [set(scores.get(name, {}).get(one, ())) for scores in runs for one in metrics]
    return sorted(set.intersection(*scored)) if scored else []


def arm_rows(runs: Runs, kinds: Kinds) -> list[dict[str, Any]]:
    """{"set", "metric", "kind", "arm", mean, low, ..., "by_seed"} of all that was measured."""
    return [
        {"set": name, "metric": metric, "kind": kind, "arm": arm} | numbers
        for name in _sets(runs)
        for metric, kind in kinds.items()
        for arm, seeds in runs.items()
        if (numbers := _measured(seeds, name, metric, kind))
    ]


def matrix_rows(runs: Runs, writers: Sequence[str]) -> list[dict[str, Any]]:
    """{"set", "row", "column", mean, low, ...}: how often an answer is right, by who writes it and
    where its passage comes from.

    A row is a writer. A column is an arm whose pair retrieves, for itself or for another writer, or
    one of GIVEN. Row FOUND says how often the right passage is among those shown: an arm's, where
    it writes itself; of GIVEN, the first writer's. Row MAJORITY has neither Gen nor passage.

    Args:
      runs: arms, and pairs as WRITER|RETRIEVER.
      writers: the arms whose Gen was trained to write.
    """
    found = [
        {"set": name, "row": row, "column": column} | numbers
        for name in _sets(runs)
        for row, column, arm, metric in _places(runs, writers)
        if (numbers := _measured(runs.get(arm, ()), name, metric, SHARE))
    ]
    answered = {row["column"] for row in found if row["row"] != FOUND}
    return [row for row in found if row["column"] in answered]


def _places(arms: Iterable[str], writers: Sequence[str]) -> Iterator[tuple[str, str, str, str]]:
    """Row and column of the matrix, and of what runs and in which metric it is found."""
    for column in (arm for arm in arms if "|" not in arm):
        for writer in writers:
            by = writer if writer == column else f"{writer}|{column}"
            yield writer, column, by, "corpus/correct"
        yield FOUND, column, column, "corpus/retrieval_hit"
    for column in GIVEN if writers else ():
        for writer in writers:
            yield writer, column, writer, f"{column}/correct"
        yield FOUND, column, writers[0], f"{column}/retrieval_hit"
    for writer in writers[:1]:
        yield MAJORITY, "none", writer, "majority/correct"


def claim_rows(runs: Runs, claims: Sequence[Claim], kinds: Kinds) -> list[dict[str, Any]]:
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
            kind = kinds[claim.metric]
            least, most = _ends(claim.metric, kind)
            ends = least - most, most - least
            told = {"claim": str(claim), "set": name} | _numbers(difference_SxI, ends)
            many = kind == SHARE and len(items) > 1  # a mean of a whole set is no count of items
            told["log_odds"] = log_odds(ours) - log_odds(theirs) if many else None
            told["verdict"] = verdict(towards_SxI, 0.0 if kind == NUMBER else POINT)
            if np.isfinite(most):  # a share, or one less another
                means = (
                    [values(arm[:seeds], name, share, items).mean() for arm in (a, b)]
                    for share in claim.metric.split(LESS)
                )
                if all(map(_at_an_end, means)):
                    told |= {"verdict": "undecided", "detectable": None}
            found.append(told)
    return found


def untested(judged: Sequence[Mapping[str, Any]], claims: Sequence[Claim]) -> list[str]:
    """Those without a row of `claim_rows`: no set has their metric of all runs compared."""
    told = {row["claim"] for row in judged}
    return [claim for claim in map(str, claims) if claim not in told]


def log_odds(share_SxI: np.ndarray) -> float:
    """Of a mean share, half an item added on either side: points near 0 and 1 weigh more."""
    count, total = share_SxI.size, share_SxI.sum()
    return float(np.log((total + 0.5) / (count - total + 0.5)))


def _at_an_end(shares: Sequence[float]) -> bool:
    """Nobody can do it, or everybody."""
    return max(shares) <= POINT or min(shares) >= 1 - POINT


def _ends(metric: str, kind: str) -> tuple[float, float]:
    """Between which a metric lies."""
    if kind == SHARE:
        return 0.0, 1.0
    return (-1.0, 1.0) if kind == POINTS and LESS in metric else (-np.inf, np.inf)


def _measured(seeds: Sequence[Scores], name: str, metric: str, kind: str) -> dict[str, Any] | None:
    """`_numbers` of one arm over the items that its seeds share; None without any."""
    items = items_of(seeds, name, metric)
    return _numbers(values(seeds, name, metric, items), _ends(metric, kind)) if items else None


def _numbers(values_SxI: np.ndarray, ends: tuple[float, float]) -> dict[str, Any]:
    """The interval ends where the values do."""
    found: Estimate = estimate(values_SxI)
    if found.low is not None:
        found = found._replace(low=max(found.low, ends[0]), high=min(found.high, ends[1]))
    return found._asdict() | {"by_seed": values_SxI.mean(axis=1).tolist()}


def _sets(runs: Runs) -> list[str]:
    return list(dict.fromkeys(name for seeds in runs.values() for s in seeds for name in s))
