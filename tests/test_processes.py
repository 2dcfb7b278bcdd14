"""Real processes over loopback that join, compare, wait and lose each other; no devices' work."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from cosup_jax.errors import UserError
from cosup_jax.runtime import liveness, processes

ROOT = Path(__file__).parent.parent
LOST_S = 2
WORKER = """
import os, signal, sys, time
from cosup_jax import main
from cosup_jax.runtime import liveness, processes
from cosup_jax.errors import LostProcess, UserError

me, given = int(os.environ["JAX_PROCESS_ID"]), os.environ

def work():
    processes.join(os.environ)
    print("joined", flush=True)
{body}
    processes.finish()
    print("finished", flush=True)

main.parse_flags = lambda argv: work() or {{"--help": ""}}
main._run_and_exit()
"""


def test_the_code_compared_is_the_whole_package(tmp_path, monkeypatch):
    """Bug: processes of different code that agree, as only the files beside this one count."""
    (tmp_path / "runtime").mkdir()
    monkeypatch.setattr(processes, "__file__", str(tmp_path / "runtime/processes.py"))
    found = set()
    for text in ("one", "another"):
        (tmp_path / "step.py").write_text(text)
        found.add(processes.code_digest())
    assert len(found) == 2


@pytest.mark.parametrize("told", [{"JAX_NUM_PROCESSES": "2"}, {"JAX_PROCESS_ID": "1"}])
def test_one_of_several_without_an_address_is_refused(told):
    """Bug: every process of a pod trains alone, as nobody gave the coordinator."""
    with pytest.raises(UserError, match="needs the address of process 0: --coordinator"):
        processes._where(told)
    assert processes._where({"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None


@pytest.mark.parametrize("address", ["localhost", "localhost:", "localhost:http"])
def test_an_address_without_a_port_is_told(address):
    """Bug: "list index out of range", or minutes of waiting."""
    told = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    with pytest.raises(UserError, match=f" {address}: no HOST:PORT"):
        processes._where(told)


def test_who_is_silent_and_has_not_left(monkeypatch):
    """Bugs: a process that is done taken for dead; one that is heard of late; one never named."""
    now, counts = [0.0], {0: "7", 1: liveness._LEFT, 2: "3"}
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch, seen = object.__new__(liveness._Watch), {}
    watch.lost_s, watch._counts = 5, lambda: counts
    assert watch._silent(seen) == []
    now[0], counts[0] = 4.0, "8"
    assert watch._silent(seen) == []
    now[0] = 6.0
    assert watch._silent(seen) == [2]


def test_the_last_beat_of_a_lost_process_is_no_sign_of_life(monkeypatch):
    """Bug: a process that died just after it had beaten counts as living, and its peer ends in a
    collective's traceback."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    watch = object.__new__(liveness._Watch)

    def waited(last_beat_s):
        now[0], watch._awaited, watch.lost_s, watch.beat_s = 0.0, False, 2, 0.5
        beats = lambda until_s: str(int(min(now[0], until_s) / watch.beat_s))
        watch._counts = lambda: {0: beats(99), 1: beats(last_beat_s)}
        watch.await_news()
        return now[0]

    assert waited(99) < 3  # all live: no reason to wait
    assert waited(0.5) >= 16 and waited(0) >= 16


def test_a_last_beat_does_not_take_the_place_of_a_leave():
    """Bug: process 0 waits for one that has left, as its thread still had a beat under way."""
    watch, kept = object.__new__(liveness._Watch), {}
    write = lambda key, value, **_: kept.__setitem__(key, value)
    watch._me, watch._leaving = 1, threading.Event()
    watch._client = types.SimpleNamespace(key_value_set=write)

    def under_way():
        watch._leaving.wait(5)
        time.sleep(0.2)
        write(f"{liveness._ALIVE}1", "7")

    watch._heart = threading.Thread(target=under_way)
    watch._heart.start()
    watch.leave(0)
    watch._heart.join()
    assert kept == {f"{liveness._ALIVE}1": liveness._LEFT}


def test_many_processes_are_named_in_a_line():
    """Bug: a message of four thousand numbers."""
    found = [liveness.names(range(count)) for count in (1, 2, 8, 10)]
    eight = "processes 0, 1, 2, 3, 4, 5, 6, 7"
    assert found == ["process 0", "processes 0, 1", eight, f"{eight} and 2 more"]


@pytest.fixture
def run():
    """Runs one script in several processes; returns [(code, stdout, stderr)] and the seconds."""
    started = []

    def start(count, body, environ=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        shared = {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address}
        shared |= {"JAX_COORDINATOR_BIND_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
        shared |= {"COSUP_JOIN_SECONDS": "60", "COSUP_LOST_SECONDS": str(LOST_S)}
        body = "\n".join(f"    {line}" for line in body.strip().splitlines())
        begin = time.monotonic()
        for process in range(count):
            own = shared | {"JAX_PROCESS_ID": str(process)} | (environ or (lambda _: {}))(process)
            started.append(
                subprocess.Popen(
                    [sys.executable, "-c", WORKER.format(body=body)],
                    cwd=ROOT,
                    env=os.environ | own,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        outputs = [process.communicate(timeout=180) for process in started]
        codes = [process.returncode for process in started]
        return [(c, *o) for c, o in zip(codes, outputs, strict=True)], time.monotonic() - begin

    yield start
    for process in started:
        process.kill()
        process.wait()


def errors(text):
    """The lines that are ours; a lost coordinator leaves JAX's own before it."""
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_equal_processes_meet_and_a_different_one_is_named_by_all(run):
    """Bugs: a process with another config, package or count that hangs the rest; a sentence that
    only one of them prints; a slow process that finds process 0 gone, and has JAX's warnings beside
    the sentence; a barrier or broadcast that cannot be used twice."""
    done, seconds = run(
        3,
        """
for _ in range(2):
    processes.barrier("twice", 30)
    assert processes.broadcast("word", "yes" if me == 0 else None) == "yes"
processes.agree("the start", {"config.seed": 0, "numpy": "2.0"})
print("agreed", flush=True)
try:
    processes.agree("the start", {"config.seed": 1 if me == 2 else 0, "numpy": "2.0"})
finally:
    time.sleep(me / 2)
""",
    )
    host = re.escape(socket.gethostname())
    for code, out, err in done:
        assert code == 2 and out.split() == ["joined", "agreed"], err
        assert re.fullmatch(
            rf"error: process 2 on {host} differs in the start: config.seed is 1 there and 0 in "
            rf"process 0 on {host}; [^\n]+\n",
            err,
        )
    assert seconds < 30


def test_one_that_dies_on_the_way_out_takes_nobody_s_sentence(run):
    """Bug: the others wait for it in JAX's shutdown, and end with a code by which they are started
    again."""
    done, seconds = run(
        3,
        """
if me == 1:
    liveness.part = liveness.leave = lambda: os.kill(os.getpid(), signal.SIGKILL)
processes.agree("the start", {"config.seed": me})
""",
    )
    assert [code for code, _, _ in done] == [2, -signal.SIGKILL, 2]
    for _, _, err in (done[0], done[2]):
        assert len(errors(err)) == 1 and "process 1 on" in err, err
    assert seconds < 30


def test_another_process_count_is_named(run):
    """Bug: a process started for another number of processes joins, and its mesh is another."""
    count = lambda process: {"JAX_NUM_PROCESSES": "3"} if process == 1 else {}
    done, _ = run(
        2, "processes.agree('the start', processes.facts('train', '/w', {'seed': 0}))", count
    )
    for code, _, err in done:
        assert code == 2 and "process 1 on " in err, err
        assert "number of processes is 3 there and 2 in process 0" in err


@pytest.mark.parametrize("dies", [1, 0])
def test_a_killed_process_ends_the_others(run, dies):
    """Bugs: survivors that wait for ever, or end in a C++ abort with no sentence and no code that
    a launcher can act on; process 0, where all meet, dying in another way than the rest."""
    done, _ = run(
        3,
        f"""
processes.barrier("all here", 30)
if me == {dies}:
    print(time.time(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(40)
""",
    )
    seconds = time.time() - float(done[dies][1].split()[-1])
    for process, (code, _, err) in enumerate(done):
        if process == dies:
            assert code == -signal.SIGKILL
            continue
        assert code == 75, err
        assert len(errors(err)) == 1 and f"process {dies}" in errors(err)[0]
        assert "goes on from its checkpoint" in errors(err)[0]
    assert seconds < LOST_S + 20


def test_a_failing_process_tells_the_others_why(run):
    """Bug: one process finds the disk full and says so, the others only that it is gone."""
    done, _ = run(
        2,
        """
if me == 1:
    raise UserError("the disk is full")
time.sleep(40)
""",
    )
    assert [code for code, _, _ in done] == [2, 2]
    assert errors(done[1][2]) == ["error: the disk is full"]
    assert len(errors(done[0][2])) == 1 and "process 1 on " in done[0][2]
    assert "stopped: the disk is full" in done[0][2]


def test_who_does_not_come_is_named_and_a_slow_finish_is_waited_for(run):
    """Bugs: a barrier that says it failed but not by whose fault; processes that are done early
    taken for dead by the one that still writes its report; an end that waits for who has left."""
    done, seconds = run(
        2,
        f"""
try:
    processes.barrier("tokenizer", 1) if me == 0 else None
except LostProcess as error:
    print(error, flush=True)
time.sleep({2 * LOST_S} if me == 0 else 0)
""",
    )
    (code_0, out_0, err_0), (code_1, out_1, err_1) = done
    assert (code_0, code_1) == (0, 0), err_0 + err_1
    assert "process 1 did not come to 'tokenizer' within 1 s" in out_0
    assert "finished" in out_0 and "finished" in out_1
    assert seconds < 30  # as long as process 0 would stay for one that does not leave


@pytest.mark.parametrize("lost", [True, False])
def test_an_error_of_the_runtime_waits_for_its_cause(run, lost):
    """Bugs: a collective's traceback in place of the name of the process that died; minutes of
    waiting for a name where everybody lives and the fault is our own."""
    done, _ = run(
        2,
        f"""
processes.barrier("all here", 30)
print(time.time(), flush=True)
if me == 1 and {lost}:
    os.kill(os.getpid(), signal.SIGKILL)
if me == 0:
    time.sleep({lost:d})  # as the peer's death comes first
    raise ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
time.sleep(40)
""",
    )
    code, _, err = done[0]
    seconds = time.time() - min(float(out.split()[-1]) for _, out, _ in done)
    assert code == (75 if lost else 1), err
    assert ("Traceback" in err) != lost and ("process 1 gave no sign of life" in err) == lost
    assert seconds < 3 * LOST_S + 20
