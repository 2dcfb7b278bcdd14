"""The launch scripts, with a stand-in for the trainer and for gcloud."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"
TRAINER = """\
#!{python}
import json, os, pathlib, signal, sys, time
assert sys.argv[1:3] == ["-m", "cosup_jax.main"], sys.argv
number = os.environ.get("JAX_PROCESS_ID", "0")
here = pathlib.Path(__file__).parent
{body}
"""


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def local(tmp_path):
    """Starts local_processes.sh around a stand-in whose body is given."""
    started = []

    def start(body, *argv):
        port = "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0))"
        trainer = TRAINER.format(python=sys.executable, body=body)
        # The script asks its interpreter for a free port first.
        trainer = trainer.replace(
            "assert",
            f"if sys.argv[1] == '-c':\n    {port}\n    print(s.getsockname()[1])\n"
            "    sys.exit()\nassert",
            1,
        )
        python = executable(tmp_path / "python", trainer)
        process = subprocess.Popen(
            ["bash", LAUNCH / "local_processes.sh", *argv],
            env=os.environ | {"PYTHON": str(python), "GRACE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def alive(folder):
    """Process ids that the stand-ins wrote and that still run."""
    found = []
    for path in folder.glob("pid*"):
        try:
            os.kill(int(path.read_text()), 0)
        except ProcessLookupError:
            continue
        found.append(path.name)
    return found


NOTE_PID = "(here / f'pid{number}').write_text(str(os.getpid()))\n"


def test_local_environment_and_prefixes(local):
    """Catches processes that share an id, disagree on the port, or lose an argument's spaces."""
    body = (
        "print(os.environ['JAX_COORDINATOR_ADDRESS'], os.environ['JAX_NUM_PROCESSES'],"
        " os.environ['JAX_NUM_CPU_DEVICES'], sys.argv[3:])\n"
        "print('warned', file=sys.stderr)"
    )
    process = local(body, "3", "2", "--", "--workdir=a b", "--config=c")
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0
    lines = sorted(out.splitlines())
    assert [line[:4] for line in lines] == ["[0] ", "[1] ", "[2] "]
    assert len({line[4:] for line in lines}) == 1
    assert lines[0].endswith("3 2 ['--workdir=a b', '--config=c']")
    assert sorted(err.splitlines()) == ["[0] warned", "[1] warned", "[2] warned"]


def test_local_failure_ends_all(local, tmp_path):
    """Catches the survivors waiting for ever in a collective, and a failure reported as 0."""
    body = NOTE_PID + "time.sleep(0.5)\nsys.exit(7) if number == '1' else time.sleep(60)"
    process = local(body, "3", "--", "--workdir=x")
    process.communicate(timeout=20)
    assert process.returncode == 7
    assert len(list(tmp_path.glob("pid*"))) == 3 and not alive(tmp_path)


def test_local_forwards_sigterm(local, tmp_path):
    """Catches a stop signal that kills the launcher and leaves the run without its checkpoint."""
    body = (
        "def stop(*_):\n    print('saved', flush=True)\n    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\n" + NOTE_PID + "time.sleep(60)"
    )
    process = local(body, "2", "--", "--workdir=x")
    deadline = time.monotonic() + 20
    while len(list(tmp_path.glob("pid*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert sorted(out.splitlines()) == ["[0] saved", "[1] saved"]
    assert not alive(tmp_path)


@pytest.mark.parametrize("argv", [(), ("two", "--", "x"), ("2", "x"), ("0", "--", "x")])
def test_local_usage(local, argv):
    """Catches a mistyped call that starts a run of the wrong size."""
    process = local("", *argv)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 2 and "launch/local_processes.sh N" in err


@pytest.fixture
def pod(tmp_path):
    """Runs tpu_pod.sh; gcloud is a script that runs what the workers would, in tmp_path."""
    (tmp_path / "home").mkdir()
    executable(
        tmp_path / "gcloud",
        f'#!/usr/bin/env bash\nprintf "%s\\n" "$4" >> {tmp_path}/calls\n'
        "[[ $4 == describe && -n ${FRESH:-} ]] && exit 1\n"
        'for argument in "$@"; do\n'
        f"  [[ $argument == --command=*cosup_jax.main* ]] && cd {tmp_path}/home &&\n"
        '    exec bash -c "${argument#--command=}"\n'
        "done\nexit 0\n",
    )

    def run(*argv, body="", **environ):
        worker = tmp_path / "home/cosup_jax/.venv/bin"
        worker.mkdir(parents=True, exist_ok=True)
        executable(worker / "python", TRAINER.format(python=sys.executable, body=body))
        path = f"{tmp_path}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", LAUNCH / "tpu_pod.sh", *argv],
            env=os.environ | {"PATH": path, "PAUSE": "0", "TMPDIR": str(tmp_path)} | environ,
            capture_output=True,
            text=True,
            timeout=30,
        )

    return run


def test_pod_dry_run_only_prints(pod, tmp_path):
    """Catches a dry run that rents a machine, and one that hides a command."""
    done = pod("--dry-run", "--spot", "n", "zone-a", "v5e-16", "--", "--workdir=/mnt/a b")
    assert done.returncode == 0 and not (tmp_path / "calls").exists()
    for wanted in ("create n", "--spot", "--zone=zone-a", "scp", "--worker=all", "cosup_jax.main"):
        assert wanted in done.stdout


STATES = (
    "runs = pathlib.Path(sys.argv[3].removeprefix('--workdir='))\n"
    "runs.mkdir(exist_ok=True)\n"
    "with open(here / 'log', 'a') as log:\n"
    "    print(os.environ['COSUP_CLUSTER'], sys.argv[3:], file=log)\n"
    "count = len((here / 'log').read_text().splitlines())\n"
    "state = 'stopped' if count < 3 else 'finished'\n"
    "(runs / 'status.json').write_text(json.dumps({'state': state, 'step': count}))\n"
)


def test_pod_restarts_a_stopped_run(pod, tmp_path):
    """Catches a preempted run that stays down, a finished one that repeats, lost quoting."""
    argv = (f"--workdir={tmp_path}/a run", "--config=c's.py")
    done = pod("n", "z", "v5e-16", "--", *argv, body=STATES, FRESH="1")
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "home/cosup_jax/.venv/bin/log").read_text().splitlines()
    assert log == [f"auto {list(argv)}"] * 3
    assert (tmp_path / "calls").read_text().split() == ["describe", "create", "scp", "ssh", "ssh"]


def test_pod_returns_a_failure(pod, tmp_path):
    """Catches a failing run that is restarted for ever, or reported as done."""
    done = pod("n", "z", "v5e-16", "--", f"--workdir={tmp_path}/r", body=STATES + "sys.exit(2)")
    assert done.returncode == 2
    assert "create" not in (tmp_path / "calls").read_text()


@pytest.mark.parametrize("argv", [(), ("n", "z", "v5e-16", "--", "--config=c"), ("--what", "n")])
def test_pod_usage(pod, argv):
    """Catches a slice that is rented before the call turns out to be incomplete."""
    done = pod(*argv)
    assert done.returncode == 2 and "launch/tpu_pod.sh" in done.stderr
