"""The launch scripts, with stand-ins for the trainer, gcloud, xpk and SLURM."""

import contextlib
import os
import re
import shlex
import shutil
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
    # Where these tests run in the background SIGINT is ignored, and bash could not trap it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def start(body, *argv, **how):
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
            **how,
        )
        started.append(process)
        return process

    yield start
    signal.signal(signal.SIGINT, before)
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
    body = NOTE_PID + (
        "while number == '1' and len(list(here.glob('pid*'))) < 3:\n    time.sleep(0.05)\n"
        "sys.exit(7) if number == '1' else time.sleep(60)"
    )
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


def test_local_ctrl_c_stops_all_and_loses_no_line(local, tmp_path):
    """Bugs: Ctrl-C that the processes never see, as bash has its background ignore it, or that ends
    those which print what they say, so that a run which saves dies of a broken pipe."""
    body = (
        "def stop(*_):\n    time.sleep(0.5)\n    print('saved', flush=True)\n    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\n" + NOTE_PID + "time.sleep(10)"
    )
    process = local(body, "2", "--", "--workdir=x", start_new_session=True)
    deadline = time.monotonic() + 20
    while len(list(tmp_path.glob("pid*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert sorted(out.splitlines()) == ["[0] saved", "[1] saved"]


@pytest.mark.parametrize("argv", [(), ("two", "--", "x"), ("2", "x"), ("0", "--", "x")])
def test_local_usage(local, argv):
    """Catches a mistyped call that starts a run of the wrong size."""
    process = local("", *argv)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 2 and err.startswith("error: ") and "local_processes.sh" in err


def test_local_dry_run_only_prints(local, tmp_path):
    """Catches a dry run that trains, or prints what cannot be pasted."""
    process = local(NOTE_PID, "--dry-run", "2", "3", "--", "--workdir=a b", "--config=c")
    out, _ = process.communicate(timeout=20)
    lines = [shlex.split(line) for line in out.splitlines()]
    assert process.returncode == 0 and not list(tmp_path.glob("pid*"))
    assert [next(w for w in line if "PROCESS_ID" in w)[-1] for line in lines] == ["0", "1"]
    assert all(line[-2:] == ["--workdir=a b", "--config=c"] for line in lines)


@pytest.fixture
def tools(tmp_path):
    """Runs a launch script with stand-ins first on PATH; each notes its arguments, one call a line.

    They answer by what `bodies` gives for them, in bash.
    """

    def run(script, *argv, bodies=None, **environ):
        for tool in ("gcloud", "xpk", "kubectl", "sbatch", "scancel", "srun", "scontrol"):
            body = (bodies or {}).get(tool, "exit 0")
            note = f"{{ printf '%s' {tool}; printf ' %q' \"$@\"; echo; }} >> {tmp_path}/calls\n"
            executable(tmp_path / tool, f"#!/usr/bin/env bash\n{note}{body}\n")
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path), "POLL": "0.2"}
        done = subprocess.run(
            ["bash", LAUNCH / script, *argv],
            env=os.environ | path | environ,
            capture_output=True,
            text=True,
            timeout=60,
        )
        calls = tmp_path / "calls"
        return done, calls.read_text().splitlines() if calls.exists() else []

    return run


def only(calls, *wanted):
    """The one call that has all of `wanted` in it."""
    found = [shlex.split(call) for call in calls if all(word in call for word in wanted)]
    assert len(found) == 1, (wanted, calls)
    return found[0]


RUN = ("--", "--config=/c's.py", "--workdir=gs://b/a run")
DRY_RUNS = {
    "tpu_pod.sh": [
        ("--spot", "train", "n", "zone-a", "v5e-16", *RUN),
        ("--slices=2", "create", "n", "z", "v5e-16"),
        ("run", "n", "z", *RUN),
        *((action, "n", "z") for action in ("install", "state", "logs", "stop", "delete")),
        ("fetch", "n", "z", "a", "b", "here"),
    ],
    "gke.sh": [
        ("--slices=2", "run", "n", "cluster", "v5p-128", *RUN),
        *((action, "n", "cluster") for action in ("state", "logs", "delete")),
    ],
    "slurm.sh": [("--nodes=2", "run", "n", *RUN), ("logs", "n"), ("stop", "n")],
}


@pytest.mark.parametrize(
    ("script", "argv"), [(script, argv) for script, calls in DRY_RUNS.items() for argv in calls]
)
def test_dry_run_only_prints(tools, script, argv):
    """Catches a dry run that rents a machine, prints nothing, or what a shell reads otherwise."""
    done, calls = tools(script, "--dry-run", *argv)
    assert (done.returncode, calls, done.stderr) == (0, [], "")
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    assert commands and all("n" in " ".join(command) for command in commands)
    if RUN[0] in argv:
        started = commands[-1]
        assert any("a\\ run" in word or word == RUN[2] for word in started), started


@pytest.mark.parametrize(
    ("script", "argv"),
    [
        ("tpu_pod.sh", ()),
        ("tpu_pod.sh", ("train", "n", "z", "--", "--config=c", "--workdir=w")),
        ("tpu_pod.sh", ("run", "n", "z", "--", "--config=c")),
        ("tpu_pod.sh", ("--what", "create", "n", "z", "v5e-16")),
        ("tpu_pod.sh", ("destroy", "n", "z")),
        ("tpu_pod.sh", ("fetch", "n", "z", "file")),
        ("gke.sh", ("run", "n", "c", "--", "--config=c", "--workdir=gs://w")),
        ("gke.sh", ("run", "n", "c", "v5e-16", "--", "--config=c", "--workdir=/gone/with/it")),
        ("slurm.sh", ("--nodes=0", "run", "n", *RUN)),
        ("slurm.sh", ("--gpus=0", "run", "n", *RUN)),
        ("slurm.sh", ("--gpus=", "run", "n", *RUN)),
        ("slurm.sh", ("--restarts=many", "run", "n", *RUN)),
        ("tpu_pod.sh", ("--restarts=", "create", "n", "z", "v5e-16")),
        ("slurm.sh", ("run", "n", "--config=c", "--workdir=w")),
        ("worker.sh", ()),
        ("worker.sh", ("begin",)),
    ],
)
def test_usage(tools, script, argv):
    """Catches machines that are rented before the call turns out to be incomplete."""
    done, calls = tools(script, *argv)
    assert done.returncode == 2 and calls == []
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("train", "n", "z", "--", *RUN), "train needs the TYPE of the slice after ZONE"),
        (("--slices=0", "create", "n", "z", "t"), "--slices=0 is no number of slices"),
        (("destroy", "n", "z"), "unknown action destroy"),
        (("run", "n", "z", "--workdir=w"), "run needs -- and the program's arguments"),
        (
            ("train", "n", "z", "t", "--", "--config=gone.py:v", "--workdir=w"),
            "config file 'gone.py'",
        ),
    ],
)
@pytest.mark.parametrize("how", [(), ("--dry-run",)])
def test_pod_says_what_is_wrong(tools, argv, says, how):
    """Bugs: a usage of forty lines that leaves the mistake to be guessed; a slice that is rented
    for a config that nobody has."""
    done, calls = tools("tpu_pod.sh", *how, *argv)
    assert (done.returncode, calls) == (2, [])
    assert done.stderr.startswith(f"error: {says}")


CLOUD = """
cd {here}
no_network() {{ echo "ERROR: no network" >&2; exit 1; }}
[[ $4 == describe || ! -s outage ]] || no_network
case $4 in
  describe)
    [[ -s outage ]] && sed -i 1d outage && no_network
    cat state 2>/dev/null || {{ echo "ERROR: NOT_FOUND: Resource 'n'" >&2; exit 1; }}
    ;;
  create) echo ACTIVE > state ;;
  delete)
    rm state
    for pid in $(cat home/cosup_run/pid home/cosup_run/program); do
      grep -qs {here} /proc/$pid/environ && kill -9 $pid
    done
    rm -r home/cosup_run
    ;;
  ssh)
    [[ $(cat state) == ACTIVE ]] || exit 1
    for argument in "$@"; do
      [[ $argument == --command=*pip* || $argument != --command=* ]] && continue
      cd home && HOME=$PWD bash -c "${{argument#--command=}}"
    done
    ;;
esac
"""


def end(tmp_path):
    """Ends what still runs there; a number that was given to another process since is let be."""
    for path in (tmp_path / "home").glob("cosup_run/p*"):
        with contextlib.suppress(OSError, ValueError):
            pid = int(path.read_text())
            if str(tmp_path).encode() in Path(f"/proc/{pid}/environ").read_bytes():
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def pod(tools, tmp_path):
    """tpu_pod.sh with a gcloud whose one worker is tmp_path/home, and a stand-in trainer there."""
    checkout = tmp_path / "home" / "cosup_jax"
    (checkout / ".venv/bin").mkdir(parents=True)
    shutil.copytree(LAUNCH, checkout / "launch")

    def run(*argv, body, **environ):
        executable(checkout / ".venv/bin/python", TRAINER.format(python=sys.executable, body=body))
        return tools("tpu_pod.sh", *argv, bodies={"gcloud": CLOUD.format(here=tmp_path)}, **environ)

    yield run
    end(tmp_path)


COUNTED = (  # ends with the codes given, one a start
    "with open(here / 'log', 'a') as log:\n"
    "    print(os.environ['COSUP_CLUSTER'], sys.argv[3:], file=log)\n"
    "count = len((here / 'log').read_text().splitlines())\n"
    "assert os.environ['COSUP_STOPPED_CODE'] == '75'\n"
)
TRAIN = ("train", "n", "z", "v5e-16", "--")


def test_pod_restarts_a_stopped_run(pod, tmp_path):
    """Catches a stopped run that stays down, a finished one that repeats, lost quoting."""
    argv = ("--workdir=gs://b/a run", "--config=/c's.py")
    done, calls = pod(*TRAIN, *argv, body=COUNTED + "sys.exit(0 if count == 3 else 75)")
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "home/cosup_jax/.venv/bin/log").read_text().splitlines()
    assert log == [f"auto {list(argv)}"] * 3
    created = only(calls, "queued-resources create")
    assert created[4:6] == ["create", "n"] and "--node-id=n" in created
    assert {"--accelerator-type=v5e-16", "--zone=z"} <= set(created)


def test_pod_queues_anew_after_preemption(pod, tmp_path):
    """Catches a preempted slice that is waited for for ever, or is not given back first."""
    body = COUNTED + (
        "if count == 1:\n"
        f"    pathlib.Path({str(tmp_path / 'state')!r}).write_text('SUSPENDED')\n"
        "    time.sleep(60)\n"
    )
    done, calls = pod("--spot", *TRAIN, "--config=/c", "--workdir=w", body=body)
    assert done.returncode == 0, done.stderr
    words = [shlex.split(call) for call in calls]
    changes = [call[4] for call in words if call[4] in ("create", "delete")]
    assert changes == ["create", "delete", "create"]
    assert all("--spot" in call for call in words if call[4] == "create")


@pytest.mark.parametrize("there", [False, True], ids=["new", "there"])
def test_pod_waits_for_the_network(pod, tmp_path, there):
    """Bug: the launcher takes a network that fails for a slice that is gone, and ends while the run
    goes on; or it does so only where it found the slice there."""
    if there:
        (tmp_path / "state").write_text("ACTIVE")
    body = COUNTED + (
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "outage, calls = here / 'outage', here / 'calls'\n"
        "outage.write_text('\\n' * 3)  # looks that fail\n"
        "count = lambda: calls.read_text().count('\\n')\n"
        "while outage.stat().st_size:\n    time.sleep(0.05)\n"
        "before = count()\n"
        "while count() < before + 3:\n    time.sleep(0.05)\n"  # until it is watched again
    )
    done, calls = pod(*TRAIN, "--config=/c", "--workdir=w", body=body)
    assert done.returncode == 0, done.stderr
    assert "slice n: unknown: ERROR: no network" in done.stderr
    made = [call for call in calls if "queued-resources create" in call]
    assert len(made) == (not there) and not any(" delete " in call for call in calls)
    assert len((tmp_path / "home/cosup_jax/.venv/bin/log").read_text().splitlines()) == 1


def test_pod_that_cannot_look_makes_nothing(tools):
    """Bugs: a second slice, or a wait without end, where gcloud was never logged in."""
    body = "echo 'ERROR: log in' >&2; exit 1"
    done, calls = tools("tpu_pod.sh", "create", "n", "z", "v5e-16", bodies={"gcloud": body})
    assert (done.returncode, len(calls)) == (1, 1) and "unknown: ERROR: log in" in done.stderr


@pytest.mark.parametrize("config", ["runs/x/config.json", "configs/../runs/x/config.json"])
def test_pod_refuses_a_config_that_is_not_packed(tools, tmp_path, config):
    """Bug: the config of an earlier run is not on the slice that was rented for it."""
    shutil.copytree(LAUNCH, tmp_path / "its/launch")
    for name in ("runs/x/config.json", "configs/c.json"):
        (tmp_path / "its" / name).parent.mkdir(parents=True)
        (tmp_path / "its" / name).touch()
    script = tmp_path / "its/launch/tpu_pod.sh"
    done, calls = tools(script, "--dry-run", *TRAIN, f"--config={config}", "--workdir=w")
    assert (done.returncode, calls) == (2, []) and "is not packed for the machines" in done.stderr
    done, _ = tools(script, "--dry-run", *TRAIN, "--config=configs/c.json", "--workdir=w")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", [1, 2])
def test_pod_returns_a_failure(pod, tmp_path, code):
    """Catches a failing run that is restarted for ever, or reported as done."""
    (tmp_path / "state").write_text("ACTIVE")
    argv = ("--config=/c", "--workdir=w")
    done, calls = pod(*TRAIN, *argv, body=COUNTED + f"sys.exit({code})")
    assert done.returncode == code
    assert not any("queued-resources create" in call for call in calls)


def test_pod_gives_up_in_the_end(pod):
    """Catches a run that dies at once, and for days is started again on a rented slice."""
    argv = ("--config=/c", "--workdir=w")
    body = COUNTED + "os.kill(os.getpid(), signal.SIGKILL)"
    done, _ = pod("--restarts=1", *TRAIN, *argv, body=body)
    assert done.returncode == 2 and "started again 1 times" in done.stderr


def test_worker_stops_what_it_started(tmp_path):
    """Catches a stop that kills the shell and not the program, or loses the exit code."""
    body = (
        "def stop(*_):\n    print('saved', flush=True)\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop)\nprint('up', flush=True)\ntime.sleep(60)"
    )
    python = executable(tmp_path / "python", TRAINER.format(python=sys.executable, body=body))
    run = tmp_path / "run"
    environ = os.environ | {"PYTHON": str(python), "RUN": str(run)}

    def worker(*argv):
        script = ["bash", LAUNCH / "worker.sh", *argv]
        return subprocess.run(
            script, env=environ, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()

    def until(text):
        deadline = time.monotonic() + 20
        while text not in (run / "log").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)

    assert worker("state") == "none"
    worker("start", "--workdir=w")
    until("up")
    assert worker("state") == "running"
    worker("start", "--workdir=w")
    deadline = time.monotonic() + 20
    while not (run / "program").exists() and time.monotonic() < deadline:  # whom to stop
        time.sleep(0.05)
    worker("stop")
    until("saved")
    deadline = time.monotonic() + 20
    while worker("state") == "running" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert worker("state") == "ended 75"
    assert (run / "log").read_text().count("up") == 1


@pytest.mark.parametrize("action", ["start", "supervise"])
def test_worker_lives_until_it_has_ended(tmp_path, action):
    """Catches a run told to be dead in the moment it starts or ends: it is started twice."""
    argv = ["bash", "-c", "sleep 60; exit", "launch/worker.sh", action]
    with subprocess.Popen(argv, start_new_session=True) as alive:
        try:
            (tmp_path / "pid").write_text(str(alive.pid))
            state = lambda: subprocess.run(
                ["bash", LAUNCH / "worker.sh", "state"],
                env=os.environ | {"RUN": str(tmp_path)},
                capture_output=True,
                text=True,
            )
            assert state().stdout == "running\n"
            (tmp_path / "code").write_text("0\n")  # the last thing that it does
            assert state().stdout == "running\n"
        finally:
            os.killpg(alive.pid, signal.SIGKILL)
    ended = state()
    assert (ended.stdout, ended.stderr) == ("ended 0\n", "")


def test_gke_restarts_what_was_stopped(tools):
    """Catches a stopped run that Kubernetes takes for finished, and lost quoting."""
    done, calls = tools(
        "gke.sh", "--slices=2", "run", "n", "c", "v5p-128", *RUN, XPK="--zone=z --priority=high"
    )
    assert done.returncode == 0, done.stderr
    call = only(calls, "xpk workload create")
    wanted = {"--workload=n", "--cluster=c", "--tpu-type=v5p-128", "--num-slices=2", "--zone=z"}
    assert wanted <= set(call) and "--priority=high" in call
    assert {"--env=COSUP_STOPPED_CODE=75", "--restart-on-user-code-failure"} <= set(call)
    command = next(word for word in call if word.startswith("--command="))
    assert shlex.split(command)[-2:] == list(RUN[1:])


def test_slurm_submits(tools):
    """Catches a job without the signal that makes it save, or that SLURM may not queue again."""
    done, calls = tools("slurm.sh", "--nodes=2", "--gpus=4", "run", "n", *RUN, SBATCH="-p gpu")
    assert done.returncode == 0, done.stderr
    call = only(calls, "sbatch")
    wanted = {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--signal=TERM@180", "-p"}
    assert wanted <= set(call) and "--requeue" in call
    assert call[-3:] == ["launch/slurm_job.sh", *RUN[1:]]


def test_slurm_follows_the_log_that_it_names(tools):
    """Bug: logs looks for it in the directory in which it is called."""
    calls = ("logs", "n"), ("run", "n", *RUN)
    words = " ".join(tools("slurm.sh", "--dry-run", *call)[0].stdout for call in calls)
    log = LAUNCH.parent / "slurm-n.log"
    assert {str(log), f"--output={log}"} <= set(shlex.split(words))


@pytest.mark.parametrize(
    ("code", "restarted", "result", "queued"),
    [(0, 0, 0, 0), (2, 0, 2, 0), (1, 0, 1, 0), (75, 0, 0, 1), (137, 3, 0, 1), (75, 5, 2, 0)],
)
def test_slurm_job_queues_itself_again(tools, code, restarted, result, queued):
    """Catches a stopped or lost run that stays down, a mistake that is repeated for ever."""
    given = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarted), "RESTARTS": "5"}
    done, calls = tools(
        "slurm_job.sh",
        *RUN[1:],
        bodies={"srun": f"[[ $COSUP_STOPPED_CODE == 75 ]] || exit 9\nexit {code}"},
        SLURM_SUBMIT_DIR=str(LAUNCH.parent),
        **given,
    )
    assert done.returncode == result, done.stderr
    assert only(calls, "srun")[-2:] == list(RUN[1:])
    assert calls.count("scontrol requeue 7") == queued


def test_an_array_may_be_empty_in_an_old_bash():
    """Bug: "unbound variable" before bash 4.4, as macOS has it."""
    for script in LAUNCH.glob("*.sh"):
        text = script.read_text()
        empty = re.findall(r"\b(\w+)=\(\)|read -ra (\w+)", text)
        for name in filter(None, (name for names in empty for name in names)):
            uses = [line for line in text.splitlines() if f'"${{{name}[@]}}"' in line]
            guards = (f'${{{name}[@]+"${{{name}[@]}}"}}', f"${{#{name}[@]}}")
            assert all(any(guard in line for guard in guards) for line in uses), (script, uses)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_scripts_are_clean():
    """Catches what shells forgive until a path has a space in it."""
    scripts = [*sorted(LAUNCH.glob("*.sh")), LAUNCH.parent / ".ci" / "run"]
    found = subprocess.run(
        ["shellcheck", "-x", *scripts], capture_output=True, text=True, cwd=LAUNCH.parent
    )
    assert found.returncode == 0, found.stdout
