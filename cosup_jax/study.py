"""--mode=study: trains the arms of an experiment under several seeds, measures and compares them.

WORKDIR/arms/KEY/   a run as --mode=train makes it, and in measured/ what was found of it; the key
                    stands for all that it depends on, so that studies share their runs
WORKDIR/NAME/       study.json, study.md and index.html, written anew after every run

What is finished is not done again, and a run that was stopped goes on.
"""

import datetime
import functools
import gc
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from cosup_jax import export, train
from cosup_jax.config import Config, StudyConfig, to_dict
from cosup_jax.config_files import File
from cosup_jax.dotted import leaves, replace_dotted
from cosup_jax.errors import UserError
from cosup_jax.runtime import processes
from cosup_jax.runtime.workdir import Workdir, write_atomic, writing
from cosup_jax.studies import measures, page, results
from cosup_jax.studies.arms import START
from cosup_jax.studies.measures import MEASURES
from cosup_jax.studies.results import Scores
from cosup_jax.studies.run import Run, opened

# Groups of the config that a trained model does not depend on.
_ASIDE = ("checkpoint", "eval", "export", "generate", "index", "log", "study")


class Arm(NamedTuple):
    """One run: an arm under one seed."""

    name: str
    seed: int
    config: Config
    directory: Path

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"


def study(config: Config, workdir: str, file: File) -> str | None:
    """Trains and measures what is missing, writes the study; "stopped" if a run was told to stop.

    Args:
      file: where the config is from: its variants are the arms.

    Raises:
      UserError: an arm, a metric's form or a measure that is none; whatever the runs raise.
    """
    if jax.process_count() > 1:
        raise UserError("--mode=study runs in one process; start it on one host")
    asked = _Asked.of(config, Path(workdir).absolute(), file)
    with Workdir(asked.directory) as directory:
        found = _Found(asked)
        for seed in range(config.seed, config.seed + config.study.seeds):
            for name in asked.arms:
                arm = asked.arm(name, seed)
                if _trained(arm, asked) == "stopped":
                    return "stopped"
                found.add(arm)
                _write(directory, asked, found)
            for writer, retriever in asked.crossed:
                found.add_crossed(asked.arm(writer, seed), asked.arm(retriever, seed))
            _write(directory, asked, found)
        print(page.closing(found.summary()), flush=True)
        print(f"done: {directory.path}/study.md, index.html", flush=True)
    return None


class _Asked(NamedTuple):
    """What the config asks for, checked."""

    config: Config
    file: File
    root: Path
    directory: Path
    arms: list[str]
    crossed: list[tuple[str, str]]
    measures: list[str]
    shown: list[str]
    claims: list[results.Claim]

    @classmethod
    def of(cls, config: Config, root: Path, file: File) -> "_Asked":
        """Raises UserError."""
        told = config.study
        arms = _names(told.arms)
        if not arms:
            raise UserError(
                f"{file.path_and_variant} names no arms in config.study.arms; the studies are in "
                "configs/studies"
            )
        for name in arms:
            file.variant(name)
        crossed = [tuple(pair.split("|")) for pair in _names(told.crossed)]
        for pair in crossed:
            if len(pair) != 2 or not set(pair) <= set(arms):
                raise UserError(f"config.study.crossed: {'|'.join(pair)!r} is no ARM|ARM of {arms}")
        asked = _names(told.measures)
        for name in asked:
            if name not in MEASURES:
                raise UserError(f"config.study.measures: {name!r} is none of {', '.join(MEASURES)}")
        claims = results.claims_of(told.claims, [*arms, *map("|".join, crossed)])
        shown = _names(told.shown) or list(dict.fromkeys(claim.metric for claim in claims))
        directory = root / file.name
        return cls(config, file, root, directory, arms, crossed, asked, shown, claims)

    def arm(self, name: str, seed: int) -> Arm:
        """One run. Raises UserError for a variant that the file does not have."""
        config = self.file.variant(name)
        config = replace_dotted(replace_dotted(config, "seed", seed), "study", StudyConfig())
        key = config
        for tower in ("gen", "ctx"):
            init = getattr(config, tower).init
            if init.startswith(START):
                start = self.arm(init.removeprefix(START), self.config.seed)  # one for all seeds
                path = start.directory / "export" / "gen"
                config = replace_dotted(config, f"{tower}.init", str(path))
                key = replace_dotted(key, f"{tower}.init", START + start.directory.name)
        return Arm(name, seed, config, self.root / "arms" / _key(key))

    def starts(self, arm: Arm) -> Iterator[Arm]:
        """The runs that an arm's towers come from."""
        config = self.file.variant(arm.name)
        for init in dict.fromkeys((config.gen.init, config.ctx.init)):
            if init.startswith(START):
                yield self.arm(init.removeprefix(START), self.config.seed)


class _Found:
    """What was measured so far."""

    def __init__(self, asked: _Asked):
        self._asked = asked
        crossed = map("|".join, asked.crossed)
        self._scores: dict[str, list[Scores]] = {name: [] for name in (*asked.arms, *crossed)}
        self._runs: list[dict[str, Any]] = []

    def add(self, arm: Arm) -> None:
        """Measures a run, or reads what was measured."""
        scores: dict[str, dict] = {}
        with _Opened(arm) as run:
            facts = _kept(arm, "facts", lambda: measures.facts(run()))
            for name in self._asked.measures:
                part = _kept(arm, name, functools.partial(_measured, name, run))
                for held_out, metrics in part.items():
                    scores.setdefault(held_out, {}).update(metrics)
        self._scores[arm.name].append(scores)
        place = {"arm": arm.name, "seed": arm.seed, "directory": f"arms/{arm.directory.name}"}
        self._runs.append(place | facts | {"command": _command(arm, self._asked)})

    def add_crossed(self, writer: Arm, retriever: Arm) -> None:
        """The answers of one run's Gen by the retrieval of another run's pair."""
        by = replace_dotted(writer.config, "generate.retriever", str(retriever.directory))
        arm = writer._replace(config=replace_dotted(by, "eval.arms", "corpus"))
        name = f"answers-by-{retriever.directory.name}"
        with _Opened(arm) as run:
            scores = _kept(arm, name, lambda: measures.answers(run(), name))
        self._scores[f"{writer.name}|{retriever.name}"].append(scores)

    def summary(self) -> dict[str, Any]:
        """study.json."""
        asked = self._asked
        done = {name: scores for name, scores in self._scores.items() if scores}
        known = [claim for claim in asked.claims if {claim.better, claim.other} <= set(done)]
        wanted = asked.config.study.seeds * len(asked.arms)
        device = jax.devices()[0]
        versions = (f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax"))
        return {
            "name": asked.file.name,
            "question": asked.config.study.question,
            "state": "finished" if len(self._runs) == wanted else f"of {wanted} runs",
            "date": datetime.date.today().isoformat(),
            "hardware": f"{jax.device_count()} x {device.device_kind}",
            "versions": ", ".join(versions),
            "code": processes.code_digest(),
            "claims": results.claim_rows(done, known),
            "measured": results.arm_rows(done, asked.shown),
            "runs": self._runs,
        }


class _Opened:
    """A run that is opened when it is first asked for, and locked until then on."""

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


def _trained(arm: Arm, asked: _Asked) -> str:
    """Trains what is not finished, first what it starts from."""
    for start in asked.starts(arm):
        if _trained(start, asked) == "stopped":
            return "stopped"
        if not (start.directory / "export").is_dir():
            export.export(start.config, str(start.directory))
    with Workdir(arm.directory) as directory:
        status = directory.read_status() or {}
    if status.get("state") == "finished":
        return "finished"
    print(f"--- {arm}: {arm.directory}", flush=True)
    started = time.monotonic()
    state = train.train(arm.config, str(arm.directory))
    jax.clear_caches()  # of programs that only this run had
    print(f"--- {arm}: {state} after {time.monotonic() - started:.0f} s", flush=True)
    return state


def _measured(name: str, run: "_Opened") -> Scores:
    return MEASURES[name](run())


def _kept(arm: Arm, name: str, measure: Callable[[], Any]) -> Any:
    """What is found by `measure`, kept in the run's directory."""
    by = _digest([pair for pair in _set(arm.config) if pair[0].startswith(("eval.", "generate."))])
    path = arm.directory / "measured" / f"{name}-{by}.json"
    if path.is_file():
        return json.loads(path.read_text())["found"]
    print(f"--- {arm}: measuring {name}", flush=True)
    kept = {"code": processes.code_digest(), "found": measure()}
    with writing(path):
        write_atomic(path, json.dumps(kept, allow_nan=False) + "\n")
    return kept["found"]


def _command(arm: Arm, asked: _Asked) -> str:
    """What trains this run by itself."""
    flags = [f"--config={asked.file.of(arm.name)}", *asked.file.flags()]
    for tower in ("gen", "ctx"):
        init = getattr(arm.config, tower).init
        if init.startswith(str(asked.root)):
            flags.append(f"--config.{tower}.init={init}")
    flags += [f"--config.seed={arm.seed}", "--workdir=runs/again"]
    return " ".join(["python -m cosup_jax.main", *flags])


def _key(config: Config) -> str:
    """Of all that training depends on."""
    return _digest([pair for pair in _set(config) if pair[0].split(".")[0] not in _ASIDE])


def _set(config: Config) -> list[tuple[str, Any]]:
    """The keys that are not as by default: those that later versions add change no digest."""
    default = dict(leaves(to_dict(Config())))
    return [(key, value) for key, value in leaves(to_dict(config)) if value != default[key]]


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _write(directory: Workdir, asked: _Asked, found: _Found) -> None:
    summary = found.summary()
    directory.write_json("study.json", summary)
    directory.write_text("study.md", page.markdown(summary))
    directory.write_text("index.html", page.page(summary))
