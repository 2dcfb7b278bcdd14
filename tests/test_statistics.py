"""Bootstrap intervals against theory and by hand."""

import numpy as np
import pytest

from cosup_jax.evaluation.statistics import Interval, bootstrap, paired_difference


def test_interval_of_a_share():
    """Bugs: a standard error of another n; a level that is one-sided; a mean of the samples."""
    values = np.arange(400) < 100
    found = bootstrap(values, seed=1)
    assert found.mean == 0.25 and found.n == 400
    half = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert found.low == pytest.approx(0.25 - half, abs=0.006)
    assert found.high == pytest.approx(0.25 + half, abs=0.006)
    narrow = bootstrap(values, seed=1, level=0.5)
    half = 0.674 * np.sqrt(0.25 * 0.75 / 400)
    assert narrow.high - narrow.low == pytest.approx(2 * half, rel=0.15)


def test_interval_is_the_percentile_bootstrap():
    """Bug: items drawn without replacement, or fewer than there are."""
    values = [0.0, 0.25, 1.0]
    means = sorted((a + b + c) / 3 for a in values for b in values for c in values)
    found = bootstrap(values, samples=20_000, level=0.6)  # of all 27 draws, alike in probability
    low, high = np.quantile(means, [0.2, 0.8], method="inverted_cdf")
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


def test_seed_decides():
    """Bug: intervals that move from run to run, or never."""
    values = np.random.default_rng(0).random(50)
    assert bootstrap(values, seed=3) == bootstrap(list(values), seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)


def test_no_interval_where_there_is_none():
    """Bugs: certainty from one item; a mean of nothing; nan that spreads unseen."""
    assert bootstrap([]) == Interval(None, None, None, 0)
    assert bootstrap([0.5]) == Interval(0.5, None, None, 1)
    assert bootstrap([1, 1, 1]) == Interval(1.0, 1.0, 1.0, 3)
    with pytest.raises(ValueError, match="not a finite number"):
        bootstrap([1.0, np.nan])


def test_paired_difference():
    """Bug: two means compared as if of different items, which hides a small steady difference."""
    rng = np.random.default_rng(0)
    others = rng.random(100)
    values = others + 0.01 + 0.001 * rng.standard_normal(100)
    found = paired_difference(values, others)
    assert found.mean == pytest.approx(0.01, abs=0.001) and found.n == 100
    assert 0.009 < found.low < found.mean < found.high < 0.011
    assert paired_difference(others, values).mean == pytest.approx(-found.mean)
    with pytest.raises(ValueError, match="3 scores cannot be paired with 2"):
        paired_difference([1, 2, 3], [1, 2])
