"""A study as a markdown table and as a self-contained page; both say the same."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cosup_jax.config import ARMS
from cosup_jax.report import tables
from cosup_jax.report.plots import Cloud, Measured, Score, by_row, scatter
from cosup_jax.report.style import CSS, PAGE
from cosup_jax.studies.arms import MINED, START
from cosup_jax.studies.results import FOUND, MAJORITY
from cosup_jax.studies.run import SHARE
from cosup_jax.studies.verdict import LEVEL, POINT, POWER

Study = Mapping[str, Any]  # study.json
Rows = Sequence[Mapping[str, Any]]
Cells = list[list[str]]

RULE = (
    f"Intervals are {LEVEL:.0%} ones, over seeds and questions both; of a metric with one number a "
    "run they are over seeds alone. Questions count as drawn one by one, though some may ask for "
    "one passage. Over seeds, values are taken to vary like a normal: where a run either begins to "
    "learn or does not, read the seeds. *Confirmed*: the interval of the paired difference "
    "excludes 0 in the claimed direction, and all seeds agree. *Not seen*: it holds nothing on "
    "that side, or, of shares and their differences, nothing beyond "
    f"{POINT:g} (of nats and the like nothing says what is as good as none); the opposite holds "
    "where a claim of the opposite would be confirmed. Else *undecided*; "
    f"so too where both arms are right in at most {POINT:.0%} of the items, or wrong in as few; "
    'where of "A - B" both A and B are so in both arms, or A and B differ by as little in both and '
    "the arms by as little in that; and wherever there is one seed. "
    "*Detectable* is the smallest true difference that would have shown with a chance of "
    f"{POWER:.0%}. Each line is judged by itself: of forty without any difference, about one is "
    "confirmed by chance."
)
ARMS_NOTE = (
    "Each is the study's config but for these settings. The metrics are told in "
    "docs/results/method.md."
)
PAIRS_NOTE = "A|B is A's Gen behind passages that B's pair retrieves."
STARTS_NOTE = (
    f"{START}A is the Gen that A's first run exports, {MINED}A its data with the hard negatives "
    "that it finds; such an A that is no arm stands below the arms."
)
NO_CLAIMS = "No two arms of a claim are measured yet."
NO_CLAIM = "No claim was asked for."
BETWEEN = "Claims between sets"
BETWEEN_NOTE = (
    "Whether what is claimed is larger in the first set than in another: the difference there less "
    "the difference here. The sets' questions are unlike, so that seeds are paired and questions "
    "are not; judged as the claims are, by points. Where an arm is near 0 or 1 in a set, points "
    "leave no room there: compare the log-odds."
)
MATRIX = "Generator by retriever"
MATRIX_NOTE = (
    "Share of right answers. A row is an arm whose Gen was trained to write. A column says where "
    "the passage comes from: an arm's Gen and Ctx retrieve it, for this Gen or for another arm's, "
    "or it is given. Along a row the writer stays the same, down a column the retrieval. "
    f"*{MAJORITY}*: one answer to all questions, the most frequent among the training rows of the "
    f"set's source, or in the set if that has none. *{FOUND}*: how often the right passage is "
    "among those shown; BM25's, of what it shows the first writer. What counts as right goes by a "
    "set's questions, as in --mode=evaluate; long and free answers have a score between 0 and 1."
)
PLANES = "The spaces"
PLANES_NOTE = (
    "Of each arm's first seed, a dot for a vector at length 1: of a passage, of Gen's state at "
    "[Ret] to a question of a held-out set (queries), of a text token's column of Gen's "
    "unembedding (vocabulary). The plane is that of their first two principal components, of all "
    "dots together; its share of their variance is given. What is apart here is apart; what meets "
    "here may still lie apart in other directions."
)
PLANES_PLACE = "How queries, passages and vocabulary lie on a plane, of each arm: see index.html."
AGREEMENT = "Over seeds"
AGREEMENT_NOTE = (
    "Do an arm's seeds come to one arrangement of the fixed passages (representational "
    "similarity)? The correlation, of each two seeds, of the cosines of pairs of passages: 1 where "
    "one space is the other, turned or mirrored. No two of these are independent, so that no "
    "interval is given; where all passages but a few have come to one vector, those few decide. "
    "Where seeds start from the same weights they agree from the start; an arm that never trains "
    "Ctx shows how far."
)
MATCHED_NOTE = (
    "{name} has no run: it is read, question by question, off the curve of {curve}, where NSP's "
    "gradient in Gen stands to NTP's, in the first batch, as it does in {to}; linear between two "
    "of them, over the ratio's logarithm. That a curve is no line is in no interval. Where {to} "
    "lies beyond the curve's ends under any seed, nothing is claimed."
)
WHOLE = "the whole run"  # what belongs to no set
UNTESTED = (
    "not tested: a run compared lacks this metric (config.study.measures names what is measured), "
    "its two parts share no item, or, of ARM@OTHER, no two nsp_weights of ARM have OTHER's "
    "gradient_ratio/at_start between them under some seed"
)
PARAMETERS_NOTE = (
    "Parameters are those that a run holds, whether it trains them or not: N leaves Ctx as it was."
)
RUNS_NOTE = (
    "What a command reads below `arms/` the study itself makes before that run: a stage 0, or "
    "mined passages."
)
_NONE = "-"


def markdown(study: Study) -> str:
    """The whole study, with the command of every run."""
    parts = [f"# {study['name']}", study["question"], _facts(study), f"`{study['command']}`"]
    parts.append("\n".join(f"- **{claim}**: {told}" for claim, told in _closing(study)))
    parts += ["## Arms", _arms_note(study), _table(setting_cells(study["settings"]))]
    parts += ["## Claims", _rule(study)]
    if study["claims"]:
        parts += [_table(claim_cells(study["claims"])), *_matched_notes(study)]
    if study["between"]:
        parts += [f"## {BETWEEN}", BETWEEN_NOTE, _table(claim_cells(study["between"]))]
    if study["matrix"]:
        parts += [f"## {MATRIX}", MATRIX_NOTE]
    for name, rows in _by(study["matrix"], "set").items():
        parts += [f"### {name}", _table(matrix_cells(rows, study["arms"]))]
    if study["planes"]:
        parts += [f"## {PLANES}", PLANES_PLACE]
    if study["agreement"]:
        cells = agreement_cells(study["agreement"])
        parts += [f"## {AGREEMENT}", AGREEMENT_NOTE, _table(cells)]
    for name, rows in _by(study["measured"], "set").items():
        parts += [f"## {name or WHOLE}", _table(arm_cells(rows, study["arms"]))]
    parts += ["## Runs", *_runs_note(study), _table(run_cells(study["runs"]))]
    return "\n\n".join(parts) + "\n"


def page(study: Study) -> str:
    """The same, with plots of every metric that is a share."""
    note = _emphasised(_rule(study))
    table = _html_table(setting_cells(study["settings"]), left=2)
    sections = [f"<h2>Arms</h2><p class='note'>{html.escape(_arms_note(study))}</p>{table}"]
    sections.append(f"<h2>Claims</h2><p class='note'>{note}</p>")
    if study["claims"]:
        sections.append(_html_table(claim_cells(study["claims"]), left=3))
        sections += [f"<p class='note'>{html.escape(n)}</p>" for n in _matched_notes(study)]
    if study["between"]:
        sections.append(f"<h2>{BETWEEN}</h2><p class='note'>{BETWEEN_NOTE}</p>")
        sections.append(_html_table(claim_cells(study["between"]), left=3))
    if study["matrix"]:
        sections.append(f"<h2>{MATRIX}</h2><p class='note'>{_emphasised(MATRIX_NOTE)}</p>")
    for name, rows in _by(study["matrix"], "set").items():
        table = _html_table(matrix_cells(rows, study["arms"]))
        sections.append(f"<section><h3>{html.escape(name)}</h3>{table}</section>")
    if study["planes"]:
        plots = "".join(map(_plane, study["planes"]))
        note = f"<p class='note'>{PLANES_NOTE}</p>"
        sections.append(f'<h2>{PLANES}</h2>{note}<div class="charts">{plots}</div>')
    if study["agreement"]:
        table = _html_table(agreement_cells(study["agreement"]))
        sections.append(f"<h2>{AGREEMENT}</h2><p class='note'>{AGREEMENT_NOTE}</p>{table}")
    for name, rows in _by(study["measured"], "set").items():
        plots = "".join(_plot(name, metric, part) for metric, part in _by(rows, "metric").items())
        content = _html_table(arm_cells(rows, study["arms"])) + (
            f'<div class="charts">{plots}</div>' if plots else ""
        )
        sections.append(f"<section><h2>{html.escape(name or WHOLE)}</h2>{content}</section>")
    notes = "".join(f"<p class='note'>{note.replace('`', '')}</p>" for note in _runs_note(study))
    sections.append(f"<h2>Runs</h2>{notes}{_html_table(run_cells(study['runs']), left=9)}")
    head = f"<p class='kicker'>{html.escape(study['name'])}</p><h1>{html.escape(study['question'])}"
    closing = "".join(
        f"<li><b>{html.escape(claim)}</b>: {html.escape(told)}</li>"
        for claim, told in _closing(study)
    )
    facts = f"{html.escape(_facts(study))}</p><p><code>{html.escape(study['command'])}</code>"
    body = f"{head}</h1><p class='note'>{facts}</p><ul>{closing}</ul>"
    return PAGE.format(title=html.escape(study["name"]), style=CSS, body=body + "".join(sections))


def closing(study: Study) -> str:
    """The claims as aligned plain text, for the terminal."""
    untested = [f"\n{claim}: {UNTESTED}" for claim in study["untested"]]
    if not study["claims"]:
        return _rule(study) + "".join(untested)
    return tables.aligned(claim_cells(study["claims"]), left=3) + "".join(untested)


def _rule(study: Study) -> str:
    """By which claims are judged, or why none is."""
    if study["claims"]:
        return RULE
    return NO_CLAIMS if study["untested"] else NO_CLAIM


def setting_cells(settings: Mapping[str, Mapping[str, Any]]) -> Cells:
    """A heading, and a row for each arm."""
    told = lambda own: (
        ", ".join(f"{key}={value!r}" for key, value in own.items()) or "as the study's config"
    )
    return [["arm", "settings"], *([arm, told(own)] for arm, own in settings.items())]


def claim_cells(rows: Rows) -> Cells:
    """A heading, and a row for each claim in each set."""
    heading = ["difference", "95 %", "log-odds", "by seed", "detectable", "items"]
    cells = [["claim", "set", "verdict", *heading]]
    for row in rows:
        seeds = ", ".join(f"{_plain(value):+.3f}" for value in row["by_seed"])
        detectable = _NONE if row["detectable"] is None else f"{row['detectable']:.3f}"
        odds = _NONE if row["log_odds"] is None else f"{row['log_odds']:+.2f}"
        numbers = [f"{_plain(row['mean']):+.3f}", _interval(row, "+"), odds, seeds, detectable]
        told = [row["claim"], row["set"] or WHOLE, row["verdict"]]
        cells.append([*told, *numbers, f"{row['items']:,}"])
    return cells


def matrix_cells(rows: Rows, arms: Sequence[str]) -> Cells:
    """A heading, and a row for each writer, in the study's order, of one set."""
    by_row, columns = _by(rows, "row"), list(_by(rows, "column"))
    cells = [["generator", *(ARMS.get(column, column) for column in columns)]]
    for name in filter(by_row.__contains__, (*arms, MAJORITY, FOUND)):
        found = {row["column"]: row for row in by_row[name]}
        told = [_with_interval(found[c]) if c in found else _NONE for c in columns]
        cells.append([name, *told])
    return cells


def arm_cells(rows: Rows, arms: Sequence[str]) -> Cells:
    """A heading, and a row for each arm that has one, in the study's order, of one set: the mean
    (its interval; what each seed has)."""
    metrics, by_arm = list(_by(rows, "metric")), _by(rows, "arm")
    cells = [["arm", *metrics, "seeds", "items, at most"]]
    for arm in filter(by_arm.__contains__, arms):
        own = by_arm[arm]
        found = {row["metric"]: row for row in own}
        told = [_with_seeds(found[m]) if m in found else _NONE for m in metrics]
        most = max(row["items"] for row in own)
        cells.append([arm, *told, str(own[0]["seeds"]), f"{most:,}"])
    return cells


def agreement_cells(rows: Rows) -> Cells:
    """A heading, and a row for each arm."""
    cells = [["arm", "mean", "of each two seeds", "pairs of passages"]]
    for row in rows:
        known = [value for value in row["by_pair"] if value is not None]
        told = [_NONE if value is None else f"{value:.3f}" for value in row["by_pair"]]
        mean = f"{sum(known) / len(known):.3f}" if known else _NONE
        cells.append([row["arm"], mean, ", ".join(told), f"{row['items']:,}"])
    return cells


def run_cells(runs: Rows) -> Cells:
    """A heading, and a row for each run."""
    cells = [["arm", "seed", "steps", "parameters", "TFLOP", "examples", "directory", "command"]]
    for run in runs:
        sizes = [f"{run['steps']:,}", f"{run['parameters']:,}", _few(run["flops"] / 1e12)]
        sizes.append(f"{run['examples']:,}")
        place = [run["directory"], f"`{run['command']}`"]
        cells.append([run["arm"], str(run["seed"]), *sizes, *place])
    return cells


def _closing(study: Study) -> list[tuple[str, str]]:
    """Of each claim, in which sets it is confirmed, not seen, or undecided."""
    found = []
    for claim, rows in _by(study["claims"], "claim").items():
        verdicts = _by(rows, "verdict")
        told = [
            f"{verdict} in {', '.join(row['set'] or WHOLE for row in part)}"
            for verdict, part in verdicts.items()
        ]
        found.append((claim, "; ".join(told)))
    return found + [(claim, UNTESTED) for claim in study["untested"]]


def _arms_note(study: Study) -> str:
    values = [str(value) for own in study["settings"].values() for value in own.values()]
    notes = [ARMS_NOTE]
    if any("|" in arm for arm in study["arms"]):
        notes.append(PAIRS_NOTE)
    if any(value.startswith((START, MINED)) for value in values):
        notes.append(STARTS_NOTE)
    return " ".join(notes)


def _matched_notes(study: Study) -> list[str]:
    return [
        MATCHED_NOTE.format(name=name, curve=", ".join(curve), to=name.partition("@")[2])
        for name, curve in study["matched"].items()
    ]


def _runs_note(study: Study) -> list[str]:
    made = any("/arms/" in run["command"] for run in study["runs"])
    return [PARAMETERS_NOTE, *([RUNS_NOTE] if made else [])]


def _few(number: float) -> str:
    """Two digits of what is small."""
    return f"{number:,.1f}" if number >= 10 else f"{number:.2g}"


def _facts(study: Study) -> str:
    machines = " and ".join(study["measured_on"])
    code = f"measured by code {', '.join(study['measured_by_code'])}"
    return f"{', '.join(filter(None, (study['date'], machines, code)))}; {study['state']}."


def _plot(name: str, metric: str, rows: Rows) -> str:
    """None of what is no share."""
    known = [row for row in rows if row["low"] is not None]
    if not known or known[0]["kind"] != SHARE:
        return ""
    scores = [Score(row["mean"], row["low"], row["high"]) for row in known]
    measured = [Measured("mean over seeds", 2, scores)]
    return by_row(metric, "share", [row["arm"] for row in known], measured, key=name)


def _plane(found: Mapping[str, Any]) -> str:
    """Colours go round where there are many sets."""
    clouds = [
        Cloud(kind, 1 + place if place < 2 else 3 + (place - 2) % 5, points)
        for place, (kind, points) in enumerate(found["points"].items())
    ]
    return scatter(found["arm"], f"{found['share']:.0%} of the variance", clouds, key=PLANES)


def _with_interval(row: Mapping[str, Any]) -> str:
    found = _interval(row)
    return f"{row['mean']:.3f}" + (f" ({found})" if found != _NONE else "")


def _with_seeds(row: Mapping[str, Any]) -> str:
    """And of how many scores, where not every seed has one of each item."""
    if len(row["by_seed"]) < 2:
        return _with_interval(row)
    seeds = ", ".join(_NONE if value is None else f"{value:.3f}" for value in row["by_seed"])
    if row["scores"] < len(row["by_seed"]) * row["items"]:
        seeds += f"; of {row['scores']}"
    return f"{_with_interval(row).rstrip(')')}; {seeds})"


def _plain(value: float) -> float:
    """Without what rounding in floats leaves of 0, and its sign."""
    return 0.0 if abs(value) < 1e-9 else value


def _interval(row: Mapping[str, Any], sign: str = "") -> str:
    """An end that is not 0 is not written as 0."""
    if row["low"] is None:
        return _NONE
    ends = (_plain(row["low"]), _plain(row["high"]))
    return " to ".join(
        f"{end:{sign}.3f}" if abs(end) >= 5e-4 or end == 0 else f"{end:{sign}.1g}" for end in ends
    )


def _by(rows: Rows, key: str) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list] = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found


def _table(cells: Cells) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    escaped.insert(1, ["---"] * len(cells[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


def _html_table(cells: Cells, left: int = 1) -> str:
    kind = lambda place: ' class="left"' if place < left else ""
    line = lambda row, tag: "".join(
        f"<{tag}{kind(place)}>{_html_cell(cell.strip('`'))}</{tag}>"
        for place, cell in enumerate(row)
    )
    head, *rows = cells
    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="wide"><table class="scores"><thead><tr>{line(head, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _html_cell(text: str) -> str:
    """An interval stands below its mean, in small."""
    if found := re.fullmatch(r"([+-]?[\d.]+) \((.+)\)", text):
        return f"{found[1]}<br><small>{html.escape(found[2])}</small>"
    return html.escape(text)


def _emphasised(text: str) -> str:
    pieces = html.escape(text).split("*")
    return "".join(f"<em>{p}</em>" if i % 2 else p for i, p in enumerate(pieces))
