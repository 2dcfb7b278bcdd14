"""Answer records on disk: JSON lines that survive a kill, each with what it was answered by."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cosup_jax.data.rows import alike
from cosup_jax.errors import UserError
from cosup_jax.runtime.workdir import write_atomic, writing

Record = dict[str, Any]
_BEGINNING = b'{"id": "'  # of every line


class Answers:
    """The answers of one arm to one set; `known` holds those that need not be answered again.

    A line counts only if it is whole and carries this `run`: a last line that a kill cut off, and
    answers of another model, config or data, are dropped when the file is opened.
    """

    def __init__(self, path: Path, run: str, like: Mapping[str, Any] | None = None):
        """Args:
          path: of the file, which need not exist.
          run: what the answers depend on, as a digest.
          like: how a record is built, as `rows.alike` reads it.

        Raises:
          UserError: a record of this run that is built otherwise: somebody has edited it.
        """
        self._path, self._run = path, run
        with writing(path):
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            found = [(line, _parse(line)) for line in lines]
            kept = [(line, record) for line, record in found if record.get("run") == run]
            for record in (record for _, record in kept if like and not alike(record, like)):
                raise UserError(
                    f"{path}: the answer to {record['id']!r:.60} is not as it was written; delete "
                    "its line, and it is answered anew"
                )
            if len(kept) < len(lines):
                write_atomic(path, b"".join(line for line, _ in kept).decode())
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="ascii")
        self.known: dict[str, Record] = {record["id"]: record for _, record in kept}

    def add(self, record: Mapping[str, Any]) -> None:
        """Appends one answer; it is on disk when this returns. Raises UserError if that is full."""
        whole = {**record, "run": self._run}
        with writing(self._path):
            self._file.write(_line(whole))
            self._file.flush()
        self.known[whole["id"]] = whole

    def finish(self, ids: Sequence[str], scored: Mapping[str, Mapping[str, Any]]) -> list[Record]:
        """Replaces the file by the records of `ids`, in that order, with what `scored` adds."""
        records = [self.known[id] | scored.get(id, {}) for id in ids]
        self.close()
        with writing(self._path):
            write_atomic(self._path, lines(records))
        return records

    def close(self) -> None:
        """Leaves the file as it stands."""
        if not self._file.closed:
            with writing(self._path):
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


def read(path: Path) -> list[Record]:
    """The whole records of a file, in its order; none where there is no file."""
    if not path.exists():
        return []
    return [record for line in path.read_bytes().splitlines(True) if (record := _parse(line))]


def all_of(path: Path, run: str) -> bool:
    """Whether a file holds records of this run and nothing else; the last may be cut off."""
    *whole, rest = path.read_bytes().split(b"\n")
    ours = lambda line: _parse(line + b"\n").get("run") == run
    cut_off = _BEGINNING.startswith(rest[: len(_BEGINNING)]) and not _parse(rest + b"\n")
    return all(map(ours, whole)) and (cut_off or ours(rest))


def lines(records: Iterable[Mapping[str, Any]]) -> str:
    """Records as a file has them."""
    return "".join(map(_line, records))


def _parse(line: bytes) -> Record:
    """{} for a line that is cut off, or is no record."""
    try:
        found = json.loads(line) if line.endswith(b"\n") else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("id"), str) else {}


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
