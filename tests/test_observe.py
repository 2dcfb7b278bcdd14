"""What one sees of a run from outside: traces, stacks, memory, goodput."""

import json
import os
import signal
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from cosup_jax.config import LogConfig
from cosup_jax.runtime.observe import HangWatch, Profile, device_memory
from cosup_jax.runtime.telemetry import Recorder, Throughput


def _steps(profile, number):
    for step in range(1, number + 1):
        profile.before(step)
        profile.after(step, jnp.ones(3) * step)
        yield step


def _traces(directory):
    return sorted(directory.glob("profile/plugins/profile/*/*.xplane.pb"))


def test_a_trace_of_the_steps_asked_for_and_one_by_signal(tmp_path, monkeypatch):
    """Bugs: a trace that starts a step late or never ends, so that it fills the disk; a signal that
    kills the run it should look into; a second trace that raises."""
    spans, traced = [], {"start": jax.profiler.start_trace, "stop": jax.profiler.stop_trace}
    step_now = [0]
    for name in traced:
        noted = lambda *a, name=name: (spans.append((name, step_now[0])), traced[name](*a))
        monkeypatch.setattr(jax.profiler, f"{name}_trace", noted)
    profile = Profile(LogConfig(profile_from=2, profile_steps=2), tmp_path)
    for step in _steps(profile, 8):
        step_now[0] = step  # of the step that has ended
        if step == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
    assert spans == [("start", 1), ("stop", 2), ("start", 5), ("stop", 6)]
    profile.close()
    assert spans[4:] == [] and len(_traces(tmp_path)) >= 1
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_run_that_ends_within_its_trace_keeps_it(tmp_path):
    """Bug: the trace of the last steps is lost, and the next run cannot start one."""
    profile = Profile(LogConfig(profile_from=2, profile_steps=50), tmp_path)
    list(_steps(profile, 3))
    profile.close()
    assert _traces(tmp_path)


def test_a_hang_shows_every_stack_and_a_slow_run_does_not(tmp_path, capfd):
    """Bugs: a hung collective that leaves nobody a trace of where; false alarms between steps."""
    watch = HangWatch(1.5, tmp_path)
    for _ in range(20):
        time.sleep(0.1)
        watch.step()
    assert not list(tmp_path.iterdir())

    def stuck_in_a_collective():
        time.sleep(2.5)

    stuck_in_a_collective()
    watch.close()
    text = (tmp_path / "hang.0.txt").read_text()
    assert "stuck_in_a_collective" in text and "no step has completed for " in text
    assert "stuck_in_a_collective" in capfd.readouterr().err
    HangWatch(0, tmp_path).close()


def test_memory_of_the_fullest_device(monkeypatch):
    """Bugs: the mean hides the one device that is full; a backend without figures that crashes."""
    assert device_memory() == {}  # a CPU keeps none
    stats = [
        {"peak_bytes_in_use": 2**30, "bytes_limit": 2**32},
        None,
        {"peak_bytes_in_use": 3 * 2**30, "bytes_limit": 2**32},
    ]
    devices = [SimpleNamespace(memory_stats=lambda found=found: found) for found in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert device_memory() == {"perf/memory_peak_gib": 3.0, "perf/memory_peak_share": 0.75}


def test_goodput_counts_over_restarts_what_was_kept(tmp_path, monkeypatch):
    """Bugs: steps done twice after a kill counted as work; the time the run was down forgotten; a
    share above one."""
    now = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: now[0])

    def live(steps, start_step, until):
        """From `start_step`, a step of 2 s each, a line a step; 4 s of starting before."""
        recorder = Recorder(tmp_path, start_step)
        now[0] += 4.0
        clock = Throughput(1000.0, recorder.busy_s)
        for step in range((start_step or 0) + 1, until + 1):
            now[0] += 2.0
            clock.queued(jnp.zeros(()).block_until_ready(), 1, 1)
            recorder.record(step, clock.lap())
        recorder.close()

    live(3, None, 3)  # 4 + 6 s
    now[0] += 10.0  # down
    live(2, 1, 3)  # steps 2 and 3 again: 4 + 4 s
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["perf/busy_s"] for row in rows] == [2.0, 4.0, 6.0]
    assert rows[0]["perf/goodput"] == pytest.approx(2 / 6)
    assert rows[-1]["perf/goodput"] == pytest.approx(6 / 28)
    assert "perf/goodput" not in Throughput().lap()
