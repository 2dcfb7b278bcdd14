"""Files that are whole or absent: directories built once, memory-mapped arrays, ragged arrays."""

import bisect
import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cosup_jax.errors import UserError
from cosup_jax.runtime.workdir import writing

# Some network file systems lock nothing; then two processes may build the same, and one wins.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def build_once(target: Path, build: Callable[[Path], None], wait: bool = True) -> bool:
    """Makes the directory `target` by `build(temporary)`, unless it is there.

    It appears whole or not at all: a kill leaves a temporary name behind, which the next builder
    removes. Where another process is building it we wait, or, without `wait`, do not. Returns
    whether the directory is there. Raises UserError where the disk is full.
    """
    if target.is_dir():
        return True
    with writing(target):
        return _build_once(target, build, wait)


def _build_once(target: Path, build: Callable[[Path], None], wait: bool) -> bool:
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f".{target.name}.lock"), wait) as lock:
        if lock == "taken" or target.is_dir():
            return lock != "taken"
        if lock == "held":
            for left in target.parent.glob(f".{target.name}.*.part"):
                shutil.rmtree(left, ignore_errors=True)
        name = tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        temporary = Path(name)
        try:
            temporary.chmod(0o755)
            build(temporary)
            _sync(temporary)
            os.rename(temporary, target)
        except OSError:
            if not target.is_dir():  # otherwise a process that saw no lock was first
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    _sync(target.parent, files=False)
    return True


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[str]:
    """Holds a lock file; the system frees it when its holder dies.

    Yields "held"; "taken" where, without `wait`, another process has it; "none" where the file
    system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            found = "held"
        except BlockingIOError:
            found = "taken"
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            found = "none"
        yield found


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write, which takes the place of `path` whole, or is removed.

    Whoever has the old one mapped keeps it. Raises UserError where the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    with writing(path):
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_array(path: Path, values: Any, dtype: np.dtype | str) -> None:
    """A flat array file, for `map_array`. Raises UserError where the disk is full."""
    with replacing(path) as temporary:
        # ndarray.tofile does not tell why it failed.
        temporary.write_bytes(np.ascontiguousarray(values, dtype).data)


def map_array(path: Path, dtype: np.dtype | str) -> np.ndarray:
    """A flat array file, mapped read-only."""
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r").view(np.ndarray)


@contextlib.contextmanager
def intact(directory: Path) -> Iterator[None]:
    """Raises UserError for what damaged files of a directory, once built whole, let us run into."""
    try:
        yield
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        # Its neighbours go too: what it was made of may be damaged as well.
        raise UserError(
            f"{directory}: damaged ({reason:.100}); delete {directory.parent}, all of which is "
            "made anew"
        ) from None


def check_lengths(name: str, length: int, *arrays: np.ndarray) -> None:
    """Raises ValueError unless all arrays have that length, as `name` says."""
    for array in arrays:
        if len(array) != length:
            raise ValueError(f"{len(array)} values where {name} has {length}")


class ArrayWriter:
    """Appends to flat array files of one directory, so that memory stays small.

    A ragged array GROUP_PART has its offsets, one more than items, in GROUP_offsets.
    """

    def __init__(self, directory: Path, dtypes: Mapping[str, str]):
        self._dtypes, self._stack = dtypes, contextlib.ExitStack()
        opened = lambda name: self._stack.enter_context((directory / name).open("wb"))
        self._files: dict[str, BinaryIO] = {name: opened(name) for name in dtypes}
        self._ends = {
            name.removesuffix("_offsets"): 0 for name in dtypes if name.endswith("_offsets")
        }
        for group in self._ends:
            self.add(f"{group}_offsets", [0])

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def add(self, name: str, values: Any) -> None:
        """Appends numbers, or the bytes of an array as they are."""
        if not isinstance(values, bytes):
            values = np.asarray(values, self._dtypes[name]).tobytes()
        self._files[name].write(values)

    def add_item(self, group: str, **parts: Any) -> None:
        """Appends one item to each ragged array GROUP_PART; the parts are equally long."""
        for part, values in parts.items():
            self.add(f"{group}_{part}", values)
        self._ends[group] += len(values)
        self.add(f"{group}_offsets", [self._ends[group]])

    def append(
        self, other: Path, names: Iterable[str], moved: Mapping[str, int] | None = None
    ) -> None:
        """Appends another directory's arrays, with `moved[name]` added to each of its values."""
        for name in names:
            values = map_array(other / name, self._dtypes[name])
            if name.endswith("_offsets"):
                group = name.removesuffix("_offsets")
                values = values[1:] + self._ends[group]
                self._ends[group] = int(values[-1]) if len(values) else self._ends[group]
            elif moved and name in moved:
                values = values + moved[name]
            self.add(name, values)


class Ragged(Sequence):
    """Items of a flat array, cut out when asked for: flat[offsets[i] : offsets[i + 1]]."""

    def __init__(self, flat: np.ndarray, offsets: np.ndarray):
        self._flat, self._offsets = flat, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, item: int) -> np.ndarray:
        return self._flat[span(self._offsets, item)]


def locate(starts: Sequence[int], row: int) -> tuple[int, int]:
    """Which of several parts a row lies in, and its row there.

    `starts` are the parts' first rows and the end. Raises IndexError for a row of none.
    """
    if not 0 <= row < starts[-1]:
        raise IndexError(row)
    part = bisect.bisect_right(starts, row) - 1
    return part, row - starts[part]


class Chosen(Sequence):
    """Some rows of something longer, cut out when asked for."""

    def __init__(self, get: Callable[[int], Any], chosen: np.ndarray):
        self._get, self._chosen = get, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, item: int) -> Any:
        return self._get(int(self._chosen[item]))


class IdIndex:
    """Rows by the hash of their id, and in the order of ids: memory-mapped arrays STEM_hashes,
    STEM_by_hash and STEM_by_id."""

    def __init__(self, directory: Path, stem: str):
        self._hashes = map_array(directory / f"{stem}_hashes", "<u8")
        self._rows = map_array(directory / f"{stem}_by_hash", "<i8")
        self.order = map_array(directory / f"{stem}_by_id", "<i8")
        check_lengths(f"{stem}_hashes", len(self._hashes), self._rows, self.order)

    @staticmethod
    def write(directory: Path, stem: str, ids: Iterable[str]) -> list[str]:
        """Of ids in the order of rows; returns the names of the files."""
        ids = np.fromiter(ids, np.dtypes.StringDType())
        hashes = np.fromiter(map(hash_of, ids), np.uint64, len(ids))
        by_hash = np.argsort(hashes, kind="stable")
        write_array(directory / f"{stem}_hashes", hashes[by_hash], "<u8")
        write_array(directory / f"{stem}_by_hash", by_hash, "<i8")
        write_array(directory / f"{stem}_by_id", id_order(ids), "<i8")
        return [f"{stem}_hashes", f"{stem}_by_hash", f"{stem}_by_id"]

    def find(self, id: str, id_at: Callable[[int], str]) -> int:
        """The row of an id; `id_at` reads a row's. Raises KeyError if no row has it."""
        wanted = np.uint64(hash_of(id))
        first = np.searchsorted(self._hashes, wanted, "left")
        last = np.searchsorted(self._hashes, wanted, "right")
        for row in self._rows[first:last].tolist():  # nearly always one or none
            if id_at(row) == id:
                return row
        raise KeyError(id)


def id_order(ids: Iterable[str]) -> np.ndarray:
    """int64 [N]: the rows of ids in the order of their code points; of equal ones, of rows."""
    return np.argsort(np.fromiter(ids, np.dtypes.StringDType()), kind="stable")


def hash_of(id: str) -> int:
    """64 bits that depend on the id alone."""
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "little")


def share_of(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: the same for every seed and host."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def span(offsets: np.ndarray, item: int) -> slice:
    """Where an item of a ragged array lies in its flat array."""
    return slice(int(offsets[item]), int(offsets[item + 1]))


def _sync(directory: Path, files: bool = True) -> None:
    """Forces a directory's entries, and on request its files, to disk."""
    for path in (*(directory.iterdir() if files else ()), directory):
        if path.is_file() or path == directory:
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
