"""Numbers in what people read."""

import pytest

from cosup_jax.wording import counted


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0 queries"), (1, "1 query"), (1000, "1,000 queries")],
)
def test_one_is_no_plural(number, said):
    """Bug: "1 queries"."""
    assert counted(number, "query", "queries") == said


def test_the_plural_is_regular():
    """Bug: "2 row"."""
    assert (counted(1, "bad row"), counted(2, "bad row")) == ("1 bad row", "2 bad rows")
