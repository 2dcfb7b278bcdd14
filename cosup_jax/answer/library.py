"""All passages that a trained run can retrieve: those of its data sets, set behind set."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cosup_jax import encode
from cosup_jax.assemble import Trained
from cosup_jax.data.markup import passage_text
from cosup_jax.data.schema import Dataset, Example, Passage
from cosup_jax.data.storage import locate
from cosup_jax.errors import UserError
from cosup_jax.evaluation.baselines import BM25
from cosup_jax.search import index
from cosup_jax.search.corpus import Corpus
from cosup_jax.search.index import Stored
from cosup_jax.search.vectors import Vectors

IN_MEMORY_BYTES = 2**31  # float32 vectors up to here are searched from memory, others from disk


class Library:
    """Passages by row, and their vectors, as WORKDIR/index has them: each distinct one of a set.

    Copies in two sets are two rows, which one search may find. Rows go by set, and by id within
    one; so do passages of equal score.
    """

    def __init__(self, shelves: Sequence[tuple[Dataset, Corpus, Vectors]]):
        self._shelves = shelves
        self.passages: Sequence[Passage] = _Chained([corpus.passages for _, corpus, _ in shelves])
        self._starts = list(itertools.accumulate((len(c) for _, c, _ in shelves), initial=0))
        self.version = " ".join(vectors.key for *_, vectors in shelves)
        self.vectors = searched(_ChainedVectors([vectors for *_, vectors in shelves]))

    @classmethod
    def of(cls, trained: Trained, workdir: Path) -> "Library":
        """Of the config's data sets; encodes what WORKDIR/index lacks. Raises UserError."""
        found = encode.datasets(trained, workdir)
        return cls([(dataset, *encode.index(dataset, trained, workdir)) for dataset in found])

    @functools.cached_property
    def bm25(self) -> BM25:
        """Of all passages, indexed when first asked for."""
        return BM25([passage_text(passage) for passage in self.passages])

    def rows(self, example: Example, field: str) -> list[int]:
        """Of the passages that a field of a question names, each once: in the first set that has
        the id.

        Raises UserError for an id that none has.
        """
        rows = (self._row(id, example, field) for id in getattr(example, field))
        return list(dict.fromkeys(rows))

    def _row(self, id: str, example: Example, field: str) -> int:
        for (dataset, corpus, _), start in zip(self._shelves, self._starts, strict=False):
            if id in dataset.passages:
                return start + int(corpus.row_of[dataset.passages.row(id)])
        raise UserError(
            f"question {example.id!r}: {field} {id!r} is no passage of the config's data sets"
        )


def searched(vectors: index.Corpus) -> np.ndarray | index.Corpus:
    """[N, D] float32 in memory, where that is large enough for them; others as they are."""
    if 4 * len(vectors) * vectors.width > IN_MEMORY_BYTES:
        return vectors
    found = np.zeros((len(vectors), vectors.width), np.float32)
    first = 0
    for stored in vectors.chunks(2**16):
        part = stored.floats()
        found[first : first + len(part)] = part
        first += len(part)
    return found


class _Chained(Sequence[Passage]):
    def __init__(self, parts: Sequence[Sequence[Passage]]):
        self._parts = parts
        self._starts = list(itertools.accumulate(map(len, parts), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, row: int) -> Passage:
        part, inside = locate(self._starts, row)
        return self._parts[part][inside]


class _ChainedVectors:
    """A corpus for `index.search`."""

    def __init__(self, parts: Sequence[Vectors]):
        self._parts, self.width = parts, parts[0].width
        self._starts = list(itertools.accumulate(map(len, parts), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def chunks(self, rows: int) -> Iterator[Stored]:
        """All rows in order, at most `rows` at a time."""
        for part in self._parts:
            yield from part.chunks(rows)

    def take(self, rows: Sequence[int]) -> np.ndarray:
        """[n, D] float32 vectors of some rows."""
        places = [locate(self._starts, int(row)) for row in rows]
        return np.concatenate([self._parts[part].take([inside]) for part, inside in places])
