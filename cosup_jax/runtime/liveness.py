"""Whether the other processes of a run live: whoever dies ends the rest, with a sentence that says
which it was, in a time that does not depend on what they were waiting for.

News go through the key-value store of JAX's coordinator, which is process 0. Every function does
nothing in a run of one process.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

import jax

from cosup_jax.errors import LostProcess, UserError

_ALIVE, _LOST, _LEFT = "cosup/alive/", "cosup/lost", "left"
_COORDINATOR_GONE = "process 0, where the others meet, died or cannot be reached"
_printed = threading.Lock()
_watch: "_Watch | None" = None


def start(lost_s: float) -> None:
    """From here on the processes look after each other.

    Args:
      lost_s: a process that gave no sign of life for so long, seconds, is gone.
    """
    global _watch
    _watch = _Watch(lost_s)


def await_news(error: BaseException) -> None:
    """Ends this process if a lost one is to blame for `error`; else returns.

    What the runtime raises when its peer is gone names nobody: we wait until the silence has lasted
    long enough, or a process has said why it stopped, or all of them have shown that they live.
    """
    if _watch is not None and not _watch.over and _is_of_the_runtime(error):
        _watch.await_news()


def tell(reason: str, code: int) -> None:
    """Ends the other processes, which then say that this one stopped, and why; for the way out."""
    if _watch is not None:
        _watch.tell(reason, code)


def part() -> None:
    """From here on nobody is missed: all processes know that the run is over, and call this."""
    if _watch is not None:
        _watch.part()


def leave() -> None:
    """As `part`, and waits in process 0, where the others meet, until they have left too."""
    if _watch is not None:
        _watch.part()
        _watch.leave(30)


def joined() -> Any:
    """What this process knows of the run: `client`, the key-value store of the coordinator,
    `process_id` and `num_processes`. Unlike jax.process_index() it asks no device."""
    # JAX has no public door to the store; Orbax uses this one too.
    from jax._src import distributed

    return distributed.global_state


def milliseconds(seconds: float) -> int:
    """As the key-value store wants them."""
    return int(seconds * 1000)


def names(processes: Iterable[int]) -> str:
    """As "process 3" or "processes 1, 2"; of many the first eight."""
    numbers = list(processes)
    shown = ", ".join(map(str, numbers[:8]))
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"process{'es' if len(numbers) > 1 else ''} {shown}{more}"


class _Watch:
    """Two threads: one shows that this process lives, and in process 0 looks after the others; one
    waits for bad news and then ends the process."""

    def __init__(self, lost_s: float):
        self.lost_s, self.beat_s, self.over = lost_s, max(lost_s / 6, 0.5), False
        self._client, self._me = joined().client, joined().process_id
        self._awaited = False
        self._leaving = threading.Event()
        self._abort_handler = _catch_abort()  # kept alive
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    def await_news(self) -> None:
        if self._awaited:
            return  # a caller above asks again
        self._awaited = True
        end = time.monotonic() + 3 * self.lost_s + 10  # the silence, and slow machines
        time.sleep(2 * self.beat_s)  # what the lost one sent last has arrived by then
        before = self._counts()
        while time.monotonic() < end:
            time.sleep(2 * self.beat_s)
            now = self._counts()
            if before and now and all(now[process] != count for process, count in before.items()):
                return

    def _counts(self) -> dict[int, str]:
        """How often each process has shown that it lives; empty if that cannot be known."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            found = self._client.key_value_dir_get(_ALIVE)
            return {int(path.rsplit("/", 1)[1]): count for path, count in found}
        return {}

    def tell(self, reason: str, code: int) -> None:
        if self.over:
            if not self._leaving.is_set():  # the last word is said
                self.leave(10)
                time.sleep(0.5 if self._me == 0 else 0)  # what has left is still to end
            return
        self.over = True
        text = f"process {self._me} on {socket.gethostname()} stopped: {reason or 'interrupted'}"
        self._publish(text, code)
        self.leave(3)

    def part(self) -> None:
        self.over = True
        if self._me == 0:
            self._publish("", 0)
        # Python's exit would tear down a thread that waits in C++, and the process with it.
        self._listener.join(30)

    def _publish(self, text: str, code: int) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first, or 0 is gone
            self._client.key_value_set(_LOST, json.dumps([text, code]))

    def leave(self, seconds: float) -> None:
        self._leaving.set()
        self._heart.join(5)  # or a last beat would take the place of what follows
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{_ALIVE}{self._me}", _LEFT, allow_overwrite=True)
            end = time.monotonic() + seconds
            while self._me == 0 and time.monotonic() < end:  # the store dies with process 0
                states = list(self._counts().values())
                if states.count(_LEFT) == joined().num_processes:
                    return
                time.sleep(0.1)

    def _beat(self) -> None:
        seen: dict[int, tuple[str, float]] = {}
        mine = f"{_ALIVE}{self._me}"
        for count in range(sys.maxsize):
            try:
                self._client.key_value_set(mine, str(count), allow_overwrite=True)
                if self._me == 0 and (silent := self._silent(seen)):
                    text = f"{names(silent)} gave no sign of life for {self.lost_s:.0f} s"
                    self._publish(text, LostProcess.code)
            except jax.errors.JaxRuntimeError:
                return  # the listener knows
            if self._leaving.wait(self.beat_s):
                return

    def _silent(self, seen: dict[int, tuple[str, float]]) -> list[int]:
        """Processes whose count has not moved for too long; `seen` keeps when it last did."""
        now = time.monotonic()
        for process, count in self._counts().items():
            if process not in seen or seen[process][0] != count:
                seen[process] = count, now
        late = lambda count, since: count != _LEFT and now - since > self.lost_s
        return sorted(process for process, state in seen.items() if late(*state))

    def _listen(self) -> None:
        while not self.over:
            try:
                news = self._client.blocking_key_value_get(_LOST, milliseconds(600))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" in str(error):
                    continue
                if not self.over:
                    _print_last(_COORDINATOR_GONE, LostProcess.code)
                    os._exit(LostProcess.code)
                return
            text, code = json.loads(news)
            if text and not self.over:
                _print_last(text, code)
                self.leave(3)
                os._exit(code)
            return


def _is_of_the_runtime(error: BaseException | None) -> bool:
    if error is None:
        return False
    collective = any(name in str(error) for name in ("Gloo", "NCCL", "UNAVAILABLE"))
    own = isinstance(error, UserError | LostProcess | KeyboardInterrupt)
    runtime = collective or (isinstance(error, jax.errors.JaxRuntimeError) and not own)
    return runtime or _is_of_the_runtime(error.__cause__)


def _catch_abort() -> Any:
    """Has JAX's abort, which follows at once on the death of process 0, end in our line too.

    The handler is set in C: Python would run one of its own only after the abort. Returns what must
    be kept alive.
    """

    def last_word(number: int) -> None:
        if _watch is not None and _watch.over:
            time.sleep(10)  # the main thread is about to leave with its own code
        _print_last(_COORDINATOR_GONE, LostProcess.code)
        os._exit(LostProcess.code)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(last_word)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(int(signal.SIGABRT), ctypes.cast(handler, ctypes.c_void_p))
    return handler


def _print_last(text: str, code: int) -> None:
    """Past all buffers, for nothing runs after it; of two threads the first."""
    if not _printed.acquire(blocking=False):
        time.sleep(60)  # the first ends the process
    more = (
        "; started again, the run goes on from its checkpoint" if code == LostProcess.code else ""
    )
    os.write(2, f"error: {' '.join(text.split())}{more}\n".encode())
