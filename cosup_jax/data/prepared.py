"""Prepared data: text and tokens of every row in ArrayRecord files, with a manifest.

`prepared:DIR` is read in place, row by row; nothing is parsed, checked or tokenised again.

    DIR/manifest.json                           counts, versions, settings, SHA-256 of every file
    DIR/tokenizer/gen, DIR/tokenizer/ctx        as transformers reads them
    DIR/NAME.passages-00000.array_record ...    msgpack: passage, tokens, cut
    DIR/NAME.examples-00000.array_record ...    msgpack: example, tokens, roles, rets; by split
    DIR/NAME_hashes, DIR/NAME_by_hash           passages by the hash of their id
    DIR/NAME_by_id                              passages in the order of ids
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from cosup_jax.data.digests import file_digest
from cosup_jax.data.rows import alike
from cosup_jax.data.schema import Dataset, Example, Passage, Passages
from cosup_jax.data.storage import IdIndex, replacing
from cosup_jax.errors import UserError
from cosup_jax.runtime.paths import inside

FORMAT = 2  # raise it whenever the files change
FILE_ROWS = 262_144  # rows of a file
_MANIFEST = {  # as far as it is read; "" is any name
    "settings": {},
    "sources": {
        "": {
            **{"version": "", "passages": 0, "splits": {"": 0}},
            "files": {"": {"bytes": 0, "sha256": ""}},
        }
    },
}
_FIELDS = [field.name for field in dataclasses.fields(Example)]


class Encoded(NamedTuple):
    """An example as Gen reads it, passages by their row in the data set's corpus."""

    tokens: np.ndarray  # int32 [n]
    roles: np.ndarray  # uint8 [n]
    ret_positions: np.ndarray  # int32 [rets]
    evidence: np.ndarray  # int32 [rets]
    negatives: np.ndarray  # int32


def load(directory: str, name: str, memory: Path) -> Dataset:
    """One of the sources in a directory; `memory` is where digests of its files are kept.

    Raises UserError if it is not there or not whole.
    """
    path, about = Path(directory), manifest(directory)
    if name not in about["sources"]:
        known = ", ".join(about["sources"])
        raise UserError(f"data source 'prepared:{directory}::{name}': there is {known}")
    source = about["sources"][name]
    for file, fact in source["files"].items():
        if not inside(path, file).is_file() or (path / file).stat().st_size != fact["bytes"]:
            raise UserError(f"{path / file}: missing or cut off; run --mode=prepare again")
        if file_digest(path / file, memory) != fact["sha256"]:
            raise UserError(f"{path / file}: not what was written; run --mode=prepare again")
    ends = list(itertools.accumulate(source["splits"].values(), initial=0))
    rows = itertools.starmap(np.arange, itertools.pairwise(ends))
    splits = dict(zip(source["splits"], rows, strict=True))
    examples, passages = _Examples(path, name, source), _Corpus(path, name, source)
    return Dataset(name, source["version"], examples, passages, splits)


def manifest(directory: str) -> dict[str, Any]:
    """What a prepared directory holds. Raises UserError if it is none."""
    path = Path(directory) / "manifest.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        inside = Path(directory) / "prepared" / "manifest.json"
        hint = f"you mean {inside.parent}" if inside.is_file() else "see --mode=prepare"
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: no prepared data here ({reason}); {hint}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{path}: of another version of this program; run --mode=prepare again")
    if not alike(found, _MANIFEST):
        raise UserError(f"{path}: damaged; run --mode=prepare again")
    return found


def check_settings(directory: str, now: Mapping[str, Any]) -> None:
    """Raises UserError unless the tokens were made as the config would make them now."""
    settings = manifest(directory)["settings"]
    if settings.keys() != now.keys():
        raise UserError(
            f"prepared:{directory} was made by another version of this program, which knows other "
            "settings; run --mode=prepare again"
        )
    for key, value in settings.items():
        if value != now[key]:
            raise UserError(
                f"prepared:{directory} was made with {key} {value!r:.70}, this run has "
                f"{now[key]!r:.70}; run --mode=prepare again, or set it back"
            )


def is_prepared(dataset: Dataset) -> bool:
    """Whether the data set brings its tokens."""
    return isinstance(dataset.examples, _Examples)


def write(
    directory: Path,
    dataset: Dataset,
    ctx: Iterable[tuple[np.ndarray, int]],
    gen: Mapping[str, Iterable[Encoded]],
) -> dict[str, Any]:
    """Writes one source, in files that are whole or absent; returns its part of the manifest.

    Args:
      ctx: tokens of each passage, and how many were cut off.
      gen: of each split its examples, in order.
    """
    name = dataset.name
    passages = (
        {"passage": [p.id, p.title, p.text], "tokens": _bytes(tokens), "cut": int(cut)}
        for p, (tokens, cut) in zip(dataset.passages.values(), ctx, strict=True)
    )
    examples = (
        _packed(dataset.examples[row], encoded)
        for split, rows in dataset.splits.items()
        for row, encoded in zip(rows, gen[split], strict=True)
    )
    count = sum(map(len, dataset.splits.values()))
    files = _write_records(directory, f"{name}.passages", passages, len(dataset.passages))
    files += _write_records(directory, f"{name}.examples", examples, count)
    files += IdIndex.write(directory, name, dataset.passages)
    return {
        "version": dataset.version,
        "passages": len(dataset.passages),
        "splits": {split: len(rows) for split, rows in dataset.splits.items()},
        "files": {file: _fact(directory / file) for file in files},
    }


def _packed(example: Example, encoded: Encoded) -> dict[str, Any]:
    return {
        "example": [getattr(example, name) for name in _FIELDS],
        "tokens": _bytes(encoded.tokens),
        "roles": encoded.roles.tobytes(),
        "rets": _bytes(encoded.ret_positions),
        "evidence": _bytes(encoded.evidence),
        "negatives": _bytes(encoded.negatives),
    }


def _bytes(values: Any) -> bytes:
    return np.asarray(values, "<i4").tobytes()


def _write_records(directory: Path, stem: str, rows: Iterator[dict], count: int) -> list[str]:
    names = []
    for first in range(0, count, FILE_ROWS):
        name = f"{stem}-{first // FILE_ROWS:05}.array_record"
        with replacing(directory / name) as temporary:
            _write_file(temporary, itertools.islice(rows, FILE_ROWS))
        names.append(name)
    return names


def _write_file(path: Path, rows: Iterator[dict]) -> None:
    packed = map(msgpack.packb, rows)
    try:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for row in packed:
            writer.write(row)
        writer.close()
    except RuntimeError as error:  # of which it says no more
        raise UserError(f"cannot write {path.parent}: {error}; free some space there") from None


def _fact(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


@contextlib.contextmanager
def _intact(where: Any) -> Iterator[None]:
    """Raises UserError for whatever is raised over damaged files."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: damaged ({reason:.100}); run --mode=prepare again") from None


class _Records(Sequence):
    """Rows of some ArrayRecord files, unpacked when asked for; pickles as their paths."""

    def __init__(self, directory: Path, stem: str, files: Iterable[str], count: int):
        paths = [str(directory / file) for file in sorted(files) if file.startswith(f"{stem}-")]
        self._paths, self._count = paths, count
        with _intact(directory / stem):
            self._source = ArrayRecordDataSource(paths) if paths else []
            found = len(self._source)
        if found != count:
            raise UserError(
                f"{directory / stem}: {found} rows where the manifest has {count}; "
                "run --mode=prepare again"
            )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> dict[str, Any]:
        if row >= self._count:
            raise IndexError(row)
        return self.many([row])[0]

    def many(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        if not len(rows):
            return []
        with _intact(self.where(rows[0])):
            return list(map(msgpack.unpackb, self._source.__getitems__(rows)))

    def where(self, row: int) -> str:
        return f"{self._paths[row // FILE_ROWS]}[{row % FILE_ROWS}]"


class _Examples(Sequence[Example]):
    def __init__(self, directory: Path, name: str, source: Mapping[str, Any]):
        count = sum(source["splits"].values())
        self._records = _Records(directory, f"{name}.examples", source["files"], count)
        self.where = self._records.where

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, row: int) -> Example:
        return Example.of(self._records[int(row)]["example"])

    def encoded(self, rows: Sequence[int]) -> list[Encoded]:
        """Their tokens."""
        numbers = lambda row, name: np.frombuffer(row[name], "<i4")
        return [
            Encoded(
                numbers(row, "tokens"),
                np.frombuffer(row["roles"], np.uint8),
                *(numbers(row, name) for name in ("rets", "evidence", "negatives")),
            )
            for row in self._records.many(rows)
        ]


class _Corpus(Passages):
    def __init__(self, directory: Path, name: str, source: Mapping[str, Any]):
        files, count = source["files"], source["passages"]
        self._records = _Records(directory, f"{name}.passages", files, count)
        self._index = IdIndex(directory, name)
        self.where = self._records.where

    def row(self, id: str) -> int:
        return self._index.find(id, lambda row: self.at(row).id)

    def at(self, row: int) -> Passage:
        return Passage(*self._records[int(row)]["passage"])

    def by_id(self) -> np.ndarray:
        return self._index.order

    def encoded(self, rows: Sequence[int]) -> list[tuple[np.ndarray, int]]:
        """Ctx's tokens of some passages, and how many were cut off."""
        found = self._records.many(rows)
        return [(np.frombuffer(row["tokens"], "<i4"), row["cut"]) for row in found]

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[str]:
        return (passage.id for passage in self.values())
