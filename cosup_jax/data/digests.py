"""SHA-256 of files, remembered: a source of 35 GB is read once, not by every process at each start.

A file counts as unchanged while its size and its time of change, in nanoseconds, are.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cosup_jax.data.storage import locked
from cosup_jax.errors import UserError
from cosup_jax.runtime.workdir import write_atomic, writing

_SETTLED_S = 2  # a file changed since may change again without another time


def digest(paths: Sequence[Path], memory: Path) -> str:
    """Of files together, names aside; `memory` is where digests are kept. Raises UserError."""
    found = hashlib.sha256()
    for path in paths:
        found.update(bytes.fromhex(file_digest(path, memory)))
    return found.hexdigest()


def file_digest(path: Path, memory: Path) -> str:
    """Of one file. Raises UserError if it cannot be read."""
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]
    note = memory / "digests" / f"{name}.json"
    # One process reads the file, the others wait for what it notes.
    with writing(note), locked(note.with_suffix(".lock")):
        known, state = _read(note), _state(path)
        if state.items() <= known.items():
            return known["sha256"]
        found = _hash(path)
        if time.time_ns() - state["mtime_ns"] > _SETTLED_S * 10**9:
            write_atomic(note, json.dumps(state | {"sha256": found}) + "\n")
        return found


def _state(path: Path) -> dict[str, int]:
    with _readable(path):
        found = path.stat()
        return {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns}


def _hash(path: Path) -> str:
    with _readable(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; check the path") from None


def _read(note: Path) -> dict[str, Any]:
    """What was noted; nothing where that is not whole."""
    try:
        found = json.loads(note.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("sha256"), str) else {}
