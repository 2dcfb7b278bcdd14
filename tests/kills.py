"""Runs that die or are told to stop at a named place, for test_survival. Nothing in the product
knows of it.

`python tests/kills.py` reads a JSON task from each line of its input, runs it in a fork of itself
as `python -m cosup_jax.main` would, and answers with a JSON line. The forks share what takes long
to import; no device is touched before they part.
"""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

LITTER = re.compile(r"\.part\b|\.orbax-checkpoint-tmp\b")  # names of what is not finished


def _die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _tell(*_) -> None:
    signal.raise_signal(signal.SIGTERM)


def _tell_all(*_) -> None:
    """Until the others, which wait for us in this batch, have heard of it."""
    _tell()
    time.sleep(3)


def _at_event(event: str, where: str, call: int = 1, do: Callable = _die) -> None:
    """Calls `do` before the `call`-th system call that Python reports as such an event."""
    left = call

    def hook(name, args):
        nonlocal left
        if re.fullmatch(event, name) and re.search(where, repr(args)):
            left -= 1
            if left == 0:
                do()

    sys.addaudithook(hook)


def _at_call(owner, name: str, call: int, do: Callable, after: bool = False) -> None:
    """Calls `do` with the arguments of the `call`-th call of owner.name, before or after it."""
    original, left = getattr(owner, name), call

    def counted(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0 and not after:
            do(*args)
        result = original(*args, **kwargs)
        if left == 0 and after:
            do(*args)
        return result

    setattr(owner, name, counted)


def _in_a_step(call: int) -> None:
    """Dies once the `call`-th step is queued, while it may run."""
    from cosup_jax import step

    compile_step = step.compile_step

    def compiled(*args, **kwargs):
        found = {"step": compile_step(*args, **kwargs)}
        _at_call(_Items(found), "step", call, _die, after=True)
        return found["step"]

    step.compile_step = compiled


class _Items:
    """Attributes instead of keys."""

    def __init__(self, items):
        self.__dict__ = items


def _half_a_metric_line(call: int) -> None:
    from cosup_jax.runtime.telemetry import Recorder

    def tear(recorder):
        recorder._file.write('{"step": 3, "loss/tot')
        recorder._file.flush()
        _die()

    _at_call(Recorder, "_write_pending", call, tear)


def _half_an_answer(call: int) -> None:
    from cosup_jax.answer.records import Answers

    def tear(answers, record):
        answers._file.write(json.dumps(record)[:40])
        answers._file.flush()
        _die()

    _at_call(Answers, "add", call, tear)


def _half_the_vectors(call: int) -> None:
    from cosup_jax.search import vectors

    def tear(path, values, dtype):
        Path(path).write_bytes(values.tobytes()[: values.nbytes // 2])
        _die()

    _at_call(vectors, "write_array", call, tear)


def _at_save(call: int, after: bool) -> None:
    from cosup_jax.checkpoint import Checkpointer

    _at_call(Checkpointer, "save", call, _die, after)


def _at_encoder(call: int, do: Callable = _die) -> None:
    from cosup_jax.search.encoder import Encoder

    _at_call(Encoder, "corpus", call, do)


def _at_held_out(call: int, do: Callable = _die) -> None:
    from cosup_jax.held_out import Evaluator

    _at_call(Evaluator, "_score", call, do)


def _at_answer(call: int, do: Callable) -> None:
    from cosup_jax.answer.decode import Decoder

    _at_call(Decoder, "_read", call, do)


_MOVED = "os.rename"
FAULTS = {  # phase: {where: how}; of a mode each
    "step": {
        "step queued": lambda: _in_a_step(3),
        "half a metric line": lambda: _half_a_metric_line(2),
        "metrics of steps that are not saved": lambda: _at_save(2, after=False),
        "before the metrics are cut back": lambda: _at_event(_MOVED, r"metrics\.jsonl'"),
        "before the status is there": lambda: _at_event(_MOVED, r"status\.json'", 2),
        "held-out questions": lambda: _at_held_out(1),
    },
    "checkpoint": {
        "save begun": lambda: _at_save(1, after=True),
        "arrays half written": lambda: _at_event("open", r"array_metadatas/process_0', 'w", 2),
        "before the tree is there": lambda: _at_event(_MOVED, r"/state', -1", 1),
        "before the checkpoint is there": lambda: _at_event(_MOVED, r"checkpoints/\d+', -1", 2),
        "before the oldest goes": lambda: _at_event("shutil.rmtree", r"checkpoints/\d+'"),
        "the oldest is half gone": lambda: _at_event("os.rmdir", r"checkpoints/\d+'"),
    },
    "encode": {
        "half the vectors": lambda: _half_the_vectors(1),
        "ids half written": lambda: _at_event("open", r"\.part/ids_offsets", 2),
        "before a shard is there": lambda: _at_event(_MOVED, r"index/\w+/\w+-\d+', -1"),
        "between two shards": lambda: _at_encoder(2),
        "before the manifest is there": lambda: _at_event(_MOVED, r"manifest\.json'"),
    },
    "evaluation": {
        "half an answer": lambda: _half_an_answer(7),
        "before an arm's scores are there": lambda: _at_event(_MOVED, r"evaluation/.*\.jsonl'", 2),
        "before the summary is there": lambda: _at_event(_MOVED, r"summary\.json'"),
        "before the report is there": lambda: _at_event(_MOVED, r"report\.html'"),
    },
}
NOTICES = {  # told to stop while that runs
    "vectors": lambda: _at_encoder(2, _tell),
    "held-out questions": lambda: _at_held_out(2, _tell),
    "held-out questions, in one of several processes": lambda: _at_held_out(1, _tell_all),
    "the last questions": lambda: _at_held_out(7, _tell),
    "an answer": lambda: _at_answer(2, _tell),
    "a file": lambda: _at_event(_MOVED, r"mined/.*\.jsonl'", 2, _tell),
}
MODES = {"step": "train", "checkpoint": "train", "encode": "encode", "evaluation": "evaluate"}


def _watch_litter(workdir: Path, log: Path) -> None:
    """Notes every file that a dead run left unfinished and that this one opens to read."""
    files = [path for path in workdir.rglob("*") if LITTER.search(str(path)) and path.is_file()]
    left = {str(path): path.stat().st_mtime_ns for path in files}

    def hook(name, args):
        if name == "open" and str(args[0]) in left and os.path.isfile(args[0]):
            to_read = not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            # By now it may be a file of this run, under the same name.
            if to_read and os.stat(args[0]).st_mtime_ns == left[str(args[0])]:
                os.write(descriptor, f"{args[0]}\n".encode())

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.addaudithook(hook)


def _run(task: dict) -> None:
    """In the fork. Leaves by the product's own exit, or not at all."""
    log = Path(task["log"])
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    import jax

    jax.config.update("jax_num_cpu_devices", task["devices"])
    from cosup_jax import main

    if task["file_bytes"]:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (task["file_bytes"], resource.RLIM_INFINITY))
    _watch_litter(Path(task["workdir"]), log.with_suffix(".litter"))
    if task["fault"]:
        phase, where = task["fault"]
        {**FAULTS, "notice": NOTICES}[phase][where]()
    if task["event"]:  # the n-th of all that it does to files of the workdir
        _at_event(r"open|os\..*", re.escape(task["workdir"]), task["event"])
    sys.argv = ["main", f"--workdir={task['workdir']}", *task["argv"]]
    main._run_and_exit()


def serve() -> None:
    """Until the input ends."""
    import cosup_jax.assemble
    import cosup_jax.checkpoint
    import cosup_jax.main
    import cosup_jax.report.plots
    import cosup_jax.runtime.telemetry  # noqa: F401

    for line in sys.stdin:
        task = json.loads(line)
        pid = os.fork()
        if pid == 0:
            return _run(task)
        clock, cpu_s = (~pid << 3) | 2, 0.0  # as clock_getcpuclockid(3) makes it
        while True:
            done, status, used = os.wait4(pid, os.WNOHANG)
            if done:
                break
            cpu_s = time.clock_gettime(clock)
            if task["cpu_s"] and cpu_s > task["cpu_s"]:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        cpu_s = used.ru_utime + used.ru_stime
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps({"code": code, "cpu_s": cpu_s}), flush=True)


if __name__ == "__main__":
    serve()
