"""Scores as rows of text, the same for the terminal and for report.html."""

from collections.abc import Mapping, Sequence
from typing import Any

from cosup_jax.wording import counted

MISSING = "-"
CORRECT = {  # what "correct" means, by the score that a set is judged by
    "acc_substring": "an answer stands in the text",
    "accuracy": "the answer, letter for letter",
    "em": "the answer, normalised",
    "str_em": "share of the groups of answers in the text",
    "f1": "F1 of tokens",
    "rougel": "ROUGE-L",
}
_COLUMNS = {  # score, after the judge's prefix -> heading, before which its kind stands
    "f1": "F1",
    "retrieval_hit": "hit",
    "Rprec": "R-prec",
    "recall@5": "recall@5",
    "{}citation_rec": "{} rec",
    "{}citation_prec": "{} prec",
}
RECALL = (
    "R-prec is the share of the evidence that ranks first; recall@5, as in KILT, counts evidence "
    "only where all of it is found, and may lie below"
)
_LEFT = 2  # columns of text; numbers follow


def headings(prefix: str) -> list[str]:
    """Of `rows`, with the set's in front; `prefix` is that of the judge's scores."""
    shown = [heading.format("contained" if prefix else "cite") for heading in _COLUMNS.values()]
    return ["set", "answered with", "passages", "correct", "95 %", *shown, "n"]


def rows(part: Mapping[str, Any], prefix: str) -> list[list[str]]:
    """The cells under `headings`, but for the set's, of one set of an evaluation's summary.

    Below trained retrieval over the whole corpus stand the splits that divide its answers.
    """
    found = []
    for arm in (*part["arms"], *part["references"]):
        found.append(_row(arm["label"], arm["passages"], arm["scores"], part["correct"], prefix))
        for split, half in arm["splits"].items() if arm.get("arm") == "corpus" else ():
            if 0 < half["questions"] < part["questions"]:
                scores = half["scores"]
                found.append(_row(f"- {split}", None, scores, part["correct"], prefix))
    return found


def _row(
    label: str, passages: int | None, scores: Mapping[str, Any], correct: str, prefix: str
) -> list[str]:
    score = scores.get(correct)
    any_score = score or next(iter(scores.values()), {"n": 0})
    return [
        label,
        f"{passages:,}" if passages else MISSING,
        number(score),
        interval(score),
        *(number(scores.get(metric.format(prefix))) for metric in _COLUMNS),
        f"{any_score['n']:,}",
    ]


def number(score: Mapping[str, Any] | None) -> str:
    """A mean, or that there is none."""
    return MISSING if score is None else f"{score['mean']:.3f}"


def interval(score: Mapping[str, Any] | None) -> str:
    """low-high of a mean; of one answer there is none."""
    if score is None or score["low"] is None:
        return MISSING
    return f"{score['low']:.3f}-{score['high']:.3f}"


def answers_table(summary: Mapping[str, Any]) -> str:
    """An evaluation's summary as aligned plain text, without a final newline."""
    prefix, cells = summary["judge"]["prefix"], []
    for part in summary["sets"]:
        names = iter((part["name"], f"  {part['correct']}"))
        cells += [[next(names, ""), *row] for row in rows(part, prefix)]
    means = [
        f"{name}, {means_over(name, len(found['sets']))}, by {corpus_label(summary)}: "
        + ", ".join(f"{metric} {value:.3f}" for metric, value in found["scores"].items())
        for name, found in summary["domains"].items()
    ]
    notes = filter(None, [RECALL, cut(summary["judge"])])
    return "\n".join([aligned([headings(prefix), *cells], _LEFT), *notes, *means])


def cut(judge: Mapping[str, Any]) -> str:
    """What the judge did not read whole, of what it was asked for this summary; "" if nothing."""
    count = judge.get("cut", 0)
    cut = f"{counted(count, 'pair')} of passage and claim cut to the judge's context"
    return cut if count else ""


def corpus_label(summary: Mapping[str, Any]) -> str:
    """What retrieves from the whole corpus, which the scores of the domains are of."""
    arms = (arm for part in summary["sets"] for arm in part["arms"])
    return next((arm["label"] for arm in arms if arm["arm"] == "corpus"), "")


def means_over(domain: str, sets: int) -> str:
    """What the scores of a domain are means over."""
    reads = "reads" if domain == "in-domain" else "does not read"
    return f"mean over the {counted(sets, 'set')} whose source training {reads}"


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
