"""Scores as rows of text, the same for the terminal and for report.html."""

from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "-"
CORRECT = {  # what "correct" means, by the metric a set is judged by
    "acc_substring": "an answer stands in the text",
    "accuracy": "the answer, letter for letter",
    "exact_match": "the answer, normalised",
    "str_em": "share of the answer groups in the text",
    "f1": "token F1",
    "rouge_l": "ROUGE-L",
}
_COLUMNS = {  # metric -> heading
    "f1": "F1",
    "retrieval_hit": "hit",
    "r_precision": "R-prec",
    "recall_at_5": "recall@5",
    "citation_recall": "cite rec",
    "citation_precision": "cite prec",
}
HEADINGS = ("set", "answered with", "passages", "correct", "95 %", *_COLUMNS.values(), "n")
_LEFT = 2  # columns of text; numbers follow


def rows(part: Mapping[str, Any]) -> list[list[str]]:
    """The cells under HEADINGS, but for the set's, of one set of an evaluation's summary."""
    found = []
    for arm in (*part["arms"], *part["references"]):
        scores = arm["scores"]
        correct = scores.get(part["correct"])
        first = next(iter(scores.values()), {"n": 0})
        found.append(
            [
                arm["label"],
                f"{arm['passages']:,}" if arm["passages"] else MISSING,
                number(correct),
                interval(correct),
                *(number(scores.get(metric)) for metric in _COLUMNS),
                f"{(correct or first)['n']:,}",
            ]
        )
    return found


def number(score: Mapping[str, float] | None) -> str:
    """A mean, or that there is none."""
    return MISSING if score is None else f"{score['mean']:.3f}"


def interval(score: Mapping[str, float] | None) -> str:
    """low-high of a mean."""
    return MISSING if score is None else f"{score['low']:.3f}-{score['high']:.3f}"


def answers_table(summary: Mapping[str, Any]) -> str:
    """An evaluation's summary as aligned plain text, without a final newline."""
    cells = []
    for part in summary["sets"]:
        names = iter((part["name"], f"  {part['correct']}"))
        cells += [[next(names, ""), *row] for row in rows(part)]
    return aligned([list(HEADINGS), *cells], _LEFT)


def aligned(cells: Sequence[Sequence[str]], left: int) -> str:
    """A heading and rows of cells as plain text, ruled; the first `left` columns are text."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
