"""Metrics: metrics.jsonl, TensorBoard, progress on the screen, speed.

Metrics stay on the device until the next record, so that the host never waits for a running step.
"""

import collections
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, TypeVar

import jax
import numpy as np
import tqdm
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import scalar

from cosup_jax.errors import UserError
from cosup_jax.runtime.workdir import write_atomic

T = TypeVar("T")
Record = dict[str, float | None]


class Recorder:
    """Writes one JSON line a logged step and the same values as TensorBoard scalars.

    NaN and infinities have no JSON form: they become null there and stay themselves in TensorBoard.
    All processes may call; process 0 writes.
    """

    def __init__(self, directory: str | Path, start_step: int | None = None):
        """Opens the files, cut back to where the run resumes.

        Args:
          directory: the workdir.
          start_step: step of the restored checkpoint; later lines go, and so does a line that a
            crash left half-written. None for a fresh start: all lines go.
        """
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._file = None
        self.busy_s = 0.0  # `perf/busy_s` of the last line that is kept
        if jax.process_index() != 0:
            return
        self._path = path = Path(directory) / "metrics.jsonl"
        start_step = -1 if start_step is None else start_step
        with self._writing():
            if path.exists():
                kept = _lines_up_to(path, start_step)
                write_atomic(path, "".join(kept))
                busy_s = [json.loads(line).get("perf/busy_s") or 0.0 for line in kept]
                self.busy_s = max(busy_s, default=0.0)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115, closed by close()
            board = Path(directory) / "tensorboard"
            board.mkdir(exist_ok=True)
            # Not tensorboardX's SummaryWriter: its thread dies where the disk is full, and the
            # next value waits for it for ever.
            self._board = EventsWriter(str(board / "events"))
            self._draw(start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def record(self, step: int, metrics: Mapping[str, jax.Array | float]) -> Record | None:
        """Takes the metrics of a step; writes and returns the step before it, if that was pending.

        A second call with the same step adds to its line. Raises UserError if the disk is full.
        """
        if self._file is None:
            return None
        for value in metrics.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        if self._pending and self._pending[0] == step:
            self._pending[1].update(metrics)
            return None
        written = self._write_pending()
        self._pending = (step, dict(metrics))
        return written

    def amend(self, step: int, metrics: Mapping[str, jax.Array | float]) -> None:
        """Adds to the line of `step`, the last one on disk, which is replaced as a whole."""
        if self._file is None:
            return
        values, finite = _floats(metrics)
        with self._writing():
            before, last = _lines_up_to(self._path, step - 1), {"step": step}
            for line in _lines_up_to(self._path, step)[len(before) :]:
                last |= json.loads(line)
            self._file.close()
            write_atomic(self._path, "".join(before) + json.dumps(last | finite) + "\n")
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
            self._plot(step, values)

    def flush(self) -> Record | None:
        """Writes and returns what is pending, and makes all of it durable."""
        if self._file is None:
            return None
        written = self._write_pending()
        with self._writing():
            os.fsync(self._file.fileno())
            self._board.flush()
        return written

    def close(self) -> Record | None:
        """`flush`, then closes the files."""
        if self._file is None:
            return None
        written = self.flush()
        with self._writing():
            self._file.close()
            self._board.close()
        self._file = None
        return written

    def _write_pending(self) -> Record | None:
        if self._pending is None:
            return None
        step, metrics = self._pending
        self._pending = None
        values, finite = _floats(metrics)
        with self._writing():
            self._plot(step, values)
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()
        return {"step": step, **finite}

    def _plot(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [scalar(name, value).value[0] for name, value in values.items()]
        self._draw(step, summary=Summary(value=scalars))

    def _draw(self, step: int, **what: Any) -> None:
        self._board.write_event(Event(wall_time=time.time(), step=step, **what))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {self._path} or tensorboard/ beside it: {error.strerror}; check "
                "their permissions and the free space"
            ) from error


class Progress:
    """A bar in a terminal; elsewhere a plain line now and then. Process 0 alone shows it."""

    def __init__(
        self, num_steps: int, step: int = 0, stream: TextIO | None = None, every_s: float = 0.0
    ):
        """Args: steps in all; steps already taken; where to; seconds between plain lines."""
        self._stream = stream or sys.stderr
        self._num_steps, self._every_s, self._shown_s = num_steps, every_s, -math.inf
        self._quiet = jax.process_index() != 0
        self._bar = None
        if not self._quiet and self._stream.isatty():
            self._bar = tqdm.tqdm(
                total=num_steps, initial=step, unit="step", file=self._stream, dynamic_ncols=True
            )

    def advance(self, step: int) -> None:
        """Moves the bar to `step` steps taken."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def show(self, step: int, text: str) -> None:
        """Shows `text`, such as the losses of `step`; of plain lines the last is never left out."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            return
        now = time.monotonic()
        if not self._quiet and (now - self._shown_s >= self._every_s or step >= self._num_steps):
            print(f"step {step}/{self._num_steps}  {text}", file=self._stream, flush=True)
            self._shown_s = now

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


class Throughput:
    """Speed between the moments when steps were seen to be done, never when they were queued."""

    def __init__(self, started_s: float | None = None, busy_s: float = 0.0):
        """Args: when the run first started, Unix time; seconds in steps until the restored one."""
        self._started_s, self._busy_s = started_s, busy_s
        self._running: collections.deque[tuple[jax.Array, int, int]] = collections.deque()
        self.restart()

    def restart(self) -> None:
        """Forgets what was counted: after compiling, an evaluation, a pause. Nothing runs then."""
        self._running.clear()
        self._steps = self._tokens = self._examples = 0
        self._waited_s = self._seen_waited_s = 0.0
        self._start_s = self._seen_s = time.perf_counter()

    def queued(self, output: jax.Array, tokens: int, examples: int) -> None:
        """Takes a step just dispatched; it counts once `output`, any of its results, is there."""
        self._running.append((output, tokens, examples))

    def look(self) -> None:
        """Counts the steps that are done, without waiting; best right after a wait for one."""
        while self._running and self._running[0][0].is_ready():
            _, tokens, examples = self._running.popleft()
            self._steps += 1
            self._tokens += tokens
            self._examples += examples
            self._seen_s, self._seen_waited_s = time.perf_counter(), self._waited_s

    def waits_for(self, stream: Iterable[T]) -> Iterator[T]:
        """The stream's items; the time until each comes counts as waiting for data."""
        items = iter(stream)
        while True:
            start_s = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            self._waited_s += time.perf_counter() - start_s
            yield item

    def lap(self) -> dict[str, float]:
        """`perf/` metrics of the steps done since the last lap; empty, and none begins, without."""
        self.look()
        steps, tokens, examples = self._steps, self._tokens, self._examples
        if not steps:
            return {}
        seconds, waited_s = self._seen_s - self._start_s, self._seen_waited_s
        self._steps = self._tokens = self._examples = 0
        self._start_s = self._seen_s
        self._waited_s -= waited_s
        self._busy_s += seconds
        run = {}
        if self._started_s is not None:  # what was done twice, or lost, counts once
            share = self._busy_s / max(time.time() - self._started_s, self._busy_s)
            run = {"perf/busy_s": self._busy_s, "perf/goodput": share}
        return run | {
            "perf/tokens_per_s": tokens / seconds,
            "perf/examples_per_s": examples / seconds,
            "perf/step_s": seconds / steps,
            "perf/data_wait_share": waited_s / seconds,
        }


def _floats(metrics: Mapping[str, jax.Array | float]) -> tuple[dict[str, float], Record]:
    """As numbers, and as JSON has them."""
    values = {name: float(np.asarray(value)) for name, value in metrics.items()}
    return values, {name: v if math.isfinite(v) else None for name, v in values.items()}


def lines(path: Path) -> list[Record]:
    """What metrics.jsonl says of each step; nothing where there is none."""
    return [json.loads(line) for line in _lines_up_to(path, math.inf)] if path.is_file() else []


def _lines_up_to(path: Path, last_step: float) -> list[str]:
    kept = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                if line.endswith("\n") and json.loads(line)["step"] <= last_step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # cut off by a crash
    return kept
