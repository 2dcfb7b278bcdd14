"""The run as one self-contained page, report.html, and its closing table as plain text."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cosup_jax.answer import records
from cosup_jax.config import ARMS
from cosup_jax.report import answers, tables
from cosup_jax.report.plots import Curve, chart
from cosup_jax.report.style import CSS, PAGE
from cosup_jax.runtime import telemetry
from cosup_jax.runtime.workdir import write_atomic, writing

COLUMNS = {  # metric key -> heading, format
    "recall_at_1": ("recall@1", "{:.3f}"),
    "recall_at_10": ("recall@10", "{:.3f}"),
    "mrr_at_10": ("MRR@10", "{:.3f}"),
    "ntp_nats_per_token": ("NTP nats/token", "{:.3f}"),
}


def write_report(path: str | Path, run: Mapping[str, Any]) -> None:
    """Writes `path` atomically: header, closing table, curves, held-out answers, examples.

    Args:
      path: of the HTML file.
      run: a dict with
        title: str, such as the config's name.
        facts: {str: str}, shown as they are: steps, parameters, devices, versions.
        metrics: the objects of metrics.jsonl. Lines may lack any key but "step"; evaluation lines
          carry "eval/<set>/<metric>", with the metrics of COLUMNS.
        baselines: {system: {set: {metric: value}}}; the system is "BM25", "bigram" or the like.
        summary: of --mode=evaluate, or None.
        answers: {set: {arm: answer records}}, the arm whose answers are shown first.
        shown: int, answers shown of each set.
    """
    metrics, baselines, summary = run["metrics"], run["baselines"], run["summary"]
    rows = closing_rows(metrics, baselines)
    shown = answers.examples(run["answers"], run["shown"])
    sections = {
        "Result": _table(rows) if rows else "",
        "Curves": _charts(metrics, baselines),
        "Held-out answers": summary and answers.tables_and_plots(summary),
        "Examples": shown,
    }
    sections = {heading: content for heading, content in sections.items() if content}
    body = (
        _header(run["title"], run["facts"], sections),
        *(_section(heading, content) for heading, content in sections.items()),
    )
    page = PAGE.format(title=html.escape(run["title"]), style=CSS, body="\n".join(body))
    with writing(Path(path)):
        write_atomic(Path(path), page)


def read_run(workdir: Path, shown: int) -> dict[str, Any]:
    """What `write_report` shows, from the files of a workdir; `shown` answers of each set.

    The answers are those of --mode=evaluate, or else those of the last training step.
    """
    evaluation = workdir / "evaluation"
    training = _read_json(evaluation / "training.json") or {}
    summary = _read_json(evaluation / "summary.json") or {}
    summary = summary if "sets" in summary else None  # of an older version
    metrics = telemetry.lines(workdir / "metrics.jsonl")
    answers: dict[str, dict[str, list]] = {}
    for part in summary["sets"] if summary else ():
        whole = [arm for arm in part["arms"] if not arm["subset"]]
        answers[part["name"]] = {
            arm["label"]: _scored(evaluation / part["name"] / f"{arm['arm']}.jsonl", arm["run"])
            for arm in whole
        }
    for record in () if summary else records.read(evaluation / "answers.jsonl"):
        answers.setdefault(record["set"], {}).setdefault(ARMS["corpus"], []).append(record)
    return {
        "title": workdir.name,
        "facts": training.get("facts", {}),
        "metrics": metrics,
        "baselines": training.get("baselines", {}),
        "summary": summary,
        "answers": answers,
        "shown": shown,
    }


def _scored(path: Path, run: str) -> list[Mapping[str, Any]]:
    """The answers of a summary's arm: a later evaluation may have left others there, unscored."""
    found = records.read(path)
    return [record for record in found if record.get("run") == run and "scores" in record]


def closing_rows(metrics: Sequence[Mapping], baselines: Mapping) -> list[dict[str, Any]]:
    """One row per evaluation set and system: {"set", "system", <metric>: value, ...}.

    Systems: the newest evaluation, the one of step 0 if it is another, then the baselines.
    """
    evaluated = [line for line in metrics if _measured(line)]
    systems: dict[str, Mapping] = {}
    for line in (evaluated[-1], evaluated[0]) if evaluated else ():
        if line["step"] == 0:
            systems["zero steps"] = _by_set(line)
        elif line is evaluated[-1]:
            systems[f"trained, {line['step']} steps"] = _by_set(line)
    systems |= baselines
    return [
        {"set": name, "system": system, **scores[name]}
        for name in _set_names(metrics)
        for system, scores in systems.items()
        if name in scores
    ]


def closing_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """`closing_rows` as aligned plain text for the terminal, without a final newline."""
    cells = [["set", "system", *(heading for heading, _ in COLUMNS.values())]]
    previous = None
    for row in rows:
        shown = row["set"] if row["set"] != previous else ""
        previous = row["set"]
        cells.append([shown, row["system"], *(_number(row, metric) for metric in COLUMNS)])
    return tables.aligned(cells, left=2)


def _measured(line: Mapping[str, Any]) -> bool:
    """Whether a line of metrics has held-out scores of the closing table."""
    return any(metric in scores for scores in _by_set(line).values() for metric in COLUMNS)


def _by_set(line: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for key, value in line.items():
        if key.startswith("eval/"):
            name, metric = key.removeprefix("eval/").rsplit("/", 1)
            found.setdefault(name, {})[metric] = value
    return found


def _set_names(metrics: Sequence[Mapping]) -> list[str]:
    return list(dict.fromkeys(name for line in metrics for name in _by_set(line)))


def _number(row: Mapping[str, Any], metric: str) -> str:
    return COLUMNS[metric][1].format(row[metric]) if row.get(metric) is not None else tables.MISSING


def _header(title: str, facts: Mapping[str, str], sections: Iterable[str]) -> str:
    pairs = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in facts.items()
    )
    links = "".join(f'<a href="#{_anchor(heading)}">{heading}</a>' for heading in sections)
    return (
        '<header><p class="kicker">Token-sequence co-supervision</p>'
        f"<h1>{html.escape(title)}</h1><dl>{pairs}</dl><nav>{links}</nav></header>"
    )


def _section(heading: str, content: str) -> str:
    return f'<section id="{_anchor(heading)}"><h2>{heading}</h2>{content}</section>'


def _anchor(heading: str) -> str:
    return heading.lower().replace(" ", "-")


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    headings = "".join(f"<th>{heading}</th>" for heading, _ in COLUMNS.values())
    parts = [f"<thead><tr><th></th>{headings}</tr></thead>"]
    for name in dict.fromkeys(row["set"] for row in rows):
        group = [row for row in rows if row["set"] == name]
        best = _best(group)
        parts.append(f'<tbody><tr><th class="set" colspan="5">{html.escape(name)}</th></tr>')
        for row in group:
            cells = "".join(
                f'<td class="best">{_number(row, metric)}</td>'
                if row.get(metric) is not None and row[metric] == best.get(metric)
                else f"<td>{_number(row, metric)}</td>"
                for metric in COLUMNS
            )
            parts.append(f"<tr><th>{html.escape(row['system'])}</th>{cells}</tr>")
        parts.append("</tbody>")
    return f'<div class="wide"><table>{"".join(parts)}</table></div>'


def _best(group: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    best = {}
    for metric in COLUMNS:
        values = [row[metric] for row in group if row.get(metric) is not None]
        if len(values) > 1:
            best[metric] = min(values) if metric.startswith("ntp") else max(values)
    return best


def _charts(metrics: Sequence[Mapping], baselines: Mapping) -> str:
    def logged(label, key, color=1):
        return _curve(metrics, label, key, color)

    def held_out(metric):
        return _held_out(metrics, baselines, metric)

    train_and_held_out = [logged("training", "ntp/nats_per_token"), *held_out("ntp_nats_per_token")]
    charts = [
        ("Next token", "nats per token", train_and_held_out),
        ("Next sequence", "nats per [Ret]", [logged("training", "nsp/nats_per_ret")]),
        ("Retrieval, first hit", "recall@1", held_out("recall_at_1")),
        ("Retrieval, first ten", "recall@10", held_out("recall_at_10")),
        ("Answers", "share correct", held_out("answers_correct")),
        (
            "Gradient norm",
            "before clipping",
            [logged("Gen", "grad/norm_gen"), logged("Ctx", "grad/norm_ctx", 2)],
        ),
        ("Throughput", "tokens per second", [logged("training", "perf/tokens_per_s")]),
    ]
    drawn = ((title, unit, [c for c in curves if len(c.values)]) for title, unit, curves in charts)
    figures = "".join(chart(title, unit, curves) for title, unit, curves in drawn if curves)
    return figures and f'<div class="charts">{figures}</div>'


def _curve(metrics, label: str, key: str, color: int, marked: bool = False) -> Curve:
    points = [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return Curve(label, color, steps, values, marked=marked)


def _held_out(metrics, baselines: Mapping, metric: str) -> list[Curve]:
    curves = []
    for number, name in enumerate(_set_names(metrics)):
        color = 2 + number % 6
        curves.append(_curve(metrics, name, f"eval/{name}/{metric}", color, marked=True))
        for system, scores in baselines.items():
            if metric in scores.get(name, {}):
                value = scores[name][metric]
                curves.append(Curve(system, color, (), (value,), baseline=True))
    return curves


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(text) if (text := _text(path)) else None


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
