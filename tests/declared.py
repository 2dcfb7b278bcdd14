"""Holds what a measure has found to what it says it gives."""

import re

from cosup_jax.config import Config
from cosup_jax.studies.measures import MEASURES
from cosup_jax.studies.run import COSINE, NUMBER, POINTS, POSITIVE, SHARE, Scores

_MANY, _ROUNDED = float("inf"), 1 + 1e-5
_LEAST_AND_MOST = {
    SHARE: (0, 1),
    POINTS: (-1, 1),
    COSINE: (-_ROUNDED, _ROUNDED),
    POSITIVE: (0, _MANY),
    NUMBER: (-_MANY, _MANY),
}


def held_to_its_word(measure: str, found: Scores, config: Config | None = None) -> None:
    """Every metric found is declared once, and its values are of the kind declared."""
    gives = MEASURES[measure].gives(config or Config())
    for metric, items in [pair for metrics in found.values() for pair in metrics.items()]:
        declared = [kind for pattern, kind in gives.items() if re.fullmatch(pattern, metric)]
        assert len(declared) == 1, (metric, declared)
        least, most = _LEAST_AND_MOST[declared[0]]
        assert all(least <= value <= most for value in items.values()), metric


def no_empty_words(measure: str, found: Scores, config: Config | None = None) -> None:
    """Nothing is declared that is not found."""
    names = {metric for metrics in found.values() for metric in metrics}
    for pattern in MEASURES[measure].gives(config or Config()):
        assert any(re.fullmatch(pattern, name) for name in names), pattern
