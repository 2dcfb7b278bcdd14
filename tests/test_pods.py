"""A run of several processes is the run of one: its losses, its checkpoint, its end and its resume.

Real processes over loopback, two CPU devices each.
"""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import towns
from test_train import compile_once  # noqa: F401, a fixture

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
STEPS, SAVED = 6, 3
LOST_S = 5


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Six steps of a batch that divides over eight devices, saved after three, when questions are
    answered too."""
    every = {"checkpoint__every_steps": SAVED, "eval__every_steps": STEPS}
    every |= {"eval__answers": 8, "eval__answers_every_steps": SAVED, "generate__max_tokens": 16}
    directory = tmp_path_factory.mktemp("pods")
    return towns.write_config(directory, num_steps=STEPS, mesh__fsdp=2, **every)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def start(cache):
    """Starts the processes of a run; ends what a failed test leaves."""
    started = []

    def run(config, workdir, count, configs=None, lost_s=60):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        environ = towns.environ(cache, devices=2)
        environ |= {"COSUP_LOST_SECONDS": str(lost_s), "JAX_COORDINATOR_BIND_ADDRESS": address}
        joining = [f"--coordinator={address}", f"--num_processes={count}"] if count > 1 else []
        for process in range(count):
            flags = [f"--config={(configs or [config] * count)[process]}", f"--workdir={workdir}"]
            flags += [*joining, f"--process_id={process}"] if count > 1 else []
            command = [sys.executable, "-m", "cosup_jax.main", *flags]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen(command, cwd=ROOT, env=environ, **pipes))
        return started[-count:]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def _finish(processes, timeout=400):
    """Waits; returns all that was said on stderr."""
    said = [process.communicate(timeout=timeout)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(said), "\n".join(said)
    return said


@pytest.fixture(scope="module")
def alone(config, cache, tmp_path_factory):
    """The run of one process on two devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    environ = towns.environ(cache, devices=2)
    command = [sys.executable, "-m", "cosup_jax.main", f"--config={config}"]
    subprocess.run([*command, f"--workdir={workdir}"], cwd=ROOT, env=environ, check=True)
    return workdir


@pytest.fixture(scope="module")
def together(config, tmp_path_factory):
    """Workdirs of finished runs by their number of processes."""
    return {}, tmp_path_factory.mktemp("together")


def _run_of(count, config, start, together):
    done, directory = together
    if count not in done:
        done[count] = directory / str(count)
        _finish(start(config, done[count], count))
    return done[count]


def _widest(found, wanted):
    """The largest relative difference of two runs' metrics, line by line."""
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    widest = 0.0
    for a, b in zip(found, wanted, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            widest = max(widest, abs(a[key] - b[key]) / max(abs(b[key]), 0.1))
    return widest


def _answers(workdir):
    """What was written at the end, and of which passages."""
    rows = map(json.loads, (workdir / "evaluation/answers.jsonl").read_text().splitlines())
    return [(row["id"], row["raw"], [s["id"] for s in row["retrieved"]]) for row in rows]


@pytest.mark.parametrize("count", [2, 4])
def test_the_losses_of_one_process(count, config, alone, start, together):
    """Bugs: a host that reads the other's rows or another order of them, a loss per host, a second
    checkpoint, a metric line per process; hosts that answer other questions than each other, or
    wait at another [Ret], and hang."""
    workdir = _run_of(count, config, start, together)
    widest = _widest(towns.metrics(workdir), towns.metrics(alone))
    print(f"{count} processes x 2 devices: metrics within {widest:.1e} of one process x 2 devices")
    assert widest < 1e-4
    scored = [row["step"] for row in towns.metrics(workdir) if "eval/towns.dev/answers_f1" in row]
    assert scored == [SAVED, STEPS] and _answers(workdir) == _answers(alone)
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["3", "6"]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_one_checkpoint_is_restored_on_any_number(count, config, alone, start, together, tmp_path):
    """Bugs: a shard that only its own process can read; a position in the data that depends on the
    number of hosts."""
    workdir = tmp_path / "run"
    shutil.copytree(_run_of(2, config, start, together), workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    (workdir / "status.json").write_text(json.dumps({"state": "stopped", "step": SAVED}))
    _finish(start(config, workdir, count))
    widest = _widest(towns.metrics(workdir), towns.metrics(alone))
    print(f"saved by 2 processes, restored by {count}: metrics within {widest:.1e}")
    assert widest < 1e-4


@pytest.mark.parametrize("dies", [0, 1])
def test_a_killed_worker_ends_the_run_and_it_resumes_exactly(
    dies, config, start, together, tmp_path
):
    """Bugs: survivors that hang in a collective; a relaunch that skips or repeats a step."""
    whole, workdir = _run_of(2, config, start, together), tmp_path / "run"
    processes = start(config, workdir, 2, lost_s=LOST_S)
    metrics = workdir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        time.sleep(0.01)
        assert processes[0].poll() is None, processes[0].communicate()[1]
    processes[dies].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    _, said = processes[1 - dies].communicate(timeout=120)
    seconds = time.monotonic() - begin
    print(f"process {dies} killed: the other ended after {seconds:.1f} s with {said[-200:]!r}")
    assert processes[1 - dies].returncode == 75, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"process {dies}" in errors[0]
    assert "Traceback" not in said
    assert seconds < 3 * LOST_S + 30
    _finish(start(config, workdir, 2))
    assert towns.metrics(workdir) == towns.metrics(whole)


def test_processes_that_differ_are_refused_in_time(config, start, tmp_path):
    """Bug: another seed on one host trains another model, or hangs until somebody looks."""
    other = tmp_path / "tiny.py"
    text = config.read_text()
    other.write_text(text.replace("'num_steps'", "'seed': 1, 'num_steps'", 1))
    begin = time.monotonic()
    both = start(config, tmp_path / "run", 2, configs=[config, other])
    said = [process.communicate(timeout=100)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2]
    assert all("config.seed is 1 there and 0 in process 0" in text for text in said), said
    assert time.monotonic() - begin < 90
