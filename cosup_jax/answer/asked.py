"""What an evaluation asks of a set: its questions, in several arms."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cosup_jax.config import ARMS, BY_QUERY, Config
from cosup_jax.data import markup
from cosup_jax.evaluation import scoring
from cosup_jax.evaluation.baselines import BM25
from cosup_jax.held_out import HeldOut

HARD = "corpus_hard_"  # before the size: the corpus is filled with what resembles the questions


class Arm(NamedTuple):
    """One way to come by passages, the same for all questions of a set."""

    name: str
    label: str
    passages: int | None  # searched; None where none are
    rows: np.ndarray | None = None  # of the corpus, where not all of it is searched

    @property
    def subset(self) -> bool:
        """Whether a part of the corpus is searched."""
        return self.rows is not None

    @property
    def by_query(self) -> bool:
        """Whether Gen's query decides, or that of the pair which retrieves instead."""
        return self.subset or self.name in BY_QUERY


def arms(held_out: HeldOut, indexed: Callable[[], BM25], config: Config) -> list[Arm]:
    """Those that config.eval names and the set allows, each size of the corpus behind the whole.

    `indexed`: the set's corpus, by row; not called where no arm needs it.
    """
    drawn = np.random.default_rng(config.eval.seed).permutation
    hard = functools.partial(hardest, held_out, indexed)
    passages, found = len(held_out.corpus), []
    for name in config.eval.arm_names:
        if name == "candidates" and not all(e.candidates for e in held_out.examples):
            continue
        if name in ("gold", "wrong") and not any(e.evidence for e in held_out.examples):
            continue
        searched = passages if name in ("corpus", "bm25") else None
        label = _label(name, config)
        found.append(Arm(name, label, searched))
        if name == "corpus":
            for rows in subsets(held_out, config.eval.sizes, drawn):
                found.append(Arm(f"corpus_{len(rows)}", label, len(rows), rows))
            for rows in subsets(held_out, config.eval.hard_sizes, hard):
                found.append(Arm(f"{HARD}{len(rows)}", f"{label}, hard passages", len(rows), rows))
    return found


def _label(name: str, config: Config) -> str:
    retriever = config.generate.retriever
    if not retriever or name not in BY_QUERY:
        return ARMS[name]
    return f"retrieval by {retriever}" if name == "corpus" else f"{ARMS[name]}, by {retriever}"


def subsets(
    held_out: HeldOut, sizes: Sequence[int], ordered: Callable[[np.ndarray], np.ndarray]
) -> list[np.ndarray]:
    """Rows of the corpus, ascending, of each size below the whole; every one holds the smaller.

    All hold the evidence of all questions, which may make one larger than asked; the rest comes in
    the order that `ordered` brings it in. Sizes that come to the same rows are one.
    """
    total = len(held_out.corpus)
    evidence = [held_out.evidence(question) for question in range(len(held_out.examples))]
    gold = np.unique(np.array([row for rows in evidence for row in rows], np.int64))
    counts = [n for n in dict.fromkeys(max(size, len(gold)) for size in sizes) if 0 < n < total]
    if not counts:
        return []
    order = np.concatenate([gold, ordered(np.setdiff1d(np.arange(total), gold))])
    return [np.sort(order[:count]) for count in counts]


def hardest(held_out: HeldOut, indexed: Callable[[], BM25], rows: np.ndarray) -> np.ndarray:
    """The same rows of the corpus, by the best rank that any question has for them under BM25."""
    bm25, best = indexed(), np.full(len(rows), len(rows))
    for example in held_out.examples:
        order = np.argsort(-bm25.scores(example.question)[rows], kind="stable")
        best[order] = np.minimum(best[order], np.arange(len(rows)))
    return rows[np.argsort(best, kind="stable")]


def about(held_out: HeldOut, question: int) -> dict[str, Any]:
    """What a question's answers are scored by, as its records have it.

    `evidence` are passages of the corpus: of several whose tokens are the same, the lowest id.
    """
    example, passages = held_out.examples[question], held_out.corpus.passages
    return {
        "set": held_out.name,
        "id": example.id,
        "task": example.task,
        "kind": example.kind,
        "question": example.question,
        "answers": list(example.answers),
        "long": scoring.is_long(example),
        "long_answer": markup.long_answer(example, held_out.dataset.passages),
        "answer_groups": [list(group) for group in example.answer_groups],
        "evidence": [passages[row].id for row in held_out.evidence(question)],
        "seen": held_out.evidence_seen(question),
    }
