"""--mode=study: trains the arms of an experiment under several seeds, measures and compares them.

WORKDIR/arms/KEY/   a run as --mode=train makes it, and in measured/ what was found of it; the key
                    stands for all of the config that it depends on, so that studies share their
                    runs: what is in the files of its data, and the code, are not in it
WORKDIR/NAME/       study.json, study.md and index.html, written anew after every run

What is finished is not done again, and a run that was stopped goes on.
"""

import contextlib
import datetime
import functools
import gc
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from cosup_jax import export, mine, train
from cosup_jax.config import Config, to_dict
from cosup_jax.config_files import File
from cosup_jax.dotted import leaves, replace_dotted
from cosup_jax.errors import UserError
from cosup_jax.evaluate import digest
from cosup_jax.runtime import processes
from cosup_jax.runtime.bucket import is_url
from cosup_jax.runtime.paths import expanded
from cosup_jax.runtime.workdir import Workdir, write_atomic, writing
from cosup_jax.studies import equal_ratio, measures, page, results
from cosup_jax.studies.arms import MINED
from cosup_jax.studies.design import DIGITS, Arm, Design, of_pair, set_keys
from cosup_jax.studies.measures import MEASURES
from cosup_jax.studies.run import Run, Scores, opened

_MEASURED_BY = ("eval", "generate", "index")  # groups of the config that the measures depend on


def study(config: Config, workdir: str, file: File) -> str | None:
    """Trains and measures what is missing, writes the study; "stopped" if a run was told to stop.

    Args:
      file: where the config is from: its variants are the arms.

    Raises:
      UserError: an arm, a claim's form, a measure or a metric that is none, an override that undoes
        an arm, runs of unlike data; whatever the runs raise.
    """
    if jax.process_count() > 1:
        raise UserError("--mode=study runs in one process; start it on one host")
    if is_url(workdir):
        raise UserError(f"--mode=study needs a local directory, --workdir={workdir} is none")
    asked = Design.of(config, expanded(workdir).absolute(), file)
    with Workdir(asked.directory) as directory:
        found = _Found(asked)
        for seed in range(config.seed, config.seed + config.study.seeds):
            for name in asked.arms:
                arm = asked.arm(name, seed)
                if _trained(arm, asked) == "stopped":
                    return "stopped"
                for start, _ in asked.starts(arm):
                    found.add_start(start)
                found.add(arm)
                _write(directory, asked, found)
            found.add_matched()
            for writer, retriever in asked.crossed:
                found.add_crossed(asked.arm(writer, seed), asked.arm(retriever, seed))
            _write(directory, asked, found)
        print(page.closing(found.summary()), flush=True)
        print(f"done: {directory.path}/study.md, index.html", flush=True)
    return None


class _Found:
    """What was measured so far."""

    def __init__(self, asked: Design):
        self._asked = asked
        crossed = map("|".join, asked.crossed)
        names = (*asked.arms, *crossed, *asked.matched)
        self._scores: dict[str, list[Scores]] = {name: [] for name in names}
        self._runs: list[dict[str, Any]] = []
        self._starts: dict[Arm, dict[str, Any]] = {}
        self._data: dict[str, tuple[str, Arm]] = {}  # by sources: versions, and whose first
        self._codes: set[str] = set()  # that measured
        self._machines: set[str] = set()  # on which, where it was noted

    def add(self, arm: Arm) -> None:
        """Measures a run, or reads what was measured."""
        scores: dict[str, dict] = {}
        data = self._data_of(arm)
        with _Opened(arm) as run:
            facts = self._kept(arm, "facts", lambda: measures.facts(run()))
            for name in self._asked.measures:
                part = self._kept(arm, name, functools.partial(_measured, name, run))
                for held_out, metrics in part.items():
                    scores.setdefault(held_out, {}).update(metrics)
        self._scores[arm.name].append(scores)
        self._runs.append(self._run(arm, facts | {"data": data}))

    def add_start(self, start: Arm) -> None:
        """A run that is no arm, and that others start from or have their passages from."""
        if start.name not in self._asked.arms and start not in self._starts:
            with _Opened(start) as run:
                facts = self._kept(start, "facts", lambda: measures.facts(run()))
            self._starts[start] = self._run(start, facts | {"data": self._data_of(start)})

    def _run(self, arm: Arm, facts: Mapping[str, Any]) -> dict[str, Any]:
        place = {"arm": arm.name, "seed": arm.seed, "directory": f"arms/{arm.directory.name}"}
        return place | facts | {"command": _command(arm, self._asked)}

    def add_crossed(self, writer: Arm, retriever: Arm) -> None:
        """The answers of one run's Gen by the retrieval of another run's pair."""
        arm = writer._replace(config=of_pair(writer.config))
        by = replace_dotted(arm.config, "generate.retriever", str(retriever.directory))
        name = f"answers-by-{retriever.directory.name}"  # not by its path: that may be moved
        with _Opened(arm._replace(config=by)) as run:
            scores = self._kept(arm, name, lambda: measures.answers(run(), name))
        self._scores[f"{writer.name}|{retriever.name}"].append(scores)

    def add_matched(self) -> None:
        """Each ARM@OTHER, under the seed whose arms were added last."""
        last = lambda arm: self._scores[arm][-1]
        for name, (curve, to) in self._asked.matched.items():
            self._scores[name].append(equal_ratio.interpolated([*map(last, curve)], last(to)))

    def _kept(self, arm: Arm, name: str, measure: Callable[[], Any]) -> Any:
        kept = _kept(arm, name, measure)
        self._codes.add(kept["code"])
        if "machine" in kept:
            self._machines.add(kept["machine"])
        return kept["found"]

    def _data_of(self, arm: Arm) -> str:
        """Versions of what a run was trained on; "" if it no longer says so.

        Raises UserError if another run of the same sources was trained on other versions.
        """
        path = arm.directory / "evaluation/training.json"
        data = json.loads(path.read_text())["facts"]["data"] if path.is_file() else ""
        first, other = self._data.setdefault(arm.config.data.train, (data, arm))
        if first != data and first and data:
            raise UserError(
                f"{arm} was trained on {data}, and {other} on {first}: the files of "
                f"config.data.train have changed in between; delete {arm.directory} or "
                f"{other.directory}, whichever is older, and what else is as old"
            )
        return data

    def summary(self) -> dict[str, Any]:
        """study.json."""
        asked = self._asked
        done = {name: scores for name, scores in self._scores.items() if scores}
        known = [claim for claim in asked.claims if {claim.better, claim.other} <= set(done)]
        judged = results.claim_rows(done, known, asked.kinds)
        seeds, between = asked.config.study.seeds, asked.config.study.between_sets
        wanted = seeds * len(asked.arms)
        told = dict.fromkeys([*asked.arms, *(start.name for start in self._starts)])
        finished = all(len(scores) == seeds for scores in self._scores.values())
        return {
            "name": asked.directory.name,
            "question": asked.config.study.question,
            "state": "finished" if finished else f"{len(self._runs)} of {wanted} runs",
            "date": datetime.date.today().isoformat(),
            "command": _line(
                *asked.file, "--mode=study", f"--workdir={os.path.relpath(asked.root)}"
            ),
            "measured_by_code": sorted(self._codes),
            "measured_on": sorted(self._machines),
            "claims": judged,
            "between": results.between_rows(done, known, asked.kinds) if between else [],
            "matrix": results.matrix_rows(done, asked.writers),
            "planes": results.planes(done),
            "agreement": results.agreement_rows(done),
            "matched": {name: list(told.curve) for name, told in asked.matched.items()},
            "untested": results.untested(judged, known),
            "arms": list(self._scores),
            "settings": {name: asked.file.settings(name) for name in told},
            "measured": results.arm_rows(done, {name: asked.kinds[name] for name in asked.shown}),
            "runs": [*self._starts.values(), *self._runs],
        }


class _Opened:
    """A run that is opened when it is first asked for, and locked from then on."""

    def __init__(self, arm: Arm):
        self._arm, self._lock, self._run = arm, None, None

    def __call__(self) -> Run:
        if self._run is None:
            self._lock = Workdir(self._arm.directory, begun=True)
            self._run = opened(self._arm.config, self._arm.directory)
        return self._run

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self._lock:
            self._lock.close()
        self._run = None
        gc.collect()


def _trained(arm: Arm, asked: Design) -> str:
    """Trains what is not finished, first what it starts from."""
    for start, mark in asked.starts(arm):
        if _trained(start, asked) == "stopped":
            return "stopped"
        if mark == MINED:
            _kept(start, "hard_negatives", functools.partial(_mined, start))
        elif not (start.directory / "export").is_dir():
            whole = replace_dotted(start.config, "export.dtype", "float32")
            export.export(whole, str(start.directory))
    with Workdir(arm.directory) as directory:
        status = directory.read_status() or {}
    if status.get("state") == "finished":
        print(f"--- {arm}: finished before, {arm.directory}", flush=True)
        return "finished"
    print(f"--- {arm}: {arm.directory}", flush=True)
    started = time.monotonic()
    state = train.train(arm.config, str(arm.directory))
    jax.clear_caches()  # of programs that only this run had
    print(f"--- {arm}: {state} after {time.monotonic() - started:.0f} s", flush=True)
    return state


def _mined(start: Arm) -> None:
    for other in start.directory.glob("measured/hard_negatives-*.json"):
        other.unlink()  # by other settings, whose files these will replace
    mine.mine(start.config, str(start.directory))


def _measured(name: str, run: "_Opened") -> Scores:
    return MEASURES[name].scores(run())


def _kept(arm: Arm, name: str, measure: Callable[[], Any]) -> dict[str, Any]:
    """{"code", "machine", "found"} of `measure`, kept in the run's directory."""
    told = [pair for pair in set_keys(arm.config) if pair[0].split(".")[0] in _MEASURED_BY]
    by = digest(told)[:DIGITS]
    path = arm.directory / "measured" / f"{name}-{by}.json"
    if path.is_file():
        return json.loads(path.read_text())
    print(f"--- {arm}: measuring {name}", flush=True)
    kept = {"code": _code(), "machine": _machine(), "found": measure()}
    try:
        text = json.dumps(kept, allow_nan=False)
    except ValueError:
        raise UserError(
            f"{arm}: {name} is not finite: the run has diverged; see {arm.directory}/report.html, "
            "change the arm, or leave it out of config.study.arms"
        ) from None
    with writing(path):
        write_atomic(path, text + "\n")
    return kept


def _code() -> str:
    """The commit, as "4622cd4f9a01"; a digest of the package's files where they are no commit's."""
    git = ["git", "-C", str(Path(__file__).parent)]
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        run([*git, "ls-files", "--error-unmatch", __file__])  # the repository is not another's
        if not run([*git, "status", "--porcelain", "."]).stdout:
            return run([*git, "rev-parse", f"--short={DIGITS}", "HEAD"]).stdout.strip()
    return f"{processes.code_digest()}, no commit"


def _machine() -> str:
    """As "1 x cpu (AMD EPYC 9B14), jax 0.10.2, flax 0.12.8"."""
    kind = jax.devices()[0].device_kind
    if kind == "cpu" and (model := _processor()):
        kind = f"cpu ({model})"
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax"))
    return ", ".join([f"{jax.device_count()} x {kind}", *versions])


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _command(arm: Arm, asked: Design) -> str:
    """What trains this run by itself."""
    flags = {k: text for k, text in asked.file.overrides.items() if not k.startswith("study.")}
    for key, value in leaves(to_dict(arm.config)):
        if isinstance(value, str) and value.startswith(f"{asked.root}/"):
            flags[key] = os.path.relpath(value)
    flags["seed"] = str(arm.seed)
    place = f"--workdir=runs/again/{asked.directory.name}-{arm.name}-{arm.seed}"
    return _line(asked.file.of(arm.name), flags, place)


def _line(config: str, overrides: Mapping[str, str], *more: str) -> str:
    """A command line, quoted where a shell asks for it."""
    keys = [f"--config.{key}={text}" for key, text in overrides.items()]
    return shlex.join(["python", "-m", "cosup_jax.main", f"--config={config}", *keys, *more])


def _write(directory: Workdir, asked: Design, found: _Found) -> None:
    summary = found.summary()
    directory.write_json("study.json", summary)
    directory.write_text("study.md", page.markdown(summary))
    directory.write_text("index.html", page.page(summary))
