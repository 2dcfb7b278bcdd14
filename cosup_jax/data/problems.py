"""What is wrong with data: every bad row with file, line, id and reason, counted by kind."""

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

ERRORS = {  # such a row is no example: training refuses the set, or leaves the row out
    "not_utf8": "bytes that are no UTF-8 text",
    "not_json": "not one JSON object a line",
    "wrong_type": "a field of another type",
    "missing_field": "a field that must be there",
    "empty_text": "text without a character",
    "duplicate_id": "an id that an earlier row has",
    "missing_passage": "an id that no passage has",
    "bad_support": "a span outside its passage",
    "bad_marker": "a [Ret], [Cs] or [Ce] out of place",
    "marker_without_evidence": "[Ret:ID] of a passage that is not in evidence",
    "evidence_without_marker": "evidence that the output never inserts",
    "order_mismatch": "evidence in another order than the output inserts it",
    "bad_judgement": "a paragraph or judgement of Self-RAG out of place",
}
WARNINGS = {  # such a row is used, or left out and counted
    "answer_not_in_evidence": "no answer stands in the evidence",
    "control_text": "text that reads like a control token; it is encoded as plain characters",
    "unknown_field": "a field that is ignored and looks like a typing error",
    "own_negative": "a hard negative that is evidence of the same row; it is no negative there",
    "no_answer": "a question without an answer: left out",
    "no_provenance": "a question without evidence: its answer is learnt without a passage",
    "evidence_dropped": "a part of the provenance that cannot be used, beside one that can",
    "other_prompt": "a prompt in another form than ours; all of it is read as the question",
    "other_insertion": "an inserted text that is not its passage; the passage is inserted",
    "open_span": "a grounded span without [Ce]; it ends where the next passage or the text does",
    "paragraph_dropped": "a paragraph that does not support its text; the text stays",
    "example_too_long": "fits no Gen row and is left out: its [Ret] or answer would be cut off",
    "passages_too_many": "more [Ret] or passages than a row or step holds: left out",
    "passage_cut": "longer than Ctx reads; the end is cut, the pooled token kept",
    "answer_cut": "the grounding span lies behind the cut of its passage",
    "leaked_passage": "evidence of a held-out question that training asks for too",
    "leaked_question": "a held-out question that training asks too",
    "near_duplicate": "almost the same words as a training question",
}
KINDS = ERRORS | WARNINGS


class Problem(NamedTuple):
    """One finding. `where` is FILE:LINE, or as near to it as the format allows."""

    kind: str
    where: str
    id: str  # empty where the row has none
    reason: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.where, self.id, self.reason)))


class BadRow(Exception):
    """Raised while a row is read; the reader notes it and goes on with the next row."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind, self.reason = kind, reason


def printable(text: str) -> str:
    """As any terminal and file takes it: half surrogates, controls, line breaks are escaped."""
    escaped = lambda letter: letter.encode("unicode_escape").decode()
    return "".join(letter if letter.isprintable() else escaped(letter) for letter in text)


@dataclasses.dataclass
class Problems:
    """Findings about one source. Counts are complete; of each kind the first `keep` are kept."""

    keep: int = 100_000  # bounds memory and file, not what a person reads
    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    listed: list[Problem] = dataclasses.field(default_factory=list)

    def add(self, kind: str, where: str, id: str, reason: str) -> None:
        """Notes one; `kind` is a key of KINDS."""
        if kind not in KINDS:
            raise KeyError(kind)
        self.counts[kind] += 1
        if self.counts[kind] <= self.keep:
            found = (where, id, " ".join(reason.split()))
            self.listed.append(Problem(kind, *map(printable, found)))

    @property
    def errors(self) -> int:
        return sum(count for kind, count in self.counts.items() if kind in ERRORS)

    @property
    def first_error(self) -> Problem:
        return next(problem for problem in self.listed if problem.kind in ERRORS)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {"counts": dict(self.counts), "listed": [list(problem) for problem in self.listed]}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Problems":
        listed = [Problem(*problem) for problem in saved["listed"]]
        return cls(counts=collections.Counter(saved["counts"]), listed=listed)

    def extend(self, others: Iterable["Problems"]) -> "Problems":
        """Adds all of theirs; returns itself."""
        for other in others:
            self.counts.update(other.counts)
            self.listed += other.listed
        return self
