"""The directory of one run: locked while a run lives, every file in it written whole or not at all.

In a run of several processes only process 0 locks and writes; all of them may call.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath

from cosup_jax.errors import REFUSED, LostProcess, UserError
from cosup_jax.runtime import processes
from cosup_jax.runtime.bucket import Bucket, Lease, is_url
from cosup_jax.runtime.paths import expanded

APPEARS_S = 20  # within which a network file system shows what another host has written
STATES = ("running", "stopped", "finished", "failed")

_PULLED = ("tokenizer/", "evaluation/", "answers/")  # with files at the top; the rest is large
_KEPT_HERE = ("data", "checkpoints")
_LOCATION = ".bucket"  # in a mirror: the URL it stands for


class Workdir:
    """Created and locked on construction; the operating system frees the lock on death.

    `path` is always a local directory. For a workdir in a bucket it mirrors it: files are written
    there, where they can be appended to and mapped, and `publish` copies them into the bucket;
    checkpoints go there directly, tokens stay here.
    """

    def __init__(self, path: str | Path, begun: bool = False):
        """`begun`: only one that is there already, for what needs a checkpoint.

        Raises UserError if the directory cannot be written or another run holds it.
        """
        self._lock = self._bucket = self._lease = None
        self._known: dict[str, tuple[int, ...]] = {}  # stamps of what is not ours to publish
        if is_url(path):
            self._bucket = Bucket(str(path))
            path = mirror(self._bucket.url)
        self.path = expanded(path).absolute()
        self.url = self._bucket.url if self._bucket else str(self.path)
        if jax.process_index() == 0:
            self._take(begun)
        self._share()

    def _take(self, begun: bool) -> None:
        if self.path.is_file():
            raise UserError(f"--workdir={self.path} is a file; give a directory")
        if begun and not self._bucket and not self.path.is_dir():
            raise UserError(
                f"{self.path} holds no checkpoint; train first, or give another --workdir"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 32, 0).decode().strip() or "unknown"
            self.close()
            raise UserError(
                f"workdir {self.path} is in use by another run, process {holder}; wait for it, "
                "stop it, or give another --workdir"
            ) from None
        except OSError as error:
            self.close()
            raise _unwritable(self.path, error) from error
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        for places in (
            "",
            "tokenizer/**/",
            "evaluation/**/",
            "answers*/**/",
            "measured/",
            "mined/",
            "prepared/**/",
            "index/**/",
            "retriever/**/",
        ):  # left by killed runs
            for left in self.path.glob(f"{places}.*.part"):
                if left.is_file():
                    left.unlink()
        # A forked data worker that outlives us must not keep our lock.
        os.register_at_fork(after_in_child=self._unlock)
        if self._bucket:
            try:
                self._lease = Lease(self._bucket, lambda text: print(text, file=sys.stderr))
            except UserError:
                self._unlock()
                raise

    def _share(self) -> None:
        """Every process sees what process 0 has: the same directory, or a mirror of the bucket.

        Raises UserError, naming a process that does not.
        """
        token = processes.broadcast("workdir", secrets.token_hex(8), processes.BARRIER_SECONDS)
        if self._bucket:
            further = self._pull()
            processes.barrier("workdir is mirrored")  # before process 0 changes anything
            stamps = self._stamps(*self._shown()).items()
            self._known = {name: stamp for name, stamp in stamps if name not in further}
        elif jax.process_count() > 1:
            note = self.path / f".seen.{token}"
            if jax.process_index() == 0:
                note.touch()
            processes.barrier("workdir is there")
            seen = _appears(note)
            try:
                told = "seen" if seen else f"not seen in {self.path}, which all must share"
                shown = {"process 0's note in the workdir": told}
                processes.agree("its workdir", shown)
            finally:
                note.unlink(missing_ok=True)

    def _pull(self) -> set[str]:
        """Mirrors the bucket; returns the answers that a killed run has left further on here."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path / _LOCATION, self.url)
        mirrored = lambda name: "/" not in name or name.startswith(_PULLED)
        there = {name for name in self._bucket.names() if mirrored(name)} - {Lease.NAME}
        further = {name for name in there if self._is_further(name)}
        for name in sorted(there - further):
            self._bucket.download(name, self.path)
        for name in filter(mirrored, self._stamps(*self._shown()).keys() - there):
            # Answers of a killed run are not there yet; each says what it was answered by.
            if "/" not in name or not name.endswith(".jsonl"):
                (self.path / name).unlink(missing_ok=True)
        return further

    def _is_further(self, name: str) -> bool:
        """Whether these answers go on behind what the bucket has of them."""
        path = self.path / name
        if "/" not in name or path.suffix != ".jsonl" or not path.is_file():
            return False
        here, there = path.read_bytes(), self._bucket.read(name) or b""
        return len(here) > len(there) and here.startswith(there)

    def _shown(self) -> list[str]:
        """What is at the top of the mirror and may be published."""
        names = (path.name for path in self.path.iterdir())
        return [name for name in names if name not in _KEPT_HERE and not name.startswith(".")]

    def _stamps(self, *names: str) -> dict[str, tuple[int, ...]]:
        """Files of these names, and below directories of these: what changes when they do."""
        found = {}
        for path in (self.path / name for name in names):
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                # Other processes may be writing into the mirror, or deleting the same as we.
                with contextlib.suppress(FileNotFoundError):
                    about = file.stat()
                    if stat.S_ISREG(about.st_mode) and not file.match(".*.part"):
                        stamp = (about.st_ino, about.st_size, about.st_mtime_ns)
                        found[str(file.relative_to(self.path))] = stamp
        return found

    def publish(self, *names: str) -> None:
        """Copies files or directories of the workdir into the bucket, if it lies in one: what this
        run has written, and what is not there.

        Raises UserError if that fails, or another run has taken the workdir over; LostProcess if
        one may have.
        """
        if self._bucket is None or jax.process_index() != 0:
            return
        with self._leased():
            folders = (name for name in names if (self.path / name).is_dir())
            there = {found for name in folders for found in self._bucket.names(f"{name}/")}
            for name, stamp in self._stamps(*names).items():
                if name not in there or self._known.get(name) != stamp:
                    self._bucket.write(name, (self.path / name).read_bytes())
                    self._known[name] = stamp

    def withdraw(self, name: str) -> None:
        """Deletes the directory from the bucket, if there is one, so that no file of it stays
        beside those of the next `publish`. Raises as that does."""
        if self._bucket is None or jax.process_index() != 0:
            return
        with self._leased():
            for found in self._bucket.names(f"{name}/"):
                self._bucket.write(found, None)

    @contextlib.contextmanager
    def _leased(self) -> Iterator[None]:
        """Raises where the lease is lost, or was while something failed."""
        self._check_lease()
        try:
            yield
        except UserError:
            self._check_lease()
            raise

    def _check_lease(self) -> None:
        if self._lease.heir:
            raise UserError(f"{self.url} was taken over by another run, {self._lease.heir}")
        if self._lease.lost:
            raise LostProcess(f"{self.url} was out of reach; started again, the run goes on")

    def fetch(self, name: str) -> None:
        """Copies what the bucket has under `name` here; for what is not mirrored at the start."""
        if self._bucket:
            found = self._bucket.names(name)
            for each in found:
                self._bucket.download(each, self.path)
            self._known |= self._stamps(*found)

    def write_json(self, name: str, value: Any) -> None:
        """Writes `value` as indented JSON. Raises UserError if the disk is full or read-only."""
        self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        """What `write_json` wrote. Raises UserError for other text, FileNotFoundError for none."""
        path = self.path / name
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); delete it") from error

    def write_text(self, name: str, text: str) -> None:
        """Writes `name`, a path below the workdir. Raises UserError as `write_json` does."""
        if jax.process_index() != 0:
            return
        try:
            write_atomic(self.path / name, text)
        except OSError as error:
            raise _unwritable(self.path / name, error) from error
        self.publish(name)

    def status(self, state: str, step: int) -> None:
        """Writes status.json: running | stopped | finished | failed, and the steps taken."""
        if state not in STATES:
            raise ValueError(f"state {state!r} is none of {STATES}")
        self.write_json("status.json", {"state": state, "step": int(step)})

    def read_status(self) -> Mapping[str, Any] | None:
        """What `status` wrote last, or None. Raises UserError if the file is no status."""
        try:
            found = self.read_json("status.json")
        except FileNotFoundError:
            return None
        if not isinstance(found, dict) or {"state", "step"} - set(found):
            raise UserError(f"{self.path / 'status.json'} holds no state and step; delete it")
        return found

    def close(self) -> None:
        """Publishes what this run has written, and frees the lock."""
        if self._lease:
            try:
                if not self._lease.lost:
                    stamps = self._stamps(*self._shown()).items()
                    written = {name for name, stamp in stamps if self._known.get(name) != stamp}
                    # With what a killed run has left beside it, and this one may have used.
                    self.publish(*sorted({name.partition("/")[0] for name in written}))
            finally:
                self._lease.close()
                self._lease = None
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


def mirror(url: str) -> Path:
    """The local directory for a workdir in a bucket: below COSUP_CACHE (~/.cache/cosup_jax)."""
    below = os.environ.get("COSUP_CACHE") or "~/.cache/cosup_jax"
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    return Path(below).expanduser() / f"{url.rstrip('/').rsplit('/', 1)[1]}-{digest}"


def checkpoints(directory: Path) -> epath.Path:
    """Where the checkpoints of the workdir `directory` lie: in it, or in the bucket it mirrors."""
    location = Path(directory) / _LOCATION
    base = location.read_text() if location.is_file() else str(directory)
    return epath.Path(base.removeprefix("file://")) / "checkpoints"


def _appears(path: Path) -> bool:
    """Whether the file is seen, on a network file system perhaps a little later."""
    end = time.monotonic() + APPEARS_S
    while not path.exists():
        if time.monotonic() > end:
            return False
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # some clients remember what was not there
        time.sleep(0.2)
    return True


def write_atomic(path: Path, text: str) -> None:
    """Writes a file that is, after a crash at any instruction, the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(
        prefix=f".{path.name}.", suffix=".part", dir=path.parent
    )
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises UserError where the disk is full, or the place refuses what is written there."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path}: {error.strerror}; check the path, its permissions and the free space"
    )
