"""Scored answers -> means with intervals, the paper's splits, and differences between arms.

A record here is a dict with "id"; "scores", {metric: float in 0..1}, which lacks the metrics that
its question has no ground for; and "seen", whether training reads all of its evidence, None where
the question has none.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cosup_jax.evaluation.statistics import bootstrap

Record = Mapping[str, Any]
Means = dict[str, dict[str, float | None]]  # metric -> mean, low, high, n

SPLITS: dict[str, Callable[[Record], bool]] = {
    "retrieval succeeded": lambda record: record["scores"].get("retrieval_hit") == 1,
    "retrieval failed": lambda record: record["scores"].get("retrieval_hit") == 0,
    "evidence seen": lambda record: record["seen"] is True,
    "evidence unseen": lambda record: record["seen"] is False,
}


def means(records: Sequence[Record], seed: int) -> Means:
    """Of every metric: its mean over the records that have it, a 95 % interval, and their number.

    A metric that no record has is absent.
    """
    metrics = dict.fromkeys(metric for record in records for metric in record["scores"])
    return {
        metric: _interval([r["scores"][metric] for r in records if metric in r["scores"]], seed)
        for metric in metrics
    }


def splits(records: Sequence[Record], seed: int) -> dict[str, dict[str, Any]]:
    """{split: {"questions", "scores"}}; a split without a question has no scores."""
    parts = {name: [r for r in records if belongs(r)] for name, belongs in SPLITS.items()}
    return {
        name: {"questions": len(part), "scores": means(part, seed)} for name, part in parts.items()
    }


def differences(records: Sequence[Record], others: Sequence[Record], seed: int) -> Means:
    """Of every metric: `records` minus `others`, question by question, over those that both have.

    Questions are resampled, not arms: what two arms share does not widen the interval.
    """
    theirs = {record["id"]: record["scores"] for record in others}
    pairs = [(r["scores"], theirs[r["id"]]) for r in records if r["id"] in theirs]
    metrics = dict.fromkeys(m for ours, other in pairs for m in ours if m in other)
    apart = lambda m: [ours[m] - other[m] for ours, other in pairs if m in ours and m in other]
    return {metric: _interval(apart(metric), seed) for metric in metrics}


def macro(sets: Sequence[Means], metrics: Sequence[str]) -> dict[str, float]:
    """The plain mean over sets of each metric that every set has."""
    return {
        metric: sum(scores[metric]["mean"] for scores in sets) / len(sets)
        for metric in metrics
        if sets and all(metric in scores for scores in sets)
    }


def _interval(values: Sequence[float], seed: int) -> dict[str, float | None]:
    return bootstrap(values, seed)._asdict()
