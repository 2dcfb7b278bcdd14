"""The run as one self-contained page, report.html, and its closing table as plain text."""

import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cosup_jax.workdir import write_atomic

COLUMNS = {  # metric key -> heading, format
    "recall_at_1": ("recall@1", "{:.3f}"),
    "recall_at_10": ("recall@10", "{:.3f}"),
    "mrr_at_10": ("MRR@10", "{:.3f}"),
    "ntp_nats_per_token": ("NTP nats/token", "{:.3f}"),
}
_POINTS = 400  # points drawn per curve; more are averaged in bins
_MISSING = "-"
_INK, _RULE = "#000001", "#000002"  # stand for the page's own colours in a plot


class Curve(NamedTuple):
    """One line of a chart. A baseline is a single value, dashed, in the colour of its set."""

    label: str
    color: int  # N of the CSS variable --series-N, 1 to 7
    steps: Sequence[int]
    values: Sequence[float]
    baseline: bool = False
    marked: bool = False  # a dot at each point


def write_report(path: str | Path, run: Mapping[str, Any]) -> None:
    """Writes `path` atomically: header, closing table, curves, example answers.

    Args:
      path: of the HTML file.
      run: a dict with
        title: str, such as the config's name.
        facts: {str: str}, shown as they are: steps, parameters, devices, versions.
        metrics: the objects of metrics.jsonl. Lines may lack any key but "step"; evaluation lines
          carry "eval/<set>/<metric>", with the metrics of COLUMNS.
        baselines: {system: {set: {metric: value}}}; the system is "BM25", "bigram" or the like.
        examples: [{"set", "question", "gold_answers": [str],
          "answer_parts": [{"text", "cite": number of a source or None}],
          "sources": [{"number", "id", "title", "text", "score", "gold": bool,
          "span": [start, end) of the grounding characters in text, or None}], "right": bool}].
    """
    metrics, baselines = run["metrics"], run["baselines"]
    rows = closing_rows(metrics, baselines)
    body = (
        _header(run["title"], run["facts"]),
        _section("Result", _table(rows) if rows else ""),
        _section("Curves", _charts(metrics, baselines)),
        _section("Examples", "".join(_example(example) for example in run["examples"])),
    )
    page = _PAGE.format(title=html.escape(run["title"]), style=_CSS, body="\n".join(body))
    write_atomic(Path(path), page)


def closing_rows(metrics: Sequence[Mapping], baselines: Mapping) -> list[dict[str, Any]]:
    """One row per evaluation set and system: {"set", "system", <metric>: value, ...}.

    Systems: the newest evaluation, the one of step 0 if it is another, then the baselines.
    """
    evaluated = [line for line in metrics if any(key.startswith("eval/") for key in line)]
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
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        left = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        lines.append("  ".join(left + right))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


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
    return COLUMNS[metric][1].format(row[metric]) if row.get(metric) is not None else _MISSING


def _header(title: str, facts: Mapping[str, str]) -> str:
    pairs = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in facts.items()
    )
    return (
        '<header><p class="kicker">Token-sequence co-supervision</p>'
        f"<h1>{html.escape(title)}</h1><dl>{pairs}</dl></header>"
    )


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{heading}</h2>{content}</section>" if content else ""


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
        (
            "Gradient norm",
            "before clipping",
            [logged("Gen", "grad/norm_gen"), logged("Ctx", "grad/norm_ctx", 2)],
        ),
        ("Throughput", "tokens per second", [logged("training", "perf/tokens_per_s")]),
    ]
    drawn = ((title, unit, [c for c in curves if len(c.values)]) for title, unit, curves in charts)
    figures = "".join(_chart(title, unit, curves) for title, unit, curves in drawn if curves)
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


def _chart(title: str, unit: str, curves: Sequence[Curve]) -> str:
    solid = [(c.label, f"var(--series-{c.color})", "none") for c in curves if not c.baseline]
    dashed = dict.fromkeys((c.label, "var(--soft)", "4 3") for c in curves if c.baseline)
    legend = "".join(
        f'<li><svg class="key" viewBox="0 0 20 6"><path d="M0 3H20" style="stroke: {colour}; '
        f'stroke-dasharray: {dashes}"/></svg>{html.escape(label)}</li>'
        for label, colour, dashes in (*solid, *dashed)
    )
    return (
        f'<figure><figcaption>{title} <span class="unit">{unit}</span></figcaption>'
        f"{_plot(title, curves, share=unit.startswith('recall'))}<ul>{legend}</ul></figure>"
    )


def _plot(title: str, curves: Sequence[Curve], share: bool) -> str:
    """An <svg> element in the page's own colours and font. A share is drawn from 0 to 1."""
    inks = dict.fromkeys(("text.color", "xtick.color", "ytick.color", "axes.labelcolor"), _INK)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9, **inks}):
        figure = Figure(figsize=(4.8, 2.6), layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            _draw(axes, curve)
        drawn = np.concatenate([np.asarray(curve.values, float) for curve in curves])
        if not share and drawn.min() > 0 and drawn.max() > 300 * drawn.min():
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0, top=1.02 if share else None)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_RULE)
        axes.grid(axis="y", color=_RULE, linewidth=0.6)
        axes.tick_params(which="both", length=0)
        axes.set_axisbelow(True)
        axes.set_xlim(left=0)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _themed(file.getvalue(), title)


def _draw(axes, curve: Curve) -> None:
    colour = f"#0001{curve.color:02d}"
    if curve.baseline:
        axes.axhline(curve.values[0], color=colour, linewidth=1.1, dashes=(4, 3))
        return
    bins = np.array_split(np.arange(len(curve.steps)), min(len(curve.steps), _POINTS))
    steps = [np.mean(np.take(curve.steps, chosen)) for chosen in bins]
    values = [np.mean(np.take(curve.values, chosen)) for chosen in bins]
    lonely = curve.marked or len(steps) == 1  # a line through one point shows nothing
    axes.plot(steps, values, color=colour, linewidth=1.6, marker="o" if lonely else "", ms=3.5)


def _themed(svg: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(style|metadata).*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"font: [^;\"]*;?", "font-size: 9px;", svg)
    svg = re.sub(r"#0001(\d\d)", lambda found: f"var(--series-{int(found[1])})", svg)
    svg = svg.replace(_INK, "var(--soft)").replace(_RULE, "var(--rule)")
    # Names are unique within one plot only.
    prefix = re.sub(r"\W", "-", title.lower())
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)


def _example(example: Mapping[str, Any]) -> str:
    verdict = "right" if example["right"] else "wrong"
    answer = "".join(_part(part) for part in example["answer_parts"])
    gold = html.escape(" · ".join(example["gold_answers"]))
    sources = "".join(_source(source) for source in example["sources"])
    return (
        f'<article><p class="meta"><span class="badge {verdict}">{verdict}</span> '
        f"{html.escape(example['set'])}</p><h3>{html.escape(example['question'])}</h3>"
        f'<p class="answer">{answer or "<i>empty answer</i>"}</p>'
        f'<p class="gold"><span>gold</span> {gold}</p><ol>{sources}</ol></article>'
    )


def _part(part: Mapping[str, Any]) -> str:
    cite = "" if part["cite"] is None else f'<sup class="cite">[{int(part["cite"])}]</sup>'
    return html.escape(part["text"]) + cite


def _source(source: Mapping[str, Any]) -> str:
    text, span = source["text"], source["span"]
    if span is None:
        shown = html.escape(text)
    else:
        start, end = span
        before, grounded, after = (
            html.escape(part) for part in (text[:start], text[start:end], text[end:])
        )
        shown = f"{before}<mark>{grounded}</mark>{after}"
    gold = ' <span class="badge gold">gold</span>' if source["gold"] else ""
    return (
        f'<li><p class="source"><span class="cite">[{int(source["number"])}]</span> '
        f"<b>{html.escape(source['title'])}</b>{gold} "
        f'<span class="score">score {source["score"]:.3f} · {html.escape(str(source["id"]))}'
        f"</span></p><p>{shown}</p></li>"
    )


_CSS = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfc; --card: #ffffff; --ink: #1d2126; --soft: #636b75; --rule: #e3e5e8;
  --mark: #fff0b8; --right: #17784a; --wrong: #b3372f; --gold: #8a6a00;
  --series-1: #7c8794; --series-2: #2563b0; --series-3: #c2571a; --series-4: #16805a;
  --series-5: #8e4aa8; --series-6: #a8842c; --series-7: #b03a5b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1b1f23; --ink: #e4e7ea; --soft: #98a2ad; --rule: #2d3339;
    --mark: #574a12; --right: #58c690; --wrong: #f08a80; --gold: #e0bf55;
    --series-1: #93a0ad; --series-2: #74aef2; --series-3: #f09a5e; --series-4: #5cc79a;
    --series-5: #cb95e3; --series-6: #d9b866; --series-7: #ee88a6;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 66rem; padding: 2.5rem 1.25rem 4rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1.25rem; font-weight: 650; }
h2 { font-size: 1.15rem; margin: 3rem 0 1rem; font-weight: 650; }
h3 { font-size: 1.05rem; margin: .35rem 0; font-weight: 600; }
p { margin: .35rem 0; }
.kicker, .meta, .unit, .score, .gold > span, dt, figure ul { color: var(--soft); }
.kicker { margin: 0; font-size: .9rem; }
dl { display: flex; flex-wrap: wrap; gap: .6rem 2rem; margin: 0; }
dt { font-size: .8rem; }
dd { margin: 0; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; overflow-wrap: normal; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; font-weight: 400; white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); font-size: .85rem; }
th.set { font-weight: 650; padding-top: .9rem; border-bottom: 1px solid var(--rule); }
td.best { font-weight: 650; }
@media (max-width: 40rem) {
  table { font-size: .88rem; }
  th, td { padding: .3rem 0 .3rem .5rem; }
  thead th, tbody th { white-space: normal; }
}
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr));
  gap: 2rem 2.5rem; }
figure { margin: 0; }
figure > svg { width: 100%; height: auto; display: block; }
svg text { font-family: system-ui, sans-serif; }
figcaption { font-weight: 600; margin-bottom: .3rem; }
.unit { font-weight: 400; font-size: .85rem; margin-left: .3rem; }
figure ul { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .2rem 0 0;
  padding: 0; font-size: .82rem; }
.key { width: 20px; height: 6px; margin-right: .35rem; vertical-align: middle; fill: none;
  stroke-width: 2; }
article { background: var(--card); border: 1px solid var(--rule); border-radius: .6rem;
  padding: 1rem 1.2rem; margin-bottom: 1rem; }
.meta, .gold, .score { font-size: .85rem; }
.answer { font-size: 1.05rem; }
.cite { color: var(--series-2); font-weight: 600; }
sup.cite { font-size: .75em; line-height: 0; }
article ol { list-style: none; padding: 0; margin: .8rem 0 0; font-size: .92rem; }
article li { border-top: 1px solid var(--rule); padding: .5rem 0 .2rem; }
mark { background: var(--mark); color: inherit; border-radius: .2rem; padding: 0 .15em; }
.badge { font-size: .75rem; font-weight: 600; padding: .05rem .5rem; border-radius: 1rem;
  border: 1px solid; }
.badge.right { color: var(--right); } .badge.wrong { color: var(--wrong); }
.badge.gold { color: var(--gold); }
"""

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
