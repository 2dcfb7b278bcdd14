"""The directory of one run: locked while a run lives, every file in it written whole or not at all.

In a run of several processes only process 0 locks and writes; all of them may call.
"""

import contextlib
import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from cosup_jax.errors import UserError

# What the place is at fault for, and not we.
_REFUSED = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR),
}
STATES = ("running", "stopped", "finished", "failed")


class Workdir:
    """Created and locked on construction; the operating system frees the lock on death."""

    def __init__(self, path: str | Path):
        """Raises UserError if the directory cannot be written or another run holds it."""
        if "://" in str(path):
            raise UserError(
                f"--workdir={path} must be a directory; mount the storage and name that"
            )
        self.path = Path(path).expanduser().absolute()
        self._lock = None
        if jax.process_index() != 0:
            return
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
        # A forked data worker that outlives us must not keep our lock.
        os.register_at_fork(after_in_child=self.close)

    def write_json(self, name: str, value: Any) -> None:
        """Writes `value` as indented JSON. Raises UserError if the disk is full or read-only."""
        self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes `name`, a path below the workdir. Raises UserError as `write_json` does."""
        if jax.process_index() != 0:
            return
        try:
            write_atomic(self.path / name, text)
        except OSError as error:
            raise _unwritable(self.path / name, error) from error

    def status(self, state: str, step: int) -> None:
        """Writes status.json: running | stopped | finished | failed, and the steps taken."""
        if state not in STATES:
            raise ValueError(f"state {state!r} is none of {STATES}")
        self.write_json("status.json", {"state": state, "step": int(step)})

    def read_status(self) -> Mapping[str, Any] | None:
        """What `status` wrote last, or None. Raises UserError if the file is no status."""
        path = self.path / "status.json"
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); delete it") from error
        if not isinstance(found, dict) or {"state", "step"} - set(found):
            raise UserError(f"{path} holds no state and step; delete it")
        return found

    def close(self) -> None:
        """Frees the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


def write_atomic(path: Path, text: str) -> None:
    """Writes a file that is, after a crash at any instruction, the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
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
        if error.errno not in _REFUSED:
            raise
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path}: {error.strerror}; check the path, its permissions and the free space"
    )
