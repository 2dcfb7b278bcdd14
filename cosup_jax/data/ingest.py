"""A source, read once: checked row by row and kept on disk, so that memory does not grow with it.

Rows lie as JSON in one flat file each for examples and passages; a passage is found by the hash of
its id. All of it is memory-mapped.
"""

import dataclasses
import hashlib
import json
import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cosup_jax.data.checks import check_references, passage_warnings, warnings
from cosup_jax.data.problems import BadRow, Problems
from cosup_jax.data.schema import Dataset, Example, Passage, Passages
from cosup_jax.data.storage import (
    ArrayWriter,
    IdIndex,
    build_once,
    check_lengths,
    hash_of,
    intact,
    map_array,
    span,
    write_array,
)

VERSION = 5  # raise it whenever a format, a check or the files below change
Records = Iterator[tuple[str, Passage | Example]]  # each with its FILE:LINE

_TABLES = {Passage: "passages", Example: "examples"}
_VALUES = {
    cls: operator.attrgetter(*(field.name for field in dataclasses.fields(cls))) for cls in _TABLES
}
_ARRAYS = {
    f"{table}_{part}": dtype
    for table in _TABLES.values()
    for part, dtype in (("rows", "|u1"), ("offsets", "<i8"), ("hashes", "<u8"))
}


def ingest(
    name: str, version: str, read: Callable[[Problems], Records], directory: Path, place: str = ""
) -> tuple[Dataset, Problems]:
    """The good rows of a source, and what is wrong with the others.

    Args:
      version: of the content; what is in `directory` under the same name and version is used.
      read: yields every row that is well-formed in itself, and notes the others.
      directory: where data sets are kept.
      place: of the files, which findings name.
    """
    key = hashlib.sha256(repr((VERSION, name, version, place)).encode()).hexdigest()[:16]
    target = directory / f"{name}-{key}"
    build_once(target, lambda temporary: _build(temporary, name, read))
    with intact(target):
        about = json.loads((target / "about.json").read_text())
        split_of = map_array(target / "examples_split", "<i4")
        splits = {split: np.flatnonzero(split_of == i) for i, split in enumerate(about["splits"])}
        dataset = Dataset(name, version, _Examples(target), _Corpus(target), splits)
        check_lengths("examples_kept", len(dataset.examples), split_of)
        return dataset, Problems.from_dict(about["problems"])


def _build(directory: Path, name: str, read: Callable[[Problems], Records]) -> None:
    problems = Problems()
    shown = {"desc": f"reading {name}", "unit": " rows", "delay": 2, "leave": False}
    with ArrayWriter(directory, _ARRAYS) as writer:
        for place, record in tqdm(read(problems), disable=None, **shown):
            table = _TABLES[type(record)]
            row = json.dumps([place, *_VALUES[type(record)](record)], ensure_ascii=False).encode()
            writer.add_item(table, rows=row)
            writer.add(f"{table}_hashes", [hash_of(record.id)])
            if isinstance(record, Passage):
                for kind, reason in passage_warnings(record):
                    problems.add(kind, place, record.id, reason)
    _note_copies(directory, problems)
    splits = _check_examples(directory, problems)
    about = {"splits": splits, "problems": problems.to_dict()}
    (directory / "about.json").write_text(json.dumps(about))


def _note_copies(directory: Path, problems: Problems) -> None:
    """Of rows with one id the first counts. Writes which rows count, and the passages' index."""
    for table in _TABLES.values():
        rows = _Table(directory, table)
        hashes = map_array(directory / f"{table}_hashes", "<u8")
        order = np.argsort(hashes, kind="stable")
        ordered, copies, ids = hashes[order], [], set()  # `ids` of the rows that share a hash
        for at in np.flatnonzero(ordered[1:] == ordered[:-1]) + 1:
            if at < 2 or ordered[at - 2] != ordered[at]:
                ids = {rows[order[at - 1]][1]}
            id = rows[order[at]][1]
            if id in ids:
                copies.append(order[at])
            ids.add(id)
        for row in sorted(copies):
            place, id, *_ = rows[row]
            problems.add("duplicate_id", place, id, "this id is taken by an earlier line")
        kept = np.setdiff1d(np.arange(len(rows)), copies)
        write_array(directory / f"{table}_kept", kept, "<i8")
        if table == "passages":
            IdIndex.write(directory, "corpus", (rows[row][1] for row in kept))


def _check_examples(directory: Path, problems: Problems) -> list[str]:
    """Writes which examples count, and the split of each; returns the splits' names."""
    corpus = _Corpus(directory)
    table, good, splits, split_of = _Table(directory, "examples"), [], {}, []
    for row in map_array(directory / "examples_kept", "<i8").tolist():
        place, *fields = table[row]
        example = Example.of(fields)
        try:
            check_references(example, corpus)
        except BadRow as error:
            problems.add(error.kind, place, example.id, error.reason)
            continue
        for kind, reason in warnings(example, corpus):
            problems.add(kind, place, example.id, reason)
        good.append(row)
        split_of.append(splits.setdefault(example.split, len(splits)))
    write_array(directory / "examples_kept", good, "<i8")
    write_array(directory / "examples_split", split_of, "<i4")
    return list(splits)


class _Table(Sequence):
    """Rows as the lists that were written: place, then the fields."""

    def __init__(self, directory: Path, name: str):
        self._bytes = map_array(directory / f"{name}_rows", "|u1")
        self._offsets = map_array(directory / f"{name}_offsets", "<i8")
        check_lengths(f"{name}_offsets", int(self._offsets[-1]), self._bytes)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> list[Any]:
        return json.loads(self._bytes[span(self._offsets, row)].tobytes())


class _Examples(Sequence[Example]):
    """The examples that count."""

    def __init__(self, directory: Path):
        self._table = _Table(directory, "examples")
        self._kept = map_array(directory / "examples_kept", "<i8")

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, row: int) -> Example:
        return Example.of(self._table[self._kept[row]][1:])

    def where(self, row: int) -> str:
        """FILE:LINE."""
        return self._table[self._kept[row]][0]


class _Corpus(Passages):
    """The passages that count; ids are looked up by their hash."""

    def __init__(self, directory: Path):
        self._table = _Table(directory, "passages")
        self._kept = map_array(directory / "passages_kept", "<i8")
        self._index = IdIndex(directory, "corpus")

    def row(self, id: str) -> int:
        return self._index.find(id, lambda row: self.at(row).id)

    def at(self, row: int) -> Passage:
        return Passage(*self._table[self._kept[row]][1:])

    def where(self, row: int) -> str:
        """FILE:LINE."""
        return self._table[self._kept[row]][0]

    def by_id(self) -> np.ndarray:
        return self._index.order

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[str]:
        return (self._table[row][1] for row in self._kept)
