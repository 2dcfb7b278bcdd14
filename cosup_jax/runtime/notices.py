"""Being told to stop: by SIGTERM, by SIGHUP where it is not ignored (nohup), by Ctrl-C."""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from cosup_jax.errors import stopped_code
from cosup_jax.runtime import processes

ABANDONED_CODE = 130  # as shells report a process that Ctrl-C ended
_PATIENCE_S = 5.0  # for what a process without a loop is in, which leaves nothing half-written
_STOPPING = "stopping: finishing steps under way, then saving (Ctrl-C again stops without saving)"
_interruptible: "Notices | None" = None


class Interrupted(Exception):
    """Work was left at a safepoint; the resumed run does it anew."""


def safepoint() -> None:
    """Stands between the device calls of long work, such as evaluations, that changes no state.

    Raises Interrupted where the run is to stop and has called for it by `Notices.interruptible`;
    in several processes in all at the same call, so that all must make the same calls.
    """
    if _interruptible is not None and _interruptible.to_stop():
        raise Interrupted


class Stopped(KeyboardInterrupt):
    """Work was told to stop, by signal `number`; `said`: and what it keeps has been said."""

    def __init__(self, number: int, said: bool):
        super().__init__(signal.Signals(number).name)
        self.number, self.said = number, said


class Notices:
    """A signal, however often, asks the run to stop: by an exception, and within the loop, where it
    saves first, by `to_stop`. There a second Ctrl-C ends the process at once.

    Work without a loop says at once what it keeps (`kept`), raises Stopped, also where the first
    exception was lost, and is ended after a few seconds, whatever it waits for.

    Python's handlers wait for the call into C that runs, as for a step. What must not wait is done
    by a thread, which the signal itself wakes.

    Work without a loop may do work with one, whose notices it has as long as that lasts.
    """

    def __init__(self, kept: str = ""):
        """`kept`: what a notice makes work without a loop say; such work never calls the rest."""
        self._kept, self._asked = kept, 0  # by which signal
        self._said = self._agreed = False
        self._calls = 0  # of to_stop
        self._abandon: Callable[[], str] | None = None  # set within the loop
        self._ends = os.pipe()
        os.set_blocking(self._ends[1], False)
        self._wakeup_before = signal.set_wakeup_fd(self._ends[1], warn_on_full_buffer=False)
        self._on_int = signal.getsignal(signal.SIGINT)
        self._polite = [signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            self._polite.append(signal.SIGHUP)
        self._outer = {number: signal.getsignal(number) for number in self._polite}
        self._handle(self._polite, self._ask)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def __enter__(self) -> "Notices":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.leave_loop()
        self._abandon = None
        signal.signal(signal.SIGINT, self._on_int)
        signal.set_wakeup_fd(self._wakeup_before)
        if not self._asked:
            for number, handler in self._outer.items():
                if isinstance(getattr(handler, "__self__", None), Notices):
                    signal.signal(number, handler)
        os.write(self._ends[1], b"\0")
        self._thread.join()
        for end in self._ends:
            os.close(end)
        if self._kept and self._asked and error is None:
            raise Stopped(self._asked, said=True)

    def enter_loop(self, abandon: Callable[[], str]) -> None:
        """From here on nothing is raised; `abandon` says in a line what is left without saving."""
        self._abandon = abandon
        signal.signal(signal.SIGINT, self._ask)
        if self._asked:  # the exception was lost, as in a callback of JAX's garbage collector
            self._say()
            processes.announce_preemption()

    def leave_loop(self) -> None:
        """The loop is over; what was asked for may still be saving, and can be abandoned."""
        if self._asked:
            self._handle(self._polite, signal.SIG_IGN)
        else:
            self._abandon = None
            signal.signal(signal.SIGINT, self._on_int)

    def to_stop(self) -> bool:
        """Whether to stop now; several processes all do at the same call, a little later."""
        if jax.process_count() == 1:
            return bool(self._asked)
        self._calls += 1  # JAX answers True once, at the call agreed on
        self._agreed |= multihost_utils.reached_preemption_sync_point(self._calls)
        return self._agreed

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within, `safepoint` asks `to_stop`."""
        global _interruptible
        _interruptible = self
        try:
            yield
        finally:
            _interruptible = None

    def _ask(self, number, frame) -> None:
        self._asked = number
        if self._abandon is None:
            self._handle(self._polite, signal.SIG_IGN)  # Python's exit would restore the default
            raise Stopped(number, said=bool(self._kept))
        processes.announce_preemption()

    def _listen(self) -> None:
        while number := ord(os.read(self._ends[0], 1)):
            if self._kept and number in self._polite:
                return self._end(number)
            if self._abandon is None or number not in (signal.SIGINT, *self._polite):
                continue
            if not self._said:
                self._say()
            elif number == signal.SIGINT:
                try:
                    _print(self._abandon())
                finally:
                    os._exit(ABANDONED_CODE)

    def _end(self, number: int) -> None:
        """Says what is kept; ends the process if it does not itself, as C keeps it waiting."""
        _print(self._kept)
        end = time.monotonic() + _PATIENCE_S
        while select.select([self._ends[0]], [], [], max(end - time.monotonic(), 0))[0]:
            if os.read(self._ends[0], 1) == b"\0":
                return
        os._exit(stopped_code(128 + number))  # as shells report it

    def _say(self) -> None:
        self._said = True
        _print(_STOPPING)

    @staticmethod
    def _handle(numbers, handler) -> None:
        for number in numbers:
            signal.signal(number, handler)


def _print(text: str) -> None:
    """Past all buffers, below what a terminal shows of Ctrl-C and of a bar."""
    start = "\n" if sys.stderr.isatty() else ""
    os.write(2, f"{start}{text}\n".encode())
