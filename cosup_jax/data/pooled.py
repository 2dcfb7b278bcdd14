"""The passages of a data set and those of a corpus, as one corpus to search."""

import bisect
import dataclasses
from collections.abc import Iterator

import numpy as np

from cosup_jax.data.schema import Dataset, Passage, Passages
from cosup_jax.errors import UserError


def pooled(dataset: Dataset, corpus: Dataset) -> Dataset:
    """The data set with the corpus behind its own passages, as NAME/ID; its examples are the same.

    Raises UserError if it has such ids itself.
    """
    version = f"{dataset.version}+{corpus.name}-{corpus.version}"
    passages = _Pooled(dataset.passages, corpus.name, corpus.passages)
    return dataclasses.replace(dataset, version=version, passages=passages)


class _Pooled(Passages):
    """Row by row, nothing is copied."""

    def __init__(self, own: Passages, name: str, more: Passages):
        self._own, self._prefix, self._more = own, f"{name}/", more
        self._order = own.by_id()
        id_at = lambda row: own.at(int(row)).id
        self._before = bisect.bisect_left(self._order, self._prefix, key=id_at)  # ids below NAME/
        for row in self._order[self._before : self._before + 1]:
            if id_at(row).startswith(self._prefix):
                raise UserError(
                    f"passage {id_at(row)!r} has an id as those of the corpus {name} get; rename "
                    "the corpus"
                )

    def row(self, id: str) -> int:
        if id.startswith(self._prefix):
            return len(self._own) + self._more.row(id.removeprefix(self._prefix))
        return self._own.row(id)

    def at(self, row: int) -> Passage:
        if row < len(self._own):
            return self._own.at(row)
        passage = self._more.at(row - len(self._own))
        return dataclasses.replace(passage, id=self._prefix + passage.id)

    def by_id(self) -> np.ndarray:
        below, above = np.split(self._order, [self._before])
        return np.concatenate([below, len(self._own) + self._more.by_id(), above])

    def __len__(self) -> int:
        return len(self._own) + len(self._more)

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from (self._prefix + id for id in self._more)
