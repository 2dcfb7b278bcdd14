"""What report.html shows of held-out answers: tables, plots, and examples a person can read."""

import html
import itertools
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cosup_jax.report import tables
from cosup_jax.report.plots import Measured, Score, by_row, by_size

Record = Mapping[str, Any]


def tables_and_plots(summary: Mapping[str, Any]) -> str:
    """All of an evaluation's summary but its records."""
    judge = summary["judge"]
    checked = (
        "Grounding is a check that tokens are contained, no NLI model's verdict."
        if judge["prefix"]
        else f"Grounding is judged by {judge['name']}."
    )
    notes = ". ".join(filter(None, [tables.RECALL, tables.cut(judge)]))
    about = (
        f'<p class="note">Answers at step {summary["step"]:,}. Every row answers the same '
        "questions within one budget of tokens; intervals are bootstrapped over questions, 95 %. "
        f"{html.escape(checked)} {notes}.</p>"
    )
    label = tables.corpus_label(summary)
    domains = "".join(_domain(name, part, label) for name, part in summary["domains"].items())
    sets = "".join(_set(part, judge["prefix"]) for part in summary["sets"])
    return about + domains + sets


def examples(records: Mapping[str, Mapping[str, Sequence[Record]]], shown: int) -> str:
    """The first questions of each set as the trained model answered them, other arms folded.

    Args:
      records: {set: {arm's label: its records}}; the first arm is shown.
      shown: questions a set.
    """
    parts = []
    for name, arms in records.items():
        label, (first, *others) = next(iter(arms), ""), arms.values() or [[]]
        elsewhere = [
            {record["id"]: (other, record) for record in found}
            for other, found in zip(list(arms)[1:], others, strict=True)
        ]
        cards = [
            _example(record, [found[record["id"]] for found in elsewhere if record["id"] in found])
            for record in first[:shown]
        ]
        if cards:
            heading = f'{html.escape(name)} <span class="unit">{html.escape(label)}</span>'
            parts.append(f"<h3>{heading}</h3>{''.join(cards)}")
    return "".join(parts)


def stretches(text: str, spans: Sequence[str]) -> tuple[list[tuple[str, bool]], list[str]]:
    """A passage as (stretch, whether a span stands there), and the spans that are not in it."""
    grounded, missing = [False] * len(text), []
    for span in filter(None, (span.strip() for span in spans)):
        found = re.search(re.escape(span), text) or re.search(re.escape(span), text, re.IGNORECASE)
        if found:
            grounded[slice(*found.span())] = [True] * len(found[0])
        else:
            missing.append(span)
    runs = itertools.groupby(zip(text, grounded, strict=True), key=operator.itemgetter(1))
    return [("".join(letter for letter, _ in run), here) for here, run in runs], missing


def _domain(name: str, part: Mapping[str, Any], label: str) -> str:
    scores = ", ".join(f"{metric} {value:.3f}" for metric, value in part["scores"].items())
    sets = html.escape(", ".join(part["sets"]))
    return (
        f'<p class="note"><b>{name}</b>, {tables.means_over(name, len(part["sets"]))} ({sets}), '
        f"by {html.escape(label)}: {html.escape(scores)}</p>"
    )


def _set(part: Mapping[str, Any], prefix: str) -> str:
    facts = [f"{part['questions']:,} questions", f"{part['passages']:,} passages"]
    facts.append("training reads this source" if part["in_domain"] else "training never reads it")
    if part["evidence_seen"] is not None:
        facts.append(f"and the evidence of {part['evidence_seen']:.0%} of its questions")
    correct = f"correct: {part['correct']}, {tables.CORRECT[part['correct']]}"
    table = _table(tables.headings(prefix)[1:], tables.rows(part, prefix))
    folded = _details("Splits", _splits(part, prefix)) + _details("All scores", _all_scores(part))
    return (
        f'<h3>{html.escape(part["name"])}</h3><p class="note">{", ".join(facts)}; {correct}</p>'
        f"{table}{_plots(part, prefix)}{folded}"
    )


def _plots(part: Mapping[str, Any], prefix: str) -> str:
    """Arms side by side, sizes of the corpus, and what retrieval and training make of it."""
    name, metrics = part["name"], {part["correct"]: ("correct", 2)}
    metrics |= {"retrieval_hit": ("evidence found", 4), f"{prefix}citation_rec": ("grounded", 3)}
    whole = [arm for arm in part["arms"] if not arm["subset"]]
    drawn = []
    if whole:
        measured = _measured([arm["scores"] for arm in whole], metrics)
        labels = [arm["label"] for arm in whole]
        drawn.append(by_row("Where passages come from", "share", labels, measured, name))
    for label in dict.fromkeys(arm["label"] for arm in part["arms"] if arm["subset"]):
        sized = [arm for arm in part["arms"] if arm["subset"] and arm["label"] == label]
        sized += [arm for arm in part["arms"] if arm["arm"] == "corpus"]
        measured = _measured([arm["scores"] for arm in sized], metrics)
        sizes = [arm["passages"] for arm in sized]
        drawn.append(by_size(f"Size of the corpus, {label}", "share", sizes, measured, name))
    for arm in part["arms"]:
        parts = {k: v for k, v in arm["splits"].items() if v["questions"]}
        if arm["arm"] == "corpus" and len(parts) > 1:
            labels = [f"{split} ({v['questions']})" for split, v in parts.items()]
            measured = _measured([v["scores"] for v in parts.values()], metrics)
            drawn.append(by_row("Splits", arm["label"], labels, measured, name))
    return f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""


def _measured(
    scores: Sequence[Mapping[str, Any]], metrics: Mapping[str, tuple[str, int]]
) -> list[Measured]:
    def score(found):
        if found is None:
            return None
        bounds = [found["mean"] if found[end] is None else found[end] for end in ("low", "high")]
        return Score(found["mean"], *bounds)

    lines = [
        Measured(label, color, [score(found.get(metric)) for found in scores])
        for metric, (label, color) in metrics.items()
    ]
    return [line for line in lines if any(line.scores)]


def _splits(part: Mapping[str, Any], prefix: str) -> str:
    rows = []
    for arm in part["arms"]:
        size = f", {arm['passages']:,} passages" if arm["subset"] else ""
        for split, found in arm["splits"].items():
            correct = found["scores"].get(part["correct"])
            cited = found["scores"].get(f"{prefix}citation_rec")
            cells = [tables.number(correct), tables.interval(correct), tables.number(cited)]
            rows.append([arm["label"] + size, split, *cells, f"{found['questions']:,}"])
    return _table(("answered with", "split", "correct", "95 %", "grounded", "n"), rows, left=2)


def _all_scores(part: Mapping[str, Any]) -> str:
    rows = []
    for arm in part["arms"]:
        size = f", {arm['passages']:,} passages" if arm["subset"] else ""
        for metric, score in arm["scores"].items():
            apart = arm["minus_trained"].get(metric)
            paired = f"{apart['mean']:+.3f}" if apart else tables.MISSING
            cells = [tables.number(score), tables.interval(score), paired, tables.interval(apart)]
            rows.append([arm["label"] + size, metric, *cells, f"{score['n']:,}"])
    headings = ("answered with", "score", "mean", "95 %", "minus trained", "95 %", "n")
    return _table(headings, rows, left=2)


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    head = "".join(
        f"<th{_side(place, left)}>{html.escape(text)}</th>" for place, text in enumerate(headings)
    )
    body = []
    previous = None
    for row in rows:
        first = "" if left > 1 and row[0] == previous else row[0]
        previous = row[0]
        cells = "".join(
            f"<td{_side(place, left)}>{html.escape(text)}</td>"
            for place, text in enumerate([first, *row[1:]])
        )
        body.append(f"<tr>{cells}</tr>")
    return (
        f'<div class="wide"><table class="scores"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _side(place: int, left: int) -> str:
    return ' class="left"' if place < left else ""


def _example(record: Record, others: Sequence[tuple[str, Record]]) -> str:
    expected = html.escape(" · ".join(record["answers"]) or record.get("long_answer", ""))
    sources = "".join(_source(record, source) for source in record["sources"])
    compared = "".join(
        f"<li>{_verdict(other)} <b>{html.escape(label)}</b> {_cited(other)}</li>"
        for label, other in others
    )
    folded = compared and _details("The same question, other passages", f"<ul>{compared}</ul>")
    return (
        f'<article><p class="meta">{_verdict(record)} {html.escape(record["id"])}</p>'
        f'<h4>{html.escape(record["question"])}</h4><p class="answer">{_cited(record)}</p>'
        f'<p class="gold"><span>expected</span> {expected}</p><ol>{sources}</ol>{folded}</article>'
    )


def _verdict(record: Record) -> str:
    """Right, wrong, or between the two as a number; nothing where nothing says what is right."""
    score = record["correct"]
    if score is None:
        return ""
    if 0 < score < 1:
        return f'<span class="badge">{score:.2f}</span>'
    verdict = "right" if score else "wrong"
    return f'<span class="badge {verdict}">{verdict}</span>'


def _cited(record: Record) -> str:
    """The answer, each [k] of a source raised."""
    numbers = "|".join(str(source["number"]) for source in record["sources"]) or "(?!)"
    text = html.escape(record["output"].strip())
    cited = re.sub(rf"\[({numbers})\]", r'<sup class="cite">[\1]</sup>', text)
    return cited or "<i>empty answer</i>"


def _source(record: Record, source: Mapping[str, Any]) -> str:
    scores = [r["score"] for r in record["retrieved"] if r["number"] == source["number"]]
    scores = [score for score in scores if score is not None]
    spans = [span["text"] for span in record["spans"] if span["number"] == source["number"]]
    gold = ' <span class="badge gold">gold</span>' if source["id"] in record["evidence"] else ""
    pieces, missing = stretches(source["text"], spans)
    shown = "".join(
        f"<mark>{html.escape(piece)}</mark>" if grounded else html.escape(piece)
        for piece, grounded in pieces
    )
    apart = "".join(
        f'<p class="gold"><span>written, but not in this passage</span> {html.escape(text)}</p>'
        for text in missing
    )
    about = " · ".join([*(f"score {score:.3f}" for score in scores), html.escape(source["id"])])
    return (
        f'<li><p class="source"><span class="cite">[{source["number"]}]</span> '
        f'<b>{html.escape(source["title"])}</b>{gold} <span class="score">{about}</span></p>'
        f"<p>{shown}</p>{apart}</li>"
    )
