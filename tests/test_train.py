"""The main job as a user runs it: to the end, killed and resumed, on two processes, and wrong."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import towns

from cosup_jax import assemble, train
from cosup_jax import main as main_lib
from cosup_jax.checkpoint import Checkpointer
from cosup_jax.data.tokenizer import load
from cosup_jax.errors import UserError
from cosup_jax.held_out import Evaluator
from cosup_jax.runtime.workdir import Workdir

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
SHORT = (
    *("--config.num_steps=4", "--config.checkpoint.every_steps=3"),
    *("--config.mesh.fsdp=2", "--config.generate.examples=1"),
)


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """The runs below compile the same programs: quickly, and once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
        yield


@pytest.fixture(scope="module", autouse=True)
def own_signals():
    """Runs in this process take SIGTERM over."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A config that trains for 24 steps in seconds, on up to 8 devices."""
    every = {"checkpoint__every_steps": 4, "eval__every_steps": 6}
    # Lines are written at multiples of 4 and 6. A signal that waits for one is obeyed a step later,
    # where no checkpoint is due.
    return towns.write_config(tmp_path_factory.mktemp("tiny"), num_steps=24, **every)


def _start(config, workdir) -> subprocess.Popen:
    command = [sys.executable, "-m", "cosup_jax.main", f"--config={config}", f"--workdir={workdir}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=towns.environ(config.parent / "cache"), **pipes)


def _digest(workdir: Path) -> str:
    """Of the weights in the last checkpoint, as its embedding contract has it."""
    last = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    meta = json.loads((last / "meta" / "metadata").read_text())
    return json.dumps([meta["run"]["contract"]["weights"], meta["leaves"]])


@pytest.fixture(scope="module")
def unbroken(tiny, tmp_path_factory) -> Path:
    """The run that the others are compared with."""
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    process = _start(tiny, workdir)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "towns.dev: 20 questions, training reads the passages of 100% as evidence\n" in out
    assert "BM25" in out and "bigram" in out
    return workdir


@pytest.fixture(scope="module")
def short(tiny, tmp_path_factory) -> tuple[Path, list]:
    """Four steps on this process' 8 devices, and the lines on disk at the start of each save."""
    workdir, seen = tmp_path_factory.mktemp("short") / "run", []
    save = Checkpointer.save

    def noted(self, step, *rest):
        seen.append((step, [row["step"] for row in towns.metrics(workdir)]))
        save(self, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpointer, "save", noted)
        assert main_lib.main([f"--config={tiny}", f"--workdir={workdir}", *SHORT]) == 0
    return workdir, seen


def test_metrics_are_on_disk_before_their_checkpoint(short):
    """Bug: a kill right after a save loses the lines of the steps that were saved."""
    _, seen = short
    assert seen == [(3, [0, 1, 2, 3]), (4, [0, 1, 2, 3, 4])]


def test_a_checkpoint_knows_gens_tokenizer(short):
    """Bug: only Ctx's is kept, so that Gen may read wrong ids with a tokenizer of new data."""
    meta = json.loads((short[0] / "checkpoints/4/meta/metadata").read_text())
    [tokenizer] = (short[0] / "tokenizer").iterdir()
    assert meta["run"]["gen_tokenizer"] == load(tokenizer).fingerprint


def test_other_settings_are_no_settings_of_a_finished_run(tiny, short, tmp_path, capsys):
    """Bugs: config.json tells of a learning rate that no step was taken with; an arm of a study is
    refused as another study's, whose question it does not read."""
    workdir, _ = short
    before = (workdir / "config.json").read_bytes()
    flags = [f"--workdir={workdir}", *SHORT]
    assert main_lib.main([f"--config={tiny}", *flags, "--config.optim.gen_learning_rate=0.5"]) == 2
    err = capsys.readouterr().err
    assert "no step is left for config.optim.gen_learning_rate=0.5 (was 0.0" in err
    assert (workdir / "config.json").read_bytes() == before
    other = tmp_path / "other.py"
    other.write_text(
        tiny.read_text().replace("'batch_size'", "'study.question': 'why?', 'batch_size'")
    )
    assert "study" in other.read_text()
    assert main_lib.main([f"--config={other}", *flags]) == 0
    assert "is finished at step" not in capsys.readouterr().err


def test_a_finished_run_left_everything(tiny, unbroken, capsys):
    """Bug: a step logged twice or never; a second invocation that trains again."""
    rows = towns.metrics(unbroken)
    assert [row["step"] for row in rows] == list(range(25))
    evaluated = [row["step"] for row in rows if "eval/towns.dev/recall_at_1" in row]
    assert evaluated == [0, 6, 12, 18, 24]
    assert json.loads((unbroken / "status.json").read_text()) == {"state": "finished", "step": 24}
    page = (unbroken / "report.html").read_text()
    assert "<svg" in page and "How many" in page and "BM25" in page
    assert any((unbroken / "tensorboard").iterdir())
    assert main_lib.main([f"--config={tiny}", f"--workdir={unbroken}"]) == 0
    assert "is finished" in capsys.readouterr().out
    assert towns.metrics(unbroken) == rows


def test_killed_stopped_and_resumed_is_bit_equal(tiny, unbroken, tmp_path):
    """Bugs: data replayed or skipped after a resume; a metric line lost or doubled; bank, optimizer
    or random key not restored; a preempted run that loses the steps since its last checkpoint, or
    reports a failure, or dies of a second notice while it saves; minutes of compiling
    in silence."""
    rng, workdir = random.Random(seed := os.getpid()), tmp_path / "run"
    print(f"killed where random.Random({seed}) says")
    metrics = workdir / "metrics.jsonl"
    count = lambda: metrics.read_text().count("\n") if metrics.exists() else 0

    def interrupted(number: int) -> tuple[int, str]:
        """Sends a signal a few steps beyond the lines that the run finds."""
        wanted = count() + rng.randint(1, 4)
        process = _start(tiny, workdir)
        while count() < wanted:
            time.sleep(0.005)
            assert process.poll() is None
        process.send_signal(number)
        while process.poll() is None:
            time.sleep(0.05)
            process.send_signal(number)
        out, err = process.communicate(timeout=300)
        return process.returncode, out + err

    assert interrupted(signal.SIGKILL)[0] == -signal.SIGKILL
    code, said = interrupted(signal.SIGTERM)
    assert code == 0, said
    status = json.loads((workdir / "status.json").read_text())
    assert "compiling the step" in said and " s, compilation included" in said
    assert status["state"] == "stopped" and f"stopped at step {status['step']}" in said
    assert (workdir / "checkpoints" / str(status["step"])).is_dir()
    assert interrupted(signal.SIGKILL)[0] == -signal.SIGKILL
    process = _start(tiny, workdir)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert towns.metrics(workdir) == towns.metrics(unbroken)
    assert _digest(workdir) == _digest(unbroken)


def test_a_notice_does_not_wait_for_an_evaluation(tiny, short, tmp_path, capsys, monkeypatch):
    """Bugs: a preempted machine is gone before a long evaluation ends, and its steps with it; the
    resumed run leaves the evaluation out, or writes another line for its step; a run that stops at
    its last step is called done."""
    workdir, score = tmp_path / "run", Evaluator._score
    argv = [f"--config={tiny}", f"--workdir={workdir}", *SHORT]
    shutil.copytree(short[0], workdir)
    for name in ("checkpoints/4", "evaluation"):
        shutil.rmtree(workdir / name)
    for name in ("status.json", "report.html"):
        (workdir / name).unlink()

    def told(*args):
        signal.raise_signal(signal.SIGTERM)
        score(*args)
        raise AssertionError("it was finished first")

    monkeypatch.setattr(Evaluator, "_score", told)
    assert main_lib.main(argv) == 0
    assert "stopped at step 4 of 4" in capsys.readouterr().out
    status = json.loads((workdir / "status.json").read_text())
    assert status == {"state": "stopped", "step": 4} and _digest(workdir) == _digest(short[0])
    assert not any(name.startswith("eval/") for name in towns.metrics(workdir)[4])
    monkeypatch.undo()
    assert main_lib.main(argv) == 0
    assert "done: " in capsys.readouterr().out
    assert towns.metrics(workdir) == towns.metrics(short[0])
    read = lambda run: (run / "evaluation" / "answers.jsonl").read_text()
    assert read(workdir) == read(short[0])


@pytest.mark.slow
def test_two_processes_equal_one(tiny, short, tmp_path):
    """Bugs: a host that reads the other's rows, a loss per host, files written twice."""
    one, two = short[0], tmp_path / "two"
    script = ["bash", str(ROOT / "launch" / "local_processes.sh"), "2", "4", "--"]
    process = subprocess.run(
        [*script, f"--config={tiny}", f"--workdir={two}", *SHORT],
        cwd=ROOT,
        env=towns.environ(tmp_path / "cache"),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr
    for a, b in zip(towns.metrics(two), towns.metrics(one), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)


def _refused(capsys, *argv) -> str:
    """Runs main in this process, which has 8 devices; returns its one line."""
    started = time.monotonic()
    assert main_lib.main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and error.startswith("error: ") and "Traceback" not in error
    assert time.monotonic() - started < 10
    return error


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_what_a_user_gets_wrong(config, tmp_path, capsys):
    """Bug: a mistake found only after minutes of work, or told as a traceback."""
    workdir = f"--workdir={tmp_path / 'run'}"
    missing = _refused(capsys, f"--config={config}", workdir, "--config.data.train=no/x.jsonl")
    assert "no/x.jsonl" in missing
    batch = _refused(capsys, f"--config={config}", workdir, "--config.batch_size=9")
    assert "batch_size=9" in batch and "try 16" in batch
    (tmp_path / "run" / "checkpoints" / "100").mkdir(parents=True)
    damaged = _refused(capsys, f"--config={config}", workdir)
    assert "none of the checkpoints" in damaged and str(tmp_path / "run") in damaged


def test_a_run_that_fails_before_its_first_step_has_failed(tiny, tmp_path, capsys, monkeypatch):
    """Bug: weights that cannot be read, or a judge that is none, leave a run that "runs"."""

    def refuse(*parts):
        raise UserError("weights that are none")

    monkeypatch.setattr(assemble, "initial_state", refuse)
    workdir = tmp_path / "run"
    said = _refused(capsys, f"--config={tiny}", f"--workdir={workdir}")
    assert said == "error: weights that are none"
    assert json.loads((workdir / "status.json").read_text()) == {"state": "failed", "step": 0}


@pytest.mark.parametrize("name", ["config.json", ".given.json"])
def test_a_damaged_file_of_a_run_is_one_line(tiny, tmp_path, capsys, name):
    """Bug: a traceback for what a full disk has cut off."""
    (tmp_path / "status.json").write_text('{"state": "finished", "step": 24}')
    (tmp_path / name).write_text("{")
    said = _refused(capsys, f"--config={tiny}", f"--workdir={tmp_path}")
    assert f"{tmp_path / name} cannot be read (" in said and said.endswith("; delete it")
    (tmp_path / ".started").write_text("1.2.3\n")
    with Workdir(tmp_path) as workdir, pytest.raises(UserError, match=r"started cannot .*delete"):
        train._first_start(workdir)


@pytest.mark.parametrize("mode", ["train", "validate", "prepare"])
def test_a_source_that_trains_nothing_is_refused(tiny, tmp_path, capsys, mode):
    """Bug: a dev file, or a split "training", is named in data.train and nothing of it is read."""
    towns_file, other = tiny.parent / "towns.jsonl", tmp_path / "other.jsonl"
    shutil.copy(towns_file.with_suffix(".passages.jsonl"), tmp_path / "other.passages.jsonl")
    other.write_text(towns_file.read_text().replace('"split": "train"', '"split": "training"'))
    flags = (f"--config.data.train={towns_file},{other}", f"--mode={mode}")
    said = _refused(capsys, f"--config={tiny}", f"--workdir={tmp_path / 'run'}", *flags)
    assert "source other: no example has split 'train', only training, dev; take it out" in said


def test_a_refused_resume_changes_nothing(tiny, unbroken, tmp_path, capsys):
    """Bug: settings that do not fit the checkpoint overwrite the config or status of the run."""
    workdir = tmp_path / "run"
    shutil.copytree(unbroken, workdir)
    before = [(workdir / name).read_text() for name in ("config.json", "status.json")]
    twice = ("--config.batch_size=16", "--config.data.ctx_rows=16")
    other = _refused(capsys, f"--config={tiny}", f"--workdir={workdir}", *twice)
    assert "belongs to other data" in other
    assert [(workdir / name).read_text() for name in ("config.json", "status.json")] == before
