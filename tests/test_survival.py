"""Runs that are killed, stopped, damaged or out of room end as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax
import kills
import numpy as np
import orbax.checkpoint as ocp
import pytest
import towns

from cosup_jax import main as main_lib
from cosup_jax.runtime.workdir import Workdir

ROOT = Path(__file__).parent.parent
STEPS = 64
MODES = ("train", "encode", "evaluate")


class Ended(NamedTuple):
    code: int
    said: str
    cpu_s: float


class Runs:
    """Runs of the product, one after the other, that die as they are told."""

    def __init__(self, config: Path, cache: Path):
        self._config = config
        environ = towns.environ(cache) | {"PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        script = [sys.executable, str(ROOT / "tests" / "kills.py")]
        self.server = subprocess.Popen(script, stdin=pipe, stdout=pipe, text=True, env=environ)

    def __call__(self, workdir: Path, *flags: str, mode: str = "train", **how) -> Ended:
        """`how`: what kills it, or limits it, in the words of kills.py."""
        log = workdir.with_suffix(".log")
        task = {"fault": None, "event": 0, "cpu_s": 0.0, "devices": 1, "file_bytes": 0}
        argv = [f"--config={self._config}", f"--mode={mode}", *flags]
        task |= {"workdir": str(workdir), "log": str(log), "argv": argv} | how
        self.server.stdin.write(json.dumps(task) + "\n")
        self.server.stdin.flush()
        ended = json.loads(self.server.stdout.readline())
        return Ended(ended["code"], log.read_text(), ended["cpu_s"])

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(60)
        self.server.stdout.close()


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    every = {"checkpoint__every_steps": 2, "eval__every_steps": 8, "log__probe_every_steps": 0}
    few = {"eval__examples": 12, "eval__arms": "corpus,gold", "eval__corpus_sizes": ""}
    small = {"bank__ema_decay": 0.9, "index__shard_rows": 8, "generate__max_tokens": 16}
    directory = tmp_path_factory.mktemp("config")
    return towns.write_config(directory, num_steps=STEPS, **every, **few, **small)


@pytest.fixture(scope="module")
def runs(config, tmp_path_factory):
    found = Runs(config, tmp_path_factory.mktemp("cache"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def unbroken(runs, tmp_path_factory) -> Path:
    """Trained, encoded and evaluated in one go each: what the others are compared with."""
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    for mode in MODES:
        ended = runs(workdir, mode=mode)
        assert ended.code == 0, ended.said
    return workdir


def arrays(checkpoint: Path) -> dict[str, np.ndarray]:
    """All that a checkpoint holds, by path."""
    return ocp.PyTreeCheckpointHandler().restore(
        checkpoint / "state",
        args=ocp.args.PyTreeRestore(
            restore_args=jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
                ocp.PyTreeCheckpointHandler().metadata(checkpoint / "state").tree,
            )
        ),
    )


def files(workdir: Path) -> dict[str, bytes]:
    """Whatever a run leaves but for checkpoints, caches, and what depends on the clock."""
    left_out = ["checkpoints", "tensorboard", "data", "report.html", "metrics.jsonl"]
    left_out += [".lock", ".started"]
    found = [path for path in workdir.rglob("*") if path.is_file()]
    found = [p for p in found if p.relative_to(workdir).parts[0] not in left_out]
    found = [p for p in found if not p.name.endswith(".lock") and p.parent.name != "digests"]
    return {str(path.relative_to(workdir)): path.read_bytes() for path in found}


def assert_same(found: Path, expected: Path) -> None:
    """Bit for bit: metrics, parameters, optimizer, bank, index, answers and scores."""
    assert towns.metrics(found) == towns.metrics(expected)
    steps = sorted(path.name for path in (expected / "checkpoints").iterdir())
    assert sorted(path.name for path in (found / "checkpoints").iterdir()) == steps
    for step in steps:
        ours, theirs = (arrays(workdir / "checkpoints" / step) for workdir in (found, expected))
        assert ours.keys() == theirs.keys()
        assert {"params", "opt_state", "bank", "ema_ctx"} <= {name.split("/")[0] for name in ours}
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype, name
            assert ours[name].tobytes() == theirs[name].tobytes(), f"{name} of step {step}"
        for workdir in (found, expected):
            assert (workdir / "checkpoints" / step / "meta" / "metadata").is_file()
    ours, theirs = files(found), files(expected)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name] == theirs[name], name


def newest(workdir: Path) -> int:
    """Step of the newest checkpoint that has its final name; 0 if none has."""
    steps = [p.name for p in (workdir / "checkpoints").glob("*") if p.name.isdecimal()]
    return max(map(int, steps), default=0)


def clean(ended: Ended) -> bool:
    """Whether it found nothing wrong."""
    return not any(word in ended.said for word in ("damaged", "Traceback", "WARNING", "error"))


def random_kill(rng: random.Random, cpu_s: float) -> dict:
    """At some file that the run touches, or after some time, in C++ or wherever it is."""
    if rng.random() < 0.5:
        return {"event": rng.randint(5, 60)}
    return {"cpu_s": cpu_s * rng.uniform(0.3, 1.05)}


@pytest.mark.slow
def test_killed_anywhere_the_result_is_the_same(runs, unbroken, tmp_path):
    """Bugs: a step repeated or left out, a metric line lost or doubled, half a file read, a shard
    or an answer made twice or never, state that the checkpoint lacks, litter that stays."""
    workdir, rng, counts, cpu_s = tmp_path / "run", random.Random(7), Counter(), 0.0
    products = {"train": "", "encode": "index", "evaluate": "evaluation/towns.dev"}
    for mode in MODES:
        for phase in (phase for phase, of in kills.MODES.items() if of == mode):
            for where in kills.FAULTS[phase]:
                step = newest(workdir)
                ended = runs(workdir, mode=mode, fault=(phase, where))
                assert ended.code == -signal.SIGKILL, f"{phase}, {where}: {ended.said}"
                assert clean(ended)
                if mode == "train" and "parameters on" in ended.said:
                    assert f"step {step} of {STEPS}" in ended.said, where
                counts[phase], cpu_s = counts[phase] + 1, ended.cpu_s
        for _ in range(3):
            if mode != "train":
                shutil.rmtree(workdir / products[mode], ignore_errors=True)  # something to do again
            ended = runs(workdir, mode=mode, **random_kill(rng, cpu_s))
            assert ended.code in (-signal.SIGKILL, 0) and clean(ended), ended.said
            counts["random"] += ended.code != 0
        ended = runs(workdir, mode=mode)
        assert ended.code == 0 and clean(ended), ended.said
    assert_same(workdir, unbroken)
    assert not workdir.with_suffix(".litter").read_text()
    print(f"{counts.total()} kills: {dict(counts)}")
    assert counts.total() >= 20 and all(counts[phase] >= 3 for phase in kills.FAULTS)


@pytest.mark.slow
def test_damage_and_a_full_disk_cost_steps_and_nothing_else(runs, unbroken, tmp_path):
    """Bugs: a run that a full disk leaves without a checkpoint, or ends with a traceback; a newest
    checkpoint that is damaged and stops the run, or is trained on."""
    workdir = tmp_path / "run"
    killed = runs(workdir, fault=("checkpoint", "before the oldest goes"))
    assert killed.code == -signal.SIGKILL, killed.said
    checkpoints = workdir / "checkpoints"
    step = newest(workdir)
    for data in (checkpoints / str(step)).glob("state/**/d/*"):
        data.write_bytes(data.read_bytes()[:-1000])
    full = runs(workdir, file_bytes=100_000)
    assert full.code == 2 and "Traceback" not in full.said, full.said
    assert f"going back to checkpoint {checkpoints}/{step - 2};" in full.said
    assert f"{checkpoints}/{step}.damaged" in full.said
    (error,) = (line for line in full.said.splitlines() if line.startswith("error: "))
    assert f"checkpoints in {checkpoints}: cannot save" in error and "free space" in error
    status = json.loads((workdir / "status.json").read_text())
    assert status == {"state": "failed", "step": step - 2} and newest(workdir) == step - 2
    last = runs(workdir)
    assert last.code == 0 and f"step {step - 2} of {STEPS}" in last.said, last.said
    shutil.rmtree(checkpoints / f"{step}.damaged")
    for mode in MODES[1:]:
        assert runs(workdir, mode=mode).code == 0
    assert_same(workdir, unbroken)


@pytest.mark.slow
def test_told_to_stop_in_an_evaluation_or_a_mode_without_a_loop(runs, unbroken, tmp_path):
    """Bugs: a preempted machine that is gone before its evaluation ends; one that is left out or
    done twice; modes that end without a line, or half-written, or do again what is done."""
    workdir = tmp_path / "run"
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(f'{{"question": "How many boats has {n}?"}}\n' for n in range(9)))
    stops = (("vectors", 8), ("held-out questions", 16), ("the last questions", 64))
    for where, step in (*stops, ("an answer", 64)):
        ended = runs(workdir, fault=("notice", where))
        assert ended.code == 0 and clean(ended), ended.said
        status = json.loads((workdir / "status.json").read_text())
        assert status == {"state": "stopped", "step": step} and newest(workdir) == step, where
        measured = [
            row["step"] for row in towns.metrics(workdir) if "eval/towns.dev/mrr_at_10" in row
        ]
        assert measured == list(range(0, step + (where == "an answer"), 8))
    assert runs(workdir).code == 0
    tells = {
        "encode": "vectors",
        "generate": "an answer",
        "evaluate": "an answer",
        "mine": "a file",
    }
    for mode, where in tells.items():
        flags = [f"--questions={asked}"] if mode == "generate" else []
        ended = runs(workdir, *flags, mode=mode, fault=("notice", where))
        assert ended.code == 143 and clean(ended), ended.said
        assert ended.said.count("stopped; the same command goes on from the ") == 1
        assert not list(workdir.rglob("*.part"))
        ended = runs(workdir, *flags, mode=mode)
        assert ended.code == 0 and clean(ended), ended.said
    assert (workdir / "answers" / "asked.jsonl").read_text().count("\n") == 9
    assert (workdir / "mined" / "towns.jsonl").read_text().count("\n") == 160
    for name in ("answers", "mined"):
        shutil.rmtree(workdir / name)
    assert_same(workdir, unbroken)


@pytest.mark.slow
def test_resumed_on_fewer_devices_and_another_mesh(runs, tmp_path):
    """Bugs: optimizer state, bank or moving average that is another after a change of mesh; a batch
    that depends on the devices. The curves differ by the order of sums in float32 alone."""
    flags = ["--config.num_steps=10", "--config.checkpoint.keep=9"]
    flags.append("--config.generate.examples=0")  # whose programs are as dear as the step's
    mesh = lambda *sizes: [
        f"--config.mesh.{axis}={size}"
        for axis, size in zip(("data", "fsdp", "tensor"), sizes, strict=True)
    ]
    on_8 = tmp_path / "8"
    ended = runs(on_8, *flags, *mesh(2, 2, 2), devices=8)
    assert ended.code == 0, ended.said
    for sizes in ((1, 1, 1), (1, 1, 2), (1, 4, 1), (2, 1, 2)):
        devices = int(np.prod(sizes))
        workdir = tmp_path / "-".join(map(str, sizes))
        shutil.copytree(on_8, workdir)
        for step in (6, 8, 10):
            shutil.rmtree(workdir / "checkpoints" / str(step))
        ended = runs(workdir, *flags, *mesh(*sizes), devices=devices)
        assert ended.code == 0 and "step 4 of 10" in ended.said, ended.said
        found, expected = towns.metrics(workdir), towns.metrics(on_8)
        assert [row["step"] for row in found] == list(range(11))
        assert found[:5] == expected[:5]
        far = 0.0
        for ours, theirs in zip(found[5:], expected[5:], strict=True):
            assert ours.keys() == theirs.keys()
            for name in ("loss/total", "ntp/nats_per_token", "nsp/nats_per_ret"):
                far = max(far, abs(ours[name] - theirs[name]) / abs(theirs[name]))
        print(f"8 devices, 2 x 2 x 2, then {devices}, {sizes}: losses within {far:.1e}")
        assert far <= 1e-4


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_and_go_on(config, tmp_path):
    """Bugs: a preempted pod in which one host stops, or leaves an evaluation, and the others wait
    for it; one that stops at scheduled steps only; one that goes on from another state than it
    stopped in."""
    environ = towns.environ(tmp_path / "cache")
    where = "held-out questions, in one of several processes"
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('JAX_PROCESS_ID') == '1':\n"
        "    import kills\n"
        "    from cosup_jax.runtime.notices import Notices\n"
        f"    told = lambda *_: kills.NOTICES[{where!r}]()\n"
        "    kills._at_call(Notices, 'enter_loop', 1, told)\n"
    )

    def start(workdir, *paths):
        script = ["bash", str(ROOT / "launch" / "local_processes.sh"), "2", "1", "--"]
        argv = [f"--config={config}", f"--workdir={workdir}", "--config.mesh.fsdp=2"]
        argv.append("--config.num_steps=32")
        pipe, one = subprocess.PIPE, subprocess.STDOUT
        told = environ | {"PYTHONPATH": ":".join(map(str, (ROOT, *paths)))}
        return subprocess.Popen(
            [*script, *argv], cwd=ROOT, env=told, stdout=pipe, stderr=one, text=True
        )

    whole, parted = tmp_path / "whole", tmp_path / "parted"
    first = start(whole)
    said, _ = first.communicate(timeout=900)
    assert first.returncode == 0, said
    process = start(parted, ROOT / "tests", tmp_path)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    assert json.loads((parted / "status.json").read_text()) == {"state": "stopped", "step": 8}
    assert not any(name.startswith("eval/") for name in towns.metrics(parted)[8])
    process, lines = start(parted), []
    while "step 15/" not in (lines or [""])[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1], "".join(lines)
    process.send_signal(signal.SIGTERM)
    said = "".join(lines) + process.communicate(timeout=900)[0]
    assert process.returncode == 0, said
    status = json.loads((parted / "status.json").read_text())
    assert status["state"] == "stopped" and 15 <= status["step"] < 32, said
    assert newest(parted) == status["step"]
    process = start(parted)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0 and f"step {status['step']} of 32" in said, said
    shutil.rmtree(parted / "checkpoints")  # the stops have left others
    shutil.copytree(whole / "checkpoints", parted / "checkpoints")
    assert towns.metrics(parted) == towns.metrics(whole)


def test_a_second_run_is_refused_at_once(config, tmp_path, capsys):
    """Bug: two runs write one workdir; the second finds out after reading its data."""
    with Workdir(tmp_path / "run"):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        for mode in MODES:
            argv = [f"--config={config}", f"--workdir={tmp_path / 'run'}", f"--mode={mode}"]
            assert main_lib.main(argv) == 2
            error = f"in use by another run, process {os.getpid()};"
            assert error in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
