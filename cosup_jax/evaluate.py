"""--mode=evaluate: held-out questions answered in several ways, and scored.

WORKDIR/evaluation/SET/ARM.jsonl   every answer with its sources and scores; an arm is one way to
                                   come by passages
WORKDIR/evaluation/summary.json    means with intervals, splits, differences, hashes
WORKDIR/index/with-NAME            vectors of the sets' passages and those of eval.corpus, NAME
WORKDIR/report.html                the same as tables and plots, and answers to read

What is on disk is not answered again, unless model, config or data have changed.
"""

import collections
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from cosup_jax import assemble, encode, held_out
from cosup_jax.answer import asked
from cosup_jax.answer import pair as pair_lib
from cosup_jax.answer.answering import RECORD, Answering, bm25_rankings
from cosup_jax.answer.asked import Arm
from cosup_jax.answer.library import Library
from cosup_jax.answer.pair import Pair
from cosup_jax.answer.records import Answers, Record
from cosup_jax.assemble import Trained
from cosup_jax.config import Config, to_dict
from cosup_jax.data import tokens
from cosup_jax.data.plan import left_out
from cosup_jax.data.pooled import pooled
from cosup_jax.data.prepared import is_prepared
from cosup_jax.data.schema import Dataset
from cosup_jax.data.sources import check_corpus
from cosup_jax.errors import UserError
from cosup_jax.evaluation import scoring, summary
from cosup_jax.evaluation.nli import Judge, judge_named
from cosup_jax.generate import NO_DIFFERENCE
from cosup_jax.held_out import HeldOut
from cosup_jax.report import page, tables
from cosup_jax.runtime import processes
from cosup_jax.runtime.workdir import Workdir
from cosup_jax.wording import counted

_LABELS_READ = 10_000  # rows among which the most frequent label is sought
_DEPENDS_ON = ("seed", "gen", "ctx", "generate")  # groups of the config that answers depend on


def evaluate(config: Config, workdir: str) -> None:
    """Answers and scores what config.data.eval holds out, with the newest checkpoint.

    Raises UserError without a checkpoint of this config, or without the judge that it names.
    """
    pair_lib.check(config, config.eval.arm_names)
    check_corpus(config.eval.corpus)
    if jax.process_count() > 1:
        raise UserError("--mode=evaluate runs in one process; start it on one host")
    judge = judge_named(config.eval.judge)
    with Workdir(workdir, begun=True) as directory:
        directory.fetch("index")
        if config.generate.retriever:
            directory.fetch(pair_lib.PLACE)
        trained = assemble.trained(config, directory.path)
        among = f", {config.eval.corpus} searched too" if config.eval.corpus else ""
        print(f"step {trained.step}: answering held-out questions{among}", flush=True)
        found = Evaluation(trained, judge, directory.path).summary()
        directory.write_json("evaluation/summary.json", found)
        run = page.read_run(directory.path, trained.config.generate.examples)
        page.write_report(directory.path / "report.html", run)
        print(tables.answers_table(found), flush=True)
        print(f"done: {directory.path / 'report.html'}", flush=True)


class Evaluation:
    """One checkpoint, asked every held-out set."""

    def __init__(self, trained: Trained, judge: Judge, workdir: Path, folder: str = "evaluation"):
        """`folder`: of the workdir, for the answers."""
        self._trained, self._judge, self._workdir = trained, judge, workdir
        self._answers_to = workdir / folder
        self._prefix = getattr(judge, "prefix", "")
        self._code = processes.code_digest()
        self._libraries: dict[str, Library] = {}  # by the version of the source
        self._sources, self._shelf = _with_corpus(trained, workdir)
        own = (dataset.version for dataset in trained.data.held_out)
        self._own = dict(zip((dataset.version for dataset in self._sources), own, strict=True))
        self._pair = Pair.of(trained, workdir)
        self._answering = Answering(
            trained.mesh, trained.towers, trained.config, trained.tokenizers.gen
        )

    def summary(self) -> dict[str, Any]:
        """All that is measured, as evaluation/summary.json has it."""
        trained = self._trained
        config, directory = trained.config, self._workdir / "data"
        train = tokens.tokenize(trained.data.train, *trained.tokenizers, config, directory)
        sets = held_out.asked_sets(
            *(self._sources, trained.tokenizers, config, directory, train),
            left_out(train, config),
        )
        parts = []
        for part in sets:
            started = time.perf_counter()
            parts.append(self._set(part))
            took = f"{len(parts[-1]['arms'])} arms in {time.perf_counter() - started:.0f} s"
            print(
                f"{part.name}: {counted(len(part.examples), 'question')}, {took}", file=sys.stderr
            )
        return {
            "step": trained.step,
            "judge": {
                **{"name": config.eval.judge, "prefix": self._prefix},
                "cut": getattr(self._judge, "cut", 0),  # pairs, of those that it judged here
            },
            "domains": self._domains(parts),
            "sets": parts,
            "hashes": {
                "code": self._code,
                "config": digest(to_dict(config)),
                "weights": trained.contract.weights,
                "data": {part.name: part.dataset.version for part in sets},
                "index": {part.name: self._library(part).version for part in sets},
                **({"retriever": self._pair.contract.weights} if self._pair else {}),
            },
            "contract": trained.contract.to_dict(),
        }

    def _set(self, part: HeldOut) -> dict[str, Any]:
        """One set: its facts, its arms, and what needs no model for comparison."""
        seed, trains_on = self._trained.config.seed, self._trained.data.train
        facts = [asked.about(part, question) for question in range(len(part.examples))]
        correct = scoring.judged_by(part.split_sample())
        answers = self._answers(part, facts, correct)
        by_own = "corpus" in answers and not self._pair
        trained = answers["corpus"][1] if by_own else []
        seen = [fact["seen"] for fact in facts if fact["seen"] is not None]
        return {
            "name": part.name,
            "questions": len(facts),
            "passages": len(part.corpus),
            "in_domain": any(self._own[part.dataset.version] == d.version for d, _ in trains_on),
            "evidence_seen": float(np.mean(seen)) if seen else None,
            "correct": correct,
            "arms": [
                {
                    "arm": arm.name,
                    "label": arm.label,
                    "passages": arm.passages,
                    "subset": arm.subset,
                    "run": self._run(part, arm),
                    "answered_by_code": sorted({record["code"] for record in records}),
                    "scores": summary.means(records, seed),
                    "splits": summary.splits(records, seed),
                    "minus_trained": summary.differences(
                        records, [] if arm.name == "corpus" else trained, seed
                    ),
                }
                for arm, records in answers.values()
            ],
            "references": self._references(part, facts),
        }

    def _answers(
        self, part: HeldOut, facts: Sequence[Record], correct: str
    ) -> dict[str, tuple[Arm, list[Record]]]:
        """Of each arm its answers, scored, in the order of the questions."""
        params, library, found = self._trained.params, self._library(part), {}
        for arm in asked.arms(part, lambda: library.bm25, self._trained.config):
            path = self._answers_to / part.name / f"{arm.name}.jsonl"
            bm25 = library.bm25 if arm.name == "bm25" else None
            with Answers(path, self._run(part, arm), like=RECORD | {"code": ""}) as answers:
                todo = [i for i, fact in enumerate(facts) if fact["id"] not in answers.known]
                shown = {"desc": f"{part.name} {arm.name}", "unit": " questions", "leave": False}
                bar = tqdm(total=len(facts), initial=len(facts) - len(todo), disable=None, **shown)
                with bar:
                    vectors, queries = self._searched(part, arm)
                    asks = (params, part, todo, arm, vectors, bm25, queries)
                    for record in self._answering.answers(*asks):
                        answers.add(record | {"code": self._code})
                        bar.update()
                found[arm.name] = arm, self._scored(part, answers, facts, correct)
        return found

    def _scored(
        self, part: HeldOut, answers: Answers, facts: Sequence[Record], correct: str
    ) -> list[Record]:
        """The answers with what is asked of them and their scores, which are kept too."""
        version = getattr(self._judge, "version", "")
        by = [self._trained.config.eval.judge, version, self._code]
        records = [answers.known[fact["id"]] | fact for fact in facts]
        done = lambda r: r.get("scored_by") == by and isinstance(r.get("scores"), dict)
        new = [record for record in records if not done(record)]
        found = scoring.scored(new, self._judge, part.dataset.passages)
        scores = dict(zip((r["id"] for r in new), found, strict=True))
        added = {}
        for record in records:
            found = scores.get(record["id"]) or record["scores"]
            right = found.get(correct)  # None: nothing says what is right
            added[record["id"]] = {"scores": found, "correct": right, "scored_by": by}
        extra = {fact["id"]: fact | added[fact["id"]] for fact in facts}
        return answers.finish([fact["id"] for fact in facts], extra)

    def _references(self, part: HeldOut, facts: Sequence[Record]) -> list[dict[str, Any]]:
        """The most frequent label, where answers are labels, and BM25 of the bare question."""
        seed, found = self._trained.config.seed, []
        if all(fact["kind"] == "label" and fact["answers"] for fact in facts):
            label, records = majority(part, facts)
            found.append((label, None, records))
        if any(fact["evidence"] for fact in facts):
            asked_for = [fact for fact in facts if fact["evidence"]]
            ranked = bm25_rankings(part, asked_for, self._library(part).bm25)
            scores = lambda record: scoring.retrieval_scores(record, part.dataset.passages)
            records = [{**record, "scores": scores(record)} for record in ranked]
            found.append(("BM25 alone, the question", len(part.corpus), records))
        return [
            {"label": label, "passages": passages, "scores": summary.means(records, seed)}
            for label, passages, records in found
        ]

    def _domains(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Trained retrieval on sets whose source training reads, and on others: means over sets."""
        found = {}
        metrics = ["correct", "retrieval_hit", f"{self._prefix}citation_rec"]
        for name, inside in (("in-domain", True), ("out-of-domain", False)):
            scores = {}
            for part in (part for part in parts if part["in_domain"] is inside):
                for arm in part["arms"]:
                    if arm["arm"] == "corpus" and part["correct"] in arm["scores"]:
                        own = {"correct": arm["scores"][part["correct"]]}
                        scores[part["name"]] = arm["scores"] | own
            if scores:
                means = summary.macro(list(scores.values()), metrics)
                found[name] = {"sets": list(scores), "scores": means}
        return found

    def _library(self, part: HeldOut) -> Library:
        """The passages of a set and their vectors, encoded once for all sets of a source."""
        version = part.dataset.version
        if version not in self._libraries:
            place = Path("index", self._shelf)
            made = encode.index(part.dataset, self._trained, self._workdir, place)
            self._libraries[version] = Library([(part.dataset, *made)])
        return self._libraries[version]

    def _searched(self, part: HeldOut, arm: Arm) -> tuple[Any, Callable | None]:
        """Vectors of a set's passages, and another pair's queries, where that retrieves."""
        if self._pair and arm.by_query:
            vectors = self._pair.vectors(part.dataset, part.corpus, self._shelf)
            return vectors, self._pair.queries
        return self._library(part).vectors, None

    def _run(self, part: HeldOut, arm: Arm) -> str:
        """A digest of all that an arm's answers depend on, the questions aside."""
        config = to_dict(self._trained.config)
        for name in NO_DIFFERENCE:
            del config["generate"][name]
        rows = None if arm.rows is None else hashlib.sha256(arm.rows.tobytes()).hexdigest()
        told = [self._trained.contract.to_dict(), {name: config[name] for name in _DEPENDS_ON}]
        told += [self._library(part).version, part.name, part.dataset.version, arm.name, rows]
        told += [self._pair.decides] if self._pair and arm.by_query else []
        return digest(told)[:16]


def _with_corpus(trained: Trained, workdir: Path) -> tuple[list[Dataset], str]:
    """What is held out, eval.corpus behind its passages, and the directory for their vectors below
    that of the own ones."""
    found, where = trained.data.held_out, trained.config.eval.corpus
    if not where:
        return found, ""
    for dataset in found:
        if is_prepared(dataset):
            raise UserError(
                f"config.eval.corpus={where} cannot join {dataset.name}, which was prepared and "
                "brings its tokens; name what it was prepared from in config.data.eval"
            )
    corpus = encode.without_questions(where, trained.config, workdir)
    return [pooled(dataset, corpus) for dataset in found], f"with-{corpus.name}"


def majority(part: HeldOut, facts: Sequence[Record]) -> tuple[str, list[Record]]:
    """What it would be to say one thing to all questions: its name, and records with scores.

    That is the most frequent first answer of the set's training rows, or of its own without any.

    Args:
      facts: of the questions, some of them with answers, as `asked.about` has them.
    """
    train = part.dataset.splits.get("train", ())
    examples = [part.dataset.examples[row] for row in train[:: len(train) // _LABELS_READ + 1]]
    first = lambda examples: collections.Counter(e.answers[0] for e in examples if e.answers)
    labels = first(examples)
    where = "most frequent in training" if labels else "most frequent here"
    known = labels or first(part.split_sample()) or first(part.examples)
    ((label, _),) = known.most_common(1)
    said = {"answer": label, "text": label, "output": label}
    records = [{**fact, "scores": scoring.answer_scores(fact | said)} for fact in facts]
    return f"{label!r}, {where}", records


def digest(value: Any) -> str:
    """Of what JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
