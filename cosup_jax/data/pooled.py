"""The passages of a data set and those of a corpus, as one corpus to search."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from cosup_jax.data.prepared import is_prepared
from cosup_jax.data.schema import Dataset, Passage, Passages
from cosup_jax.data.storage import id_order
from cosup_jax.errors import UserError


def pooled(dataset: Dataset, corpus: Dataset) -> Dataset:
    """The data set with the corpus behind its own passages, as NAME/ID; its examples are the same.

    Raises UserError for a data set that brings its tokens.
    """
    if is_prepared(dataset):
        raise UserError(
            f"config.eval.corpus={corpus.name} cannot join {dataset.name}, which was prepared and "
            "brings its tokens; name the files that it was prepared from in config.data.eval"
        )
    version = f"{dataset.version}+{corpus.name}-{corpus.version}"
    passages = _Pooled(dataset.passages, corpus.name, corpus.passages)
    return dataclasses.replace(dataset, version=version, passages=passages)


class _Pooled(Passages):
    """Row by row, nothing is copied."""

    def __init__(self, own: Passages, name: str, more: Passages):
        self._own, self._prefix, self._more = own, f"{name}/", more

    def row(self, id: str) -> int:
        if id in self._own or not id.startswith(self._prefix):
            return self._own.row(id)
        return len(self._own) + self._more.row(id.removeprefix(self._prefix))

    def at(self, row: int) -> Passage:
        if row < len(self._own):
            return self._own.at(row)
        passage = self._more.at(row - len(self._own))
        return dataclasses.replace(passage, id=self._prefix + passage.id)

    def by_id(self) -> np.ndarray:
        return id_order(self)

    def __len__(self) -> int:
        return len(self._own) + len(self._more)

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from (self._prefix + id for id in self._more)
