"""Directories in a bucket (gs://), through TensorStore: whole objects, and a lease for one run.

file:///DIR is a bucket as well: a directory used as if it had neither locks nor appending.
"""

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorstore as ts

from cosup_jax.errors import UserError
from cosup_jax.runtime.paths import inside

SCHEMES = ("gs", "file")
REACH_S = 10.0  # for an answer to what must not wait; the rest is tried for a quarter of an hour
_QUICK = {"gcs_request_retries": {"max_retries": 3, "initial_delay": "500ms", "max_delay": "2s"}}
LEASE_S = 60.0  # a lease that was not renewed for so long is nobody's
_URL = re.compile(rf"(?:{'|'.join(SCHEMES)})://[^,@]*?(?=::|@|,|$)")


def is_url(path: str | Path) -> bool:
    """Whether this names a bucket rather than a local path."""
    return "://" in str(path)


class Bucket:
    """The objects below one URL, by their names relative to it."""

    def __init__(self, url: str):
        """Raises UserError for another scheme, or, within REACH_S, where there is no way in."""
        scheme, _, rest = url.partition("://")
        if scheme not in SCHEMES or not rest.strip("/"):
            known = " or ".join(f"{name}://..." for name in SCHEMES)
            raise UserError(f"{url}: give a local path, or {known}")
        self.url = f"{scheme}://{os.path.abspath(rest) if scheme == 'file' else rest.strip('/')}"
        opened = lambda **how: ts.KvStore.open(f"{self.url}/", **how).result()
        self._store = self._done(opened)
        self._quick = opened(context=ts.Context(_QUICK))
        self.look(Lease.NAME)

    def read(self, name: str) -> bytes | None:
        """The object's bytes, or None if there is none."""
        found = self._done(lambda: self._store.read(name).result())
        return found.value if found.state == "value" else None

    def write(self, name: str, data: bytes | None) -> None:
        """Writes an object, whole or not at all; None deletes it."""
        self._done(lambda: self._store.write(name, data).result())

    def names(self, prefix: str = "") -> list[str]:
        """Names that begin with `prefix`, sorted."""
        between = ts.KvStore.KeyRange(prefix.encode(), prefix.encode() + b"\xff")
        keys = self._done(lambda: self._store.list(between).result())
        return sorted(key.decode() for key in keys)

    def download(self, name: str, directory: Path) -> None:
        """Writes the object to `directory / name`, whole or not at all."""
        path = inside(directory, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            temporary.write_bytes(self.read(name) or b"")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def replace(self, name: str, data: bytes | None, generation: bytes) -> bytes:
        """Writes (None: deletes) the object if it still has this generation; returns the new one,
        empty where it has not."""
        return self._done(
            lambda: self._quick.write(name, data, if_equal=generation).result(REACH_S).generation
        )

    def look(self, name: str) -> tuple[bytes, bytes]:
        """The object's bytes, empty if there is none, and its generation, which then stands for
        its absence."""
        found = self._done(lambda: self._quick.read(name).result(REACH_S))
        return found.value, found.stamp.generation

    def _done(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (ValueError, OSError, RuntimeError) as error:
            first = (str(error).strip() or "no answer").splitlines()[0][:200]
            raise UserError(
                f"{self.url} cannot be used ({first}); check the network, its name and your "
                "permissions (gcloud auth application-default login)"
            ) from error


class Lease:
    """The object `.lease`, which its holder renews: who holds it has the directory for itself.

    No clocks are compared: a lease is free if it is not renewed while we watch it for LEASE_S.
    Every change is conditional on the generation that was seen, so that of two takers one wins.
    """

    NAME = ".lease"

    def __init__(self, bucket: Bucket, say: Callable[[str], None], seconds: float = LEASE_S):
        """Raises UserError if another run holds it."""
        self._bucket, self._seconds, self._over = bucket, seconds, threading.Event()
        self._lost, self._count, self._id = False, 0, secrets.token_hex(8)
        self.heir = ""  # who has taken it from us, as soon as that is seen
        self._generation = self._take(say)
        self._renewed_s = time.monotonic()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether another may hold it: one has taken it, or we have not renewed it in time."""
        return self._lost or time.monotonic() - self._renewed_s > self._seconds

    def _take(self, say: Callable[[str], None]) -> bytes:
        value, generation = self._bucket.look(self.NAME)
        if value:
            holder = json.loads(value)["holder"]
            say(f"{self._bucket.url} was held by {holder}: looking for {self._seconds:.0f} s")
            end = time.monotonic() + self._seconds
            while time.monotonic() < end:
                time.sleep(self._seconds / 12)
                value, now = self._bucket.look(self.NAME)
                if not value:  # given back meanwhile
                    generation = now
                    break
                if now != generation:
                    raise self._in_use(holder)
        taken = self._bucket.replace(self.NAME, self._value(), generation)
        if not taken:
            raise self._in_use("a run that was faster")
        return taken

    def _in_use(self, holder: str) -> UserError:
        return UserError(
            f"workdir {self._bucket.url} is in use by another run, {holder}; wait for it, stop it, "
            "or give another --workdir"
        )

    def _value(self) -> bytes:
        self._count += 1  # the same bytes would be the same generation to some stores
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        told = {"holder": holder, "id": self._id, "renewed": self._count}
        return json.dumps(told).encode()

    def _renew(self) -> None:
        while not self._over.wait(self._seconds / 4):
            asked_s = time.monotonic()
            try:
                renewed = self._bucket.replace(self.NAME, self._value(), self._generation)
                if renewed:
                    self._generation, self._renewed_s = renewed, asked_s
                    continue
                value, self._generation = self._bucket.look(self.NAME)
            except UserError:  # the network; others may take it once it has lapsed
                continue
            told = json.loads(value or b"{}")
            if told.get("id") != self._id:  # else the answer to an earlier renewal was lost
                self._lost, self.heir = True, told.get("holder", "")
                return

    def close(self) -> None:
        """Gives it back; out of reach, it lapses."""
        self._over.set()
        self._thread.join()
        if not self._lost:
            with contextlib.suppress(UserError):
                self._bucket.replace(self.NAME, None, self._generation)


def localise(source: str, cache: Path) -> str:
    """A data source with what it names in buckets downloaded, once, and named by the local path.

    A file brings along those whose names differ only behind the first dot, as x.passages.jsonl
    beside x.jsonl; what ends in no file name is a directory with all in it; `*` stands for some.

    Raises UserError if there is nothing of that name.
    """
    return _URL.sub(lambda found: str(_download(found[0], cache)), source)


def _download(url: str, cache: Path) -> Path:
    parent, _, name = url.rstrip("/").rpartition("/")
    bucket, local = Bucket(parent), cache / re.sub(r"[^\w.-]+", "_", parent)
    stem = name.partition("*")[0]
    stem = f"{stem.partition('.')[0]}." if "." in stem and "*" not in name else stem
    wanted = bucket.names(stem) if stem != name or "*" in name else bucket.names(f"{name}/")
    if not wanted:
        raise UserError(f"{url} does not exist; check the name of the bucket and the path in it")
    for item in wanted:
        if not (local / item).is_file():
            bucket.download(item, local)
    return local / name
