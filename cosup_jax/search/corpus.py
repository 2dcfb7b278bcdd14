"""The passages of a data set as something to search: each distinct one once, encoded to disk."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from cosup_jax.config import IndexConfig
from cosup_jax.contract import EmbeddingContract
from cosup_jax.data.batch import BatchShape
from cosup_jax.data.blocks import canonical
from cosup_jax.data.pipeline import PackedPassages, pack_passages
from cosup_jax.data.schema import Dataset, Passage
from cosup_jax.data.storage import Chosen
from cosup_jax.data.tokens import PassageStore
from cosup_jax.errors import UserError
from cosup_jax.runtime import processes
from cosup_jax.search import vectors
from cosup_jax.search.encoder import Encoder
from cosup_jax.search.vectors import Layout, Vectors


class Corpus(Iterable[PackedPassages]):
    """Every distinct passage of a store once; iterated in Ctx rows, packed anew each time.

    Rows are in the order of ids, so that equal scores, which all searches break by row, come out
    by id, whatever the order of the source. Of passages with the same tokens the lowest id counts.
    """

    def __init__(self, dataset: Dataset, store: PassageStore, shape: BatchShape):
        self._dataset, self._store, self._shape = dataset, store, shape
        order = dataset.passages.by_id()
        first, row = np.unique(canonical(store.identities[order]), return_inverse=True)
        self._rows = order[first]  # in the store
        self.row_of = np.empty_like(row)  # of each passage of the store
        self.row_of[order] = row

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[PackedPassages]:
        return self.packed(range(len(self)))

    def packed(self, rows: range) -> Iterator[PackedPassages]:
        """Some of them, numbered from 0 on."""
        return pack_passages(self._tokens(self._rows[rows.start : rows.stop]), self._shape)

    def rows_in(self, other: "Corpus") -> np.ndarray:
        """Where another corpus of the same data set has each of these passages."""
        return other.row_of[self._rows]

    @property
    def tokens(self) -> Sequence[np.ndarray]:
        """As Ctx reads them, in the order of the corpus."""
        return self._tokens(self._rows)

    def _tokens(self, rows: np.ndarray) -> Sequence[np.ndarray]:
        return Chosen(self._store.ctx.__getitem__, rows)

    @property
    def passages(self) -> Sequence[Passage]:
        """In the order of the corpus."""
        return Chosen(self._dataset.passages.at, self._rows)

    @property
    def fingerprint(self) -> str:
        """Of the texts and ids, and of their order."""
        found = hashlib.sha256(self._dataset.version.encode())
        found.update(np.ascontiguousarray(self._store.identities[self._rows]))
        return found.hexdigest()


def encode_to_disk(
    directory: Path,
    corpus: Corpus,
    encoder: Encoder,
    params: dict,
    contract: EmbeddingContract,
    config: IndexConfig,
) -> Vectors:
    """The vectors of a corpus in a directory; what is there of them already is not made again.

    Shards are encoded one after the other, by all processes together, and written by process 0,
    whose directory the others must see.

    Raises:
      UserError: a vector that is not finite; no room on the disk.
    """
    stored = (config.dtype, config.shard_rows)
    layout = Layout(contract, corpus.fingerprint, len(corpus), *stored, encoder.dtype)
    shards, first = layout.shards(), jax.process_index() == 0
    todo = json.dumps(vectors.missing(directory, layout)) if first else None
    todo = json.loads(processes.broadcast("shards to encode", todo, processes.BARRIER_SECONDS))
    done = len(corpus) - sum(len(shards[number][1]) for number in todo)
    shown = {"desc": f"encoding {directory.name}", "unit": " passages", "delay": 2, "leave": False}
    with tqdm(total=len(corpus), initial=done, disable=None, **shown) as bar:

        def counted(batches: Iterable[PackedPassages]) -> Iterator[PackedPassages]:
            for batch in batches:
                yield batch
                bar.update(int(batch.passage_valid_UxP.sum()))

        for number in todo:
            name, rows = shards[number]
            vector_NxD = encoder.corpus(params, counted(corpus.packed(rows)), len(rows))
            ids = [corpus.passages[row].id for row in rows]
            _check_finite(vector_NxD, ids)
            if first:
                vectors.write_shard(directory / name, vector_NxD, ids, config.dtype)
    processes.barrier("vectors written")
    if first:
        vectors.write_manifest(directory, layout)
    processes.barrier("manifest written")
    return Vectors.open(directory, contract)


def _check_finite(vector_NxD: np.ndarray, ids: Sequence[str]) -> None:
    bad = np.flatnonzero(~np.isfinite(vector_NxD).all(axis=1))
    if len(bad):
        raise UserError(
            f"the vector of passage {ids[bad[0]]!r} (first of {len(bad)}) is not finite: the "
            "model has diverged; take another checkpoint"
        )
