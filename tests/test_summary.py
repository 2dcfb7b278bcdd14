"""From scored answers to means, splits and differences, each against one by hand."""

import numpy as np
import pytest

from cosup_jax.evaluation import summary


def row(id, em, hit, seen, **more):
    retrieval = {} if hit is None else {"retrieval_hit": float(hit)}
    return {"id": id, "seen": seen, "scores": {"em": em, **retrieval, **more}}


ROWS = [
    row("a", 1.0, True, True, f1=1.0),
    row("b", 0.0, True, False),
    row("c", 0.5, False, False, f1=0.5),
    row("d", 0.25, None, None),
]


def test_means_and_their_denominators():
    """Bugs: a question without a score counted as 0; an interval of another confidence."""
    found = summary.means(ROWS, seed=0)
    assert found["em"]["mean"] == 1.75 / 4 and found["em"]["n"] == 4
    assert found["f1"]["mean"] == 0.75 and found["f1"]["n"] == 2
    rng, values = np.random.default_rng(3), np.array([1.0, 0.0, 0.5, 0.25])
    drawn = [rng.choice(values, 4).mean() for _ in range(20_000)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert found["em"]["low"] == pytest.approx(low, abs=0.07)
    assert found["em"]["high"] == pytest.approx(high, abs=0.07)
    assert summary.means([], seed=0) == {}


def test_splits():
    """Bugs: a question without evidence counted as a failed retrieval; an empty part left out."""
    found = summary.splits(ROWS, seed=0)
    sizes = {name: part["questions"] for name, part in found.items()}
    assert sizes == {
        "retrieval succeeded": 2,
        "retrieval failed": 1,
        "evidence seen": 1,
        "evidence unseen": 2,
    }
    assert found["retrieval succeeded"]["scores"]["em"]["mean"] == 0.5
    assert found["evidence unseen"]["scores"]["em"]["mean"] == 0.25
    none = summary.splits([row("a", 1.0, None, None)], seed=0)
    assert {(part["questions"], len(part["scores"])) for part in none.values()} == {(0, 0)}


def test_differences_are_paired_by_question():
    """Bugs: rows paired by their place; the sign turned round; the width of two means' intervals
    for arms that differ by the same everywhere."""
    others = [row(r["id"], r["scores"]["em"] - 0.25, None, None) for r in reversed(ROWS)]
    found = summary.differences([*ROWS, row("e", 1.0, None, None)], others, seed=0)
    assert found == {"em": {"mean": 0.25, "low": 0.25, "high": 0.25, "n": 4}}


def test_macro_mean_counts_sets():
    """Bug: a large set outvotes the others, or a set without the score counts as 0."""
    many, few = summary.means(ROWS[:1] * 9, 0), summary.means(ROWS[1:2], 0)
    assert summary.macro([many, few], ["em", "f1"]) == {"em": 0.5}
    assert summary.macro([], ["em"]) == {}
