"""metrics.jsonl and the progress lines."""

import io
import json
import resource
import time

import jax
import jax.numpy as jnp
import pytest
from tensorboardX.proto import event_pb2

from cosup_jax.errors import UserError
from cosup_jax.runtime import telemetry
from cosup_jax.runtime.telemetry import Progress, Recorder, Throughput


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_a_torn_last_line_is_not_read(tmp_path):
    """Bug: half a line, left by a full disk, ends an evaluation after all its answers."""
    path = tmp_path / "metrics.jsonl"
    assert telemetry.lines(path) == []
    path.write_text('{"step": 1}\n{"step": 2, "loss')
    assert telemetry.lines(path) == [{"step": 1}]


def test_written_one_record_late(tmp_path):
    """Bug: the host blocks on the step that still runs, or the last record never arrives."""
    recorder = Recorder(tmp_path)
    assert recorder.record(1, {"loss/total": jnp.float32(0.5)}) is None
    assert lines(tmp_path) == []
    assert recorder.record(2, {"loss/total": 0.25}) == {"step": 1, "loss/total": 0.5}
    assert lines(tmp_path) == [{"step": 1, "loss/total": 0.5}]
    assert recorder.close() == {"step": 2, "loss/total": 0.25}
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_same_step_shares_a_line(tmp_path):
    """Bug: training and evaluation of one step become two lines with the same step."""
    recorder = Recorder(tmp_path)
    recorder.record(4, {"loss/total": 1.0})
    recorder.record(4, {"eval/known/recall_at_1": 0.5})
    recorder.close()
    assert lines(tmp_path) == [{"step": 4, "loss/total": 1.0, "eval/known/recall_at_1": 0.5}]


def test_resume_cuts_back_to_the_restored_step(tmp_path):
    """Bug: after a kill a step is there twice, or half a line breaks every reader."""
    whole = '{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}\n{"step": 3, "a": 3.0}\n'
    path = tmp_path / "metrics.jsonl"
    path.write_text(whole + '{"step": 4, "a')
    Recorder(tmp_path, start_step=2).close()
    assert path.read_text() == '{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}\n'
    path.write_text(whole + '{"step": 2}')
    Recorder(tmp_path, start_step=9).close()
    assert path.read_text() == whole
    Recorder(tmp_path).close()
    assert path.read_text() == ""


def test_a_resumed_run_completes_the_line_that_a_stop_cut_short(tmp_path):
    """Bugs: a second line for the step; the line, or those behind it, lost; done again by a run
    that was killed before it saved."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 0.5}\n{"step": 2, "a": null}\n')
    for _ in range(2):
        recorder = Recorder(tmp_path, start_step=2)
        recorder.amend(2, {"eval/known/recall_at_1": jnp.float32(0.25)})
        recorder.record(3, {"a": 1.5})
        recorder.close()
        assert lines(tmp_path) == [
            {"step": 1, "a": 0.5},
            {"step": 2, "a": None, "eval/known/recall_at_1": 0.25},
            {"step": 3, "a": 1.5},
        ]


def test_not_a_number_is_null(tmp_path):
    """Bug: a diverged run writes NaN, which is no JSON."""
    recorder = Recorder(tmp_path)
    recorder.record(1, {"a": jnp.nan, "b": jnp.float32(jnp.inf), "c": 1})
    recorder.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "a": None, "b": None, "c": 1}


def test_tensorboard_forgets_the_steps_of_the_lost_run(tmp_path):
    """Bug: TensorBoard draws the steps after the restored checkpoint twice."""
    recorder = Recorder(tmp_path, start_step=1)
    for step in (2, 3):
        recorder.record(step, {"loss/total": float(step)})
    recorder.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    events = list(_events(file.read_bytes()))
    purge = [event.step for event in events if event.session_log.status == 1]
    scalars = [(event.step, value.tag) for event in events for value in event.summary.value]
    assert purge == [2]
    assert scalars == [(2, "loss/total"), (3, "loss/total")]


def _events(data: bytes):
    while data:
        length = int.from_bytes(data[:8], "little")
        yield event_pb2.Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_a_full_disk_ends_in_a_line(tmp_path):
    """Bugs: a thread of TensorBoard's that dies of a full disk, after which the run waits for it
    for ever; its traceback."""
    room, everything = resource.getrlimit(resource.RLIMIT_FSIZE)[0], {"a": 1.0, "b": 2.0}
    recorder = Recorder(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, resource.RLIM_INFINITY))
    try:
        with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl or tensorboard/"):
            for step in range(1_000):
                recorder.record(step, everything)
                recorder.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    assert [line["step"] for line in lines(tmp_path)][:2] == [0, 1]


def test_other_processes_stay_silent(tmp_path, monkeypatch):
    """Bug: every process of a pod writes the same files."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    recorder, stream = Recorder(tmp_path), io.StringIO()
    assert recorder.record(1, {"a": 1.0}) is recorder.flush() is recorder.close() is None
    Progress(3, stream=stream).show(1, "loss 1")
    assert list(tmp_path.iterdir()) == [] and stream.getvalue() == ""


def test_log_gets_plain_lines_now_and_then():
    """Bug: a bar's control characters fill a log file, or its last line is left out."""
    stream = io.StringIO()
    progress = Progress(3, stream=stream, every_s=1000.0)
    for step in (1, 2, 3):
        progress.advance(step)
        progress.show(step, f"loss {step}.0")
    progress.close()
    assert stream.getvalue() == "step 1/3  loss 1.0\nstep 3/3  loss 3.0\n"


def test_terminal_gets_a_bar_that_starts_where_the_run_resumes():
    """Bug: a resumed run's bar starts at 0 and its time left is wrong."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = Progress(10, step=4, stream=stream)
    progress.advance(5)
    progress.show(5, "loss 1.0")
    progress.close()
    assert "4/10" in stream.getvalue() and "5/10" in stream.getvalue()
    assert "loss 1.0" in stream.getvalue()


class Output:
    """Of a step on a device."""

    done = False

    def is_ready(self):
        return self.done


@pytest.fixture
def now(monkeypatch):
    """The clock's time in seconds, in a list."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_speed_is_that_of_steps_done(now):
    """Bugs: a step that was only queued counts, so that the first lap after a pause is too fast;
    speed averaged over compilation and pauses; a lap without a step."""
    clock, outputs = Throughput(), [Output() for _ in range(4)]
    now[0] = 100.0
    clock.restart()
    for output, tokens in zip(outputs, (30, 10, 50, 60), strict=True):
        clock.queued(output, tokens, 2)
    now[0] = 100.1
    assert clock.lap() == {}
    now[0], outputs[0].done, outputs[1].done = 104.0, True, True
    clock.look()
    now[0] = 104.5
    expected = {"perf/tokens_per_s": 10.0, "perf/examples_per_s": 1.0, "perf/step_s": 2.0}
    assert clock.lap() == expected | {"perf/data_wait_share": 0.0}
    assert clock.lap() == {}
    now[0], outputs[2].done = 105.0, True
    assert clock.lap()["perf/tokens_per_s"] == 50.0
    clock.restart()
    outputs[3].done = True
    assert clock.lap() == {}


def test_waiting_for_data_is_told_from_working(now):
    """Bug: the step's own time counted as waiting, or the wait of an earlier lap."""
    clock, output = Throughput(), Output()
    output.done = True

    def slow():
        for item in range(2):
            now[0] += 1.0  # until the item is there
            yield item

    for _ in clock.waits_for(slow()):
        now[0] += 3.0  # the step
        clock.queued(output, 1, 1)
        clock.look()
    assert clock.lap()["perf/data_wait_share"] == 0.25
    clock.queued(output, 1, 1)
    now[0] += 1.0
    assert clock.lap()["perf/data_wait_share"] == 0.0
