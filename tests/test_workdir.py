"""The run's directory: locked, and never half-written."""

import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest

from cosup_jax.config import make
from cosup_jax.errors import UserError
from cosup_jax.freeze import freeze
from cosup_jax.runtime import processes
from cosup_jax.runtime import workdir as workdir_lib
from cosup_jax.runtime.workdir import Workdir, write_atomic

HOLD = """
import sys, time
from cosup_jax.runtime.workdir import Workdir
Workdir(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def test_second_run_is_refused_and_death_frees_the_lock(tmp_path):
    """Bug: two runs write one workdir, or a kill -9 leaves it locked for ever."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by another run, process {holder.pid};"):
            Workdir(tmp_path)
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    Workdir(tmp_path).close()


def _child(ready, done):
    ready.set()
    done.wait(60)


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_forked_worker_does_not_keep_the_lock(tmp_path):
    """Bug: a data worker forked from a dead run keeps the lock, so the run cannot restart."""
    fork = multiprocessing.get_context("fork")
    ready, done = fork.Event(), fork.Event()
    workdir = Workdir(tmp_path)
    worker = fork.Process(target=_child, args=(ready, done))
    worker.start()
    try:
        assert ready.wait(60)
        workdir.close()
        Workdir(tmp_path).close()
    finally:
        done.set()
        worker.join()


def test_status_survives_and_is_checked(tmp_path):
    """Bug: launch wrappers read a status that was never written, or a state they do not know."""
    with Workdir(tmp_path / "a" / "b") as workdir:
        assert workdir.read_status() is None
        workdir.status("stopped", 7)
        assert workdir.read_status() == {"state": "stopped", "step": 7}
        with pytest.raises(ValueError):
            workdir.status("sleeping", 7)
        workdir.write_text("status.json", "{")
        with pytest.raises(UserError, match="delete it"):
            workdir.read_status()


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    """Bug: a crash while writing leaves half a file, or litter beside it."""
    path = tmp_path / "config.json"
    write_atomic(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["config.json"]


def test_unwritable_place_is_one_clear_line(tmp_path):
    """Bug: a workdir below a file, or a full disk, ends in a traceback."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/run: .*check the path"):
        Workdir(tmp_path / "file" / "run")
    with Workdir(tmp_path) as workdir, pytest.raises(UserError, match="cannot write"):
        workdir.write_json("file/config.json", {})


def test_a_file_is_no_workdir(tmp_path):
    """Bug: "File exists", as if it should be deleted."""
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"/README\.md is a file; give a directory"):
        Workdir(tmp_path / "README.md")
    with pytest.raises(UserError, match="~nobody-here/run: Could not determine home"):
        Workdir("~nobody-here/run")


@pytest.mark.parametrize("mode", ["encode", "evaluate", "export", "generate", "mine"])
def test_a_mode_that_needs_a_checkpoint_makes_no_workdir(mode, tmp_path):
    """Bug: a misspelt --workdir is made, and left empty."""
    where = tmp_path / "run"
    run = getattr(importlib.import_module(f"cosup_jax.{mode}"), mode)
    with pytest.raises(UserError, match="run holds no checkpoint; train first"):
        run(freeze(make({"num_steps": 1}, {})), str(where))
    assert not where.exists()


def test_only_process_0_writes(tmp_path, monkeypatch):
    """Bug: the other processes of a pod fight for the lock, or write the files again."""
    with Workdir(tmp_path) as first:
        first.write_json("config.json", {"seed": 1})
        monkeypatch.setattr("jax.process_index", lambda: 1)
        with Workdir(tmp_path) as second:
            second.write_json("config.json", {"seed": 2})
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 1}


def test_a_directory_that_is_not_shared_is_told(tmp_path, monkeypatch):
    """Bug: a traceback of a process that lacks the directory which process 0 has made."""
    monkeypatch.setattr(workdir_lib, "APPEARS_S", 0.3)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.process_index", lambda: 1)
    monkeypatch.setattr(processes, "broadcast", lambda *_: "token")

    def agree(what, shown):
        raise UserError(f"{what}: {shown}")

    monkeypatch.setattr(processes, "agree", agree)
    with pytest.raises(UserError, match=r"not seen in .*lost, which all must share"):
        Workdir(tmp_path / "lost")


def test_what_killed_runs_left_half_written_is_cleared_everywhere(tmp_path):
    """Bug: half-written answers or vectors that pile up, or are read one day."""
    left = [tmp_path / p for p in (".a.1.part", "evaluation/x/.b.2.part", "index/3/.c.4.part")]
    left += [tmp_path / p for p in ("tokenizer/k/.d.5.part", "index/3/shard-0/.e.6.part")]
    left += [tmp_path / p for p in ("measured/.f.7.part", "answers-by-k/set/.g.8.part")]
    left += [tmp_path / p for p in ("mined/.h.9.part", "prepared/x/.i.1.part", "answers/.j.2.part")]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with Workdir(tmp_path):
        assert not [path for path in left if path.exists()]


@pytest.mark.parametrize("text", ["[]", '{"state": "running"}'])
def test_a_status_of_another_kind_is_told(tmp_path, text):
    """Bug: a KeyError of ours where somebody's file has the name of our status."""
    (tmp_path / "status.json").write_text(text)
    with Workdir(tmp_path) as workdir, pytest.raises(UserError, match="no state and step"):
        workdir.read_status()
