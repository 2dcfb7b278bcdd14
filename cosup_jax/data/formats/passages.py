"""A corpus alone: passages {"id", "title", "text"}, JSONL, or ArrayRecord of JSON or msgpack."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
from array_record.python.array_record_data_source import ArrayRecordDataSource

from cosup_jax.data.formats import jsonl
from cosup_jax.data.problems import BadRow, Problems
from cosup_jax.data.rows import Row, parse, read_lines
from cosup_jax.data.schema import Passage
from cosup_jax.errors import UserError
from cosup_jax.runtime.paths import expanded

KINDS = (".jsonl", ".jsonl.gz", ".array_record", ".arrayrecord")
_CHUNK = 1024  # records read at a time


def files(where: str) -> list[Path]:
    """The file, or those of the directory, sorted. Raises UserError if there is none."""
    path = expanded(where)
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [file for file in found if file.is_file() and _kind(file)]
    if not found:
        problem = "No such file" if not path.exists() else "no corpus"
        raise UserError(f"{path}: {problem}; it may be {', '.join(KINDS)} or a directory of these")
    return found


def read(where: str, problems: Problems) -> Iterator[tuple[str, Passage]]:
    """All passages, each with its FILE:LINE, or FILE[RECORD]. Raises UserError for files."""
    for path in files(where):
        packed = "jsonl" not in _kind(path)
        for row in _records(path, problems) if packed else read_lines(path, problems):
            try:
                yield row.where, jsonl.passage(row)
            except BadRow as error:
                problems.add(error.kind, row.where, row.id, error.reason)


def _kind(path: Path) -> str:
    """Its ending, or that before the number of a shard: x.array_record-00001-of-00008."""
    name = re.sub(r"-\d+(-of-\d+)?(\.gz)?$", r"\2", path.name)
    return next((kind for kind in KINDS if name.endswith(kind)), "")


def _records(path: Path, problems: Problems) -> Iterator[Row]:
    try:
        source = ArrayRecordDataSource([str(path)])
        for first in range(0, len(source), _CHUNK):
            rows = range(first, min(first + _CHUNK, len(source)))
            for number, record in zip(rows, source.__getitems__(rows), strict=True):
                where = f"{path}[{number}]"
                try:
                    yield Row(where, _unpacked(record))
                except BadRow as error:
                    problems.add(error.kind, where, "", error.reason)
    except (RuntimeError, ValueError, IndexError) as error:  # of a damaged file
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: no whole ArrayRecord file ({reason:.100})") from None


def _unpacked(record: bytes) -> Any:
    if record.lstrip()[:1] == b"{":
        return parse(record)
    try:
        return msgpack.unpackb(record)
    except (ValueError, msgpack.UnpackException) as error:
        raise BadRow("not_json", f"neither JSON nor msgpack ({error})") from None
