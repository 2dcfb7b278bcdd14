"""From the scores of finished runs to the numbers of a study: arms, differences, verdicts.

Arms are compared over the items (questions) that all runs compared have in common.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cosup_jax.errors import UserError
from cosup_jax.studies.geometry import PAIRS
from cosup_jax.studies.run import COSINE, LESS, POINTS, POSITIVE, SHARE, Scores
from cosup_jax.studies.verdict import POINT, Estimate, between, estimate, verdict

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
    """`"A > B: METRIC, -METRIC; ..."`, the latter also as `"A < B: METRIC"`, as pages have it.

    Raises UserError for another form, or an unknown arm.
    """
    known, found = list(arms), []
    for part in filter(None, map(str.strip, text.split(";"))):
        form = re.fullmatch(r"(\S+) ([<>]) (\S+): (.+)", part)
        if not form:
            raise UserError(f"config.study.claims: {part!r} must read 'A > B: METRIC, METRIC'")
        better, sign, other, metrics = form.groups()
        for arm in (better, other):
            if arm not in known:
                of = "crossed" if "|" in arm else "arms"
                raise UserError(
                    f"config.study.claims: {arm!r} is no arm of {', '.join(known)}; add it to "
                    f"config.study.{of}, or drop the claim"
                )
        if re.search(" [<>] ", metrics):
            raise UserError(f"config.study.claims: {part!r} holds two claims; write ; between them")
        for metric in map(str.strip, metrics.split(",")):
            if sign == "<" and metric.startswith("-"):
                raise UserError(f"config.study.claims: {part!r}: write < or -, not both")
            below = sign == "<" or metric.startswith("-")
            found.append(Claim(better, other, metric.removeprefix("-").strip(), below))
    return found


def values(runs: Sequence[Scores], name: str, metric: str, items: Sequence[str]) -> np.ndarray:
    """[S, I] the scores of one arm in the set `name`, NaN where a run has none of an item; of
    `"A - B"` what A has more than B."""

    def of(one: str) -> np.ndarray:
        scored = (scores.get(name, {}).get(one, {}) for scores in runs)
        return np.array([[found.get(item, np.nan) for item in items] for found in scored])

    first, *less = map(of, metric.split(LESS))
    return first - less[0] if less else first


def items_of(runs: Iterable[Scores], name: str, metric: str, shared: bool = True) -> list[str]:
    """Those that every run has scored, sorted, or that any run has."""
    scored = []
    for scores in runs:
        own = [set(scores.get(name, {}).get(one, ())) for one in metric.split(LESS)]
        scored.append(set.intersection(*own))
    join = set.intersection if shared else set.union
    return sorted(join(*scored)) if scored else []


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
        if not (sets := _compared(runs, claim)):
            continue
        kind = kinds[claim.metric]
        mute = _mute(runs, claim, kind)
        for name, (ours, theirs) in sets.items():
            differs = estimate(ours - theirs)
            told = {"claim": str(claim), "set": name, "log_odds": _odds(ours, theirs, kind)}
            told |= _judged(differs, claim, kind, 1)
            if name in mute:
                told |= {"verdict": "undecided", "detectable": None}
            found.append(told)
    return found


def between_rows(runs: Runs, claims: Sequence[Claim], kinds: Kinds) -> list[dict[str, Any]]:
    """As `claim_rows`, of the claim that a difference is larger in the first set than in another:
    {"set": "FIRST - OTHER", ...}."""
    found = []
    for claim in claims:
        kind, sets = kinds[claim.metric], _compared(runs, claim)
        differs = {name: ours - theirs for name, (ours, theirs) in sets.items()}
        mute = _mute(runs, claim, kind)
        for first, other in itertools.product(list(differs)[:1], list(differs)[1:]):
            odds = [_odds(*sets[name], kind) for name in (first, other)]
            less = None if None in odds else odds[0] - odds[1]
            told = {"claim": str(claim), "set": f"{first} - {other}", "log_odds": less}
            told |= _judged(between(differs[first], differs[other]), claim, kind, 2)
            if {first, other} & mute:  # then it is the difference in one set alone
                told |= {"verdict": "undecided", "detectable": None}
            found.append(told)
    return found


def _compared(runs: Runs, claim: Claim) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By set: scores of the claim's two arms, [S, I] each, of the seeds and items of both."""
    found = {}
    seeds = min(len(runs[claim.better]), len(runs[claim.other]))
    arms = [runs[arm][:seeds] for arm in (claim.better, claim.other)]
    for name in _sets(runs):
        if items := items_of([*arms[0], *arms[1]], name, claim.metric):
            found[name] = tuple(values(arm, name, claim.metric, items) for arm in arms)
    return found


def _judged(differs: Estimate, claim: Claim, kind: str, sets: int) -> dict[str, Any]:
    """The numbers and the verdict of a difference of two arms, in one set or between two."""
    least, most = _ends(claim.metric, kind)
    reach = sets * (most - least)
    towards = differs
    if claim.below and differs.low is not None:
        by_seed = tuple(-value for value in differs.by_seed)
        towards = differs._replace(low=-differs.high, high=-differs.low, by_seed=by_seed)
    decided = verdict(towards, POINT if kind in (SHARE, POINTS) else 0.0)
    return _numbers(differs, (-reach, reach)) | {"verdict": decided}


def _mute(runs: Runs, claim: Claim, kind: str) -> set[str]:
    """The sets that tell nothing of a share, as nobody can do it there, or everybody; nor of one
    share less another, where both are so, or as good as the same in both arms, and these alike."""
    if not (kind == SHARE or (kind == POINTS and LESS in claim.metric)):
        return set()

    def means(metric: str) -> dict[str, tuple[float, float]]:
        sets = _compared(runs, claim._replace(metric=metric))
        return {name: (ours.mean(), theirs.mean()) for name, (ours, theirs) in sets.items()}

    shares = [means(share) for share in claim.metric.split(LESS)]
    at_an_end = lambda pair: max(pair) <= POINT or min(pair) >= 1 - POINT
    alike = lambda a, b: len(shares) > 1 and max(abs(a), abs(b), abs(a - b)) <= POINT
    return {
        name
        for name, pair in means(claim.metric).items()
        if all(at_an_end(share[name]) for share in shares) or alike(*pair)
    }


def untested(judged: Sequence[Mapping[str, Any]], claims: Sequence[Claim]) -> list[str]:
    """Those without a row of `claim_rows`: no set has their metric of all runs compared."""
    told = {row["claim"] for row in judged}
    return [claim for claim in map(str, claims) if claim not in told]


def planes(runs: Runs) -> list[dict[str, Any]]:
    """{"arm", "points", "share"} of each arm's first seed, where `plane` is measured.

    Points are [[x, y], ...] by kind: "passages", "vocabulary", "queries SET".
    """
    found = []
    for arm, (first, *_) in runs.items():
        points = {
            f"{kind} {name}".strip(): [[round(x[id], 4), round(y[id], 4)] for id in x]
            for kind in ("vocabulary", "passages", "queries")
            for name, metrics in first.items()
            if (x := metrics.get(f"plane/{kind}/x")) and (y := metrics[f"plane/{kind}/y"])
        }
        share = first.get("", {}).get("plane/share")  # one that is matched has no plane of its own
        if points and share:
            found.append({"arm": arm, "points": points, "share": share[""]})
    return found


def agreement_rows(runs: Runs) -> list[dict[str, Any]]:
    """{"arm", "by_pair": [Pearson correlation of two seeds' cosines of pairs of passages, ...],
    "items": so many pairs} of each arm with several seeds; None where a seed's are all alike."""
    found = []
    for arm, seeds in runs.items():
        if len(seeds) > 1 and (pairs := items_of(seeds, "", PAIRS)):
            cosine_SxP = values(seeds, "", PAIRS, pairs)
            two = itertools.combinations(cosine_SxP, 2)
            by_pair = [_correlation(a, b) for a, b in two]
            found.append({"arm": arm, "by_pair": by_pair, "items": len(pairs)})
    return found


def _correlation(a_N: np.ndarray, b_N: np.ndarray) -> float | None:
    alike = min(np.ptp(a_N), np.ptp(b_N)) < 1e-9
    return None if alike else float(np.corrcoef(a_N, b_N)[0, 1])


def _odds(ours_SxI: np.ndarray, theirs_SxI: np.ndarray, kind: str) -> float | None:
    """Difference of log-odds; None of a mean over a whole set, which is no count of items."""
    many = kind == SHARE and ours_SxI.shape[1] > 1
    return log_odds(ours_SxI) - log_odds(theirs_SxI) if many else None


def log_odds(share_SxI: np.ndarray) -> float:
    """Of a mean share, half an item added on either side: points near 0 and 1 weigh more."""
    count, total = share_SxI.size, share_SxI.sum()
    return float(np.log((total + 0.5) / (count - total + 0.5)))


def _ends(metric: str, kind: str) -> tuple[float, float]:
    """Between which a metric lies."""
    less = kind == POINTS and LESS in metric
    ends = {SHARE: (0.0, 1.0), COSINE: (-1.0, 1.0), POSITIVE: (0.0, np.inf)}
    return (-1.0, 1.0) if less else ends.get(kind, (-np.inf, np.inf))


def _measured(seeds: Sequence[Scores], name: str, metric: str, kind: str) -> dict[str, Any] | None:
    """`_numbers` of one arm over the items that any of its seeds has; None without any."""
    if not (items := items_of(seeds, name, metric, shared=False)):
        return None
    return _numbers(estimate(values(seeds, name, metric, items)), _ends(metric, kind))


def _numbers(found: Estimate, ends: tuple[float, float]) -> dict[str, Any]:
    """The interval ends where the values do."""
    if found.low is not None:
        found = found._replace(low=max(found.low, ends[0]), high=min(found.high, ends[1]))
    return found._asdict() | {"by_seed": list(found.by_seed)}


def _sets(runs: Runs) -> list[str]:
    return list(dict.fromkeys(name for seeds in runs.values() for s in seeds for name in s))
