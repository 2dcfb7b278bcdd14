"""What the tests of importers share: a source ingested, and rows with something broken."""

import copy
import itertools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from hypothesis import strategies as st

from cosup_jax.data import digests, ingest, markup
from cosup_jax.data.problems import Problems
from cosup_jax.data.schema import Dataset

_numbers = itertools.count()
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**12),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["", " ", "x", "[Ret:x]", "[Cs]", "\ud800", "::", "<paragraph>"]),
    st.sampled_from([[], {}, [None], [[]], {"a": []}, ["x", 1], [{"text": 1}]]),
)
WRONG = st.sampled_from([None, 1.5, True, [], {}, [1], {"a": "b"}, ""])  # no text, number or list


def imported(format: ModuleType, where: Any, directory: Path) -> tuple[Dataset, Problems]:
    """Read and checked anew; `where` as the format takes it."""
    version = digests.digest(format.files(str(where)), directory)
    read = lambda problems: format.read(str(where), problems)
    return ingest.ingest(f"set{next(_numbers)}", version, read, directory)


def training_text(dataset: Dataset) -> list[list[tuple]]:
    """Of every example the pieces, as (role, text or control token) after the prompt."""
    return [
        [
            (piece.role, piece.text or f"<{piece.control}>")
            for piece in markup.pieces(example, dataset.passages)[1:]
        ]
        for example in dataset.examples
    ]


def paths(value: Any, prefix: tuple = ()) -> list[tuple]:
    """The way to everything within a JSON value."""
    found = []
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            found += [(*prefix, key), *paths(inner, (*prefix, key))]
    return found


def replaced(value: Any, path: tuple, other: Any) -> Any:
    """A copy with something else at a path."""
    changed = copy.deepcopy(value)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = other
    return changed


def write_lines(path: Path, *lines: Any) -> Path:
    """JSON lines; text and bytes as they are."""
    plain = [line if isinstance(line, (str, bytes)) else json.dumps(line) for line in lines]
    path.write_bytes(b"".join((x.encode() if isinstance(x, str) else x) + b"\n" for x in plain))
    return path
