"""Looking into a run while it lives: profiles on demand, stacks of one that hangs, device memory.

`log.profile_from` and `log.profile_steps` name the steps of a trace; SIGUSR1 starts one at the next
step, in the process that gets it. Traces lie in WORKDIR/profile, for xprof or TensorBoard.
"""

import contextlib
import faulthandler
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax

from cosup_jax.config import LogConfig


class Profile:
    """Traces steps into DIRECTORY/profile."""

    def __init__(self, log: LogConfig, directory: Path):
        self._path, self._steps = str(directory / "profile"), log.profile_steps
        self._from, self._until = log.profile_from, 0
        self._asked = False
        self._before = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGUSR1, self._ask)

    def _ask(self, number, frame):
        self._asked = True

    def before(self, step: int) -> None:
        """Called with the number of the step that comes, counted from 1."""
        if not self._until and (self._asked or step == self._from):
            self._asked, self._until = False, step + self._steps - 1
            jax.profiler.start_trace(self._path)

    def after(self, step: int, outputs: Any) -> None:
        """Called once the step is queued; `outputs` are waited for where the trace ends."""
        if self._until and step >= self._until:
            jax.block_until_ready(outputs)
            self._stop()

    def close(self) -> None:
        """Ends a trace that the run did not outlast."""
        if self._until:
            self._stop()
        if self._before is not None:
            signal.signal(signal.SIGUSR1, self._before)

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._until = 0
        print(f"trace of the steps asked for: {self._path}", file=sys.stderr, flush=True)


class HangWatch:
    """Dumps the stacks of all threads when no step has completed for a while, to stderr and to
    DIRECTORY/hang.<process>.txt, and again after every such while. It ends nothing."""

    def __init__(self, seconds: float, directory: Path):
        """Args: seconds without a step, 0 = never; the workdir."""
        self._seconds, self._file = seconds, None
        if not seconds:
            return
        self._path = directory / f"hang.{jax.process_index()}.txt"
        self._moved_s, self._over = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._look, name="hang watch", daemon=True)
        self._thread.start()

    def step(self) -> None:
        """A step has completed."""
        self._moved_s = time.monotonic()

    def close(self) -> None:
        """Looks no longer."""
        if self._seconds:
            self._over.set()
            self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(min(self._seconds / 4, 10)):
            still_s = time.monotonic() - self._moved_s
            if still_s >= self._seconds:
                self._dump(still_s)
                self._moved_s = time.monotonic()

    def _dump(self, still_s: float) -> None:
        line = f"no step has completed for {still_s:.0f} s; stacks of all threads ({self._path}):"
        with contextlib.suppress(OSError), open(self._path, "a", encoding="utf-8") as file:
            print(time.strftime("%Y-%m-%d %H:%M:%S"), line, file=file, flush=True)
            faulthandler.dump_traceback(file)
        print(line, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr without a file
            faulthandler.dump_traceback(sys.stderr)


def device_memory() -> dict[str, float]:
    """`perf/` metrics of the fullest device of this process; none where the backend keeps none."""
    devices = [device.memory_stats() for device in jax.local_devices()]
    known = [stats for stats in devices if stats and "peak_bytes_in_use" in stats]
    if not known:
        return {}
    fullest = max(known, key=lambda stats: stats["peak_bytes_in_use"])
    found = {"perf/memory_peak_gib": fullest["peak_bytes_in_use"] / 2**30}
    if limit := fullest.get("bytes_limit", 0):
        found["perf/memory_peak_share"] = fullest["peak_bytes_in_use"] / limit
    return found
