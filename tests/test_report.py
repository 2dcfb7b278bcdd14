"""report.html and the closing table."""

import errno
import json
import math
import re
from html.parser import HTMLParser

import pytest

from cosup_jax.answer import records
from cosup_jax.errors import UserError
from cosup_jax.report import answers
from cosup_jax.report import page as page_lib
from cosup_jax.report.page import closing_rows, closing_table, write_report
from cosup_jax.report.plots import Cloud, Measured, Score, by_row, scatter
from cosup_jax.report.tables import answers_table

VOID = {"meta", "br", "link", "img", "input"}


class Page(HTMLParser):
    """Checks nesting and gathers what the tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attrs, self.text = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attrs.extend(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attrs.extend(attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def evaluation(step, recall):
    scores = {"recall_at_1": recall, "recall_at_10": recall, "mrr_at_10": recall}
    return (
        {"step": step}
        | {f"eval/world/{k}": v for k, v in scores.items()}
        | {"eval/world/ntp_nats_per_token": 3.0 - recall}
    )


def scores(mean, n=20):
    part = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": n}
    return {"acc_substring": part, "retrieval_hit": part, "containment_citation_rec": part}


def arm(name, label, mean, **more):
    splits = {"retrieval succeeded": {"questions": 12, "scores": scores(mean, 12)}}
    splits["retrieval failed"] = {"questions": 8, "scores": scores(mean / 2, 8)}
    splits["evidence seen"] = {"questions": 0, "scores": {}}
    found = {"arm": name, "label": label, "passages": 1000, "subset": False, "splits": splits}
    return found | {"questions": 20, "scores": scores(mean), "minus_trained": {}} | more


def make_summary():
    arms = [
        arm("corpus", "trained <retrieval>", 0.7, passages=1000),
        arm("corpus_100", "trained <retrieval>", 0.8, passages=100, subset=True),
        arm("corpus_hard_10", "trained, hard passages", 0.6, passages=10, subset=True),
        arm("gold", "gold passage", 0.9, passages=None, minus_trained=scores(0.2)),
    ]
    part = {"name": "world <b>", "questions": 20, "passages": 1000, "in_domain": True}
    part |= {"evidence_seen": 0.25, "correct": "acc_substring", "arms": arms}
    part["references"] = [{"label": "majority label (no)", "passages": None, "scores": scores(0.3)}]
    domains = {"in-domain": {"sets": ["world <b>"], "scores": {"acc_substring": 0.7}}}
    other = part | {"name": "elements"}
    return {
        "step": 1000,
        "judge": {"name": "containment", "prefix": "containment_"},
        "sets": [part, other],
        "domains": domains,
    }


def make_run():
    training = [
        {
            "step": step,
            "ntp/nats_per_token": 8 / step + step % 7,
            "nsp/nats_per_ret": 4 / step + step % 5,
            "grad/norm_gen": 1.0,
            "grad/norm_ctx": 2.0,
            "perf/tokens_per_s": 1000.0,
        }
        for step in range(1, 1001)
    ]
    source = {"number": 1, "id": "p<7>", "title": "Lyon & <Co>"}
    source["text"] = "Lyon is in <b>France</b>. It is old & big."
    record = {
        "set": "world",
        "id": "q<1>",
        "question": "<script>alert(1)</script>?",
        "answers": ["France", "<FR>"],
        "evidence": ["p<7>"],
        "output": "france[1]. <i>is & is</i>[2] big[1]",
        "spans": [
            {"text": " france.", "passage": "p<7>", "number": 1},
            {"text": "france", "passage": "p<7>", "number": 1},
            {"text": "It is old & big", "passage": "p<7>", "number": 1},
        ],
        "retrieved": [{"id": "p<7>", "score": 0.8125, "number": 1}],
        "sources": [source],
        "correct": 0.0,
    }
    other = record | {"output": "", "sources": [], "retrieved": [], "spans": [], "correct": 1.0}
    return {
        "title": "configs/<base>.py",
        "facts": {"steps": "1000", "devices": "<2>"},
        "metrics": [evaluation(0, 0.0), *training, evaluation(1000, 0.9)],
        "baselines": {
            "BM25": {"world": {"recall_at_1": 0.5}},
            "bigram": {"world": {"ntp_nats_per_token": 2.5}},
        },
        "summary": make_summary(),
        "answers": {"world": {"trained <retrieval>": [record, record], "no retrieval": [other]}},
        "shown": 1,
    }


@pytest.fixture
def run():
    run = make_run()
    run["summary"]["sets"].pop()  # plots take time
    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    directory = tmp_path_factory.mktemp("page")
    write_report(directory / "report.html", make_run())
    assert [path.name for path in directory.iterdir()] == ["report.html"]
    return (directory / "report.html").read_text()


def test_user_text_is_escaped(page):
    """Catches a passage or question that becomes markup, or runs, in the reader's browser."""
    parsed = Page(page)
    assert not parsed.open
    assert "script" not in parsed.tags and "i" in parsed.tags  # an empty answer is said in italics
    assert parsed.tags.count("b") == 3  # a source's title, an arm's name, a domain's
    assert parsed.tags.count("i") == 1
    text = "".join(parsed.text)
    for wanted in (
        *("<script>alert(1)</script>?", "<FR>", "Lyon & <Co>", "p<7>", "q<1>", "<2>"),
        *("trained <retrieval>", "world <b>", "<i>is & is</i>"),
    ):
        assert wanted in text


def test_page_needs_nothing_else(page):
    """Catches a picture, font or script that the page would fetch from somewhere."""
    links = [value for name, value in Page(page).attrs if name in ("src", "href", "xlink:href")]
    assert all(value.startswith("#") for value in links)
    assert "url(http" not in page and "@import" not in page


def test_a_full_disk_ends_in_a_line(run, tmp_path, monkeypatch):
    """Catches a traceback after the last answer."""

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(page_lib, "write_atomic", full)
    with pytest.raises(UserError, match=r"cannot write .*report\.html: No space left"):
        write_report(tmp_path / "report.html", run)


def test_plots_follow_the_theme(page):
    """Catches colours fixed at drawing time, which vanish on a dark page."""
    plots = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
    assert len(plots) == 6 + 2 * 4
    for plot in plots:
        assert not re.search(r"#[0-9a-f]{6}", plot)
        assert "var(--series-1)" in plot or "var(--series-2)" in plot
    assert "prefers-color-scheme: dark" in page


def test_each_way_to_fill_a_corpus_has_its_plot(monkeypatch):
    """Bug: one line through drawn passages and hard ones, or one of the two without the whole."""
    drawn = {}
    draw = lambda title, unit, sizes, *_: drawn.setdefault(title, sizes) and ""
    monkeypatch.setattr(answers, "by_size", draw)
    answers.tables_and_plots(make_summary())
    assert drawn == {
        "Size of the corpus, trained <retrieval>": [100, 1000],
        "Size of the corpus, trained, hard passages": [10, 1000],
    }


def test_svg_names_do_not_clash(page):
    """Catches a plot clipped or marked by its neighbour's shapes, as both use the same id."""
    names = [value for name, value in Page(page).attrs if name == "id"]
    assert len(names) == len(set(names))
    targets = re.findall(r'(?:url\(|href=")#([^)"]+)', page)
    assert set(targets) <= set(names)


def test_long_runs_stay_small(page):
    """Catches a page that grows by every logged step."""
    assert max(map(len, re.findall(r' d="[^"]*"', page))) < 15_000


def test_grounded_span_and_citation(page):
    """Catches a highlight shifted by escaping or lost to a capital letter, a span that the passage
    does not hold passed off as grounded, and a number that cites nothing."""
    assert "in &lt;b&gt;<mark>France</mark>&lt;/b&gt;. <mark>It is old &amp; big</mark>." in page
    assert "not in this passage</span> france.</p>" in page
    shown = (
        '<p class="answer">france<sup class="cite">[1]</sup>. &lt;i&gt;is &amp; is&lt;/i&gt;[2] '
    )
    assert shown in page
    assert ">wrong</span>" in page and ">gold</span>" in page and "0.812" in page
    assert page.count("<article>") == 1  # shown: 1 of two
    assert ">right</span> <b>no retrieval</b> <i>empty answer</i>" in page


def test_tables_of_answers(page):
    """Catches a score under another's heading, and intervals or denominators left out."""
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]
    heading = next(row for row in cells if "answered with" in row)
    (gold,) = [row for row in cells if row[:1] == ["gold passage"] and len(row) == len(heading)][:1]
    line = dict(zip(heading, gold, strict=True))
    assert line["correct"] == "0.900" and line["95 %"] == "0.800-1.000" and line["n"] == "20"
    assert line["hit"] == "0.900" and line["F1"] == "-" and line["passages"] == "-"
    assert ["", "retrieval failed", "0.350", "0.250-0.450", "0.350", "8"] in cells
    assert ["majority label (no)", "-", "0.300"] in [row[:3] for row in cells]
    assert "+0.200" in page  # gold minus trained


def test_what_the_judge_did_not_read_is_said(page):
    """Bug: verdicts on passages that were cut off, which nothing tells from others."""
    said = "1,200 pairs of passage and claim cut to the judge's context"
    summary = make_summary()
    assert "pairs of passage" not in page + answers_table(summary)
    summary["judge"] = {"name": "m", "prefix": "", "cut": 1200}
    summary["sets"] = []
    assert said in answers.tables_and_plots(summary) and said in answers_table(summary)


def test_dots_lie_where_the_scores_are():
    """Catches a mean drawn in another row, and an interval that is not the score's own."""
    found = [Score(0.0, 0.0, 0.0), None, Score(0.5, 0.25, 1.0), Score(1.0, 1.0, 1.0)]
    svg = by_row("arms", "share", ["a", "b", "c", "d"], [Measured("correct", 2, found)])
    dots = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"[^>]*series-2', svg)
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, dot)) for dot in dots]
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.01)
    assert y1 - y0 == pytest.approx(2 * (y2 - y1), abs=0.01)  # a row is left out
    bars = re.findall(r'd="M ([\d.]+) ([\d.]+) \nL ([\d.]+) [\d.]+ \n"[^>]*series-2', svg)
    (bar,) = [bar for bar in bars if float(bar[1]) == y1]
    assert float(bar[0]) == pytest.approx(x0 + (x2 - x0) / 4, abs=0.01)
    assert float(bar[2]) == pytest.approx(x2, abs=0.01)


def test_points_of_a_plane_lie_on_one_scale():
    """Bugs: a plane that is stretched one way; x for y; a cloud in another's colour, or one that
    hides what lies below it; a colour that is not the page's."""
    clouds = [Cloud("tokens <V>", 1, [[0, 0], [0, 3]]), Cloud("passages", 2, [[1, 0], [9, 3]])]
    svg = scatter("C", "73%", clouds, key="plane")
    pattern = r'<use [^>]*x="([\d.]+)" y="([\d.]+)" style="fill: var\(--series-(\d)\); fill-op'
    dots = [(float(x), float(y), int(color)) for x, y, color in re.findall(pattern, svg)]
    assert [color for *_, color in dots] == [1, 1, 2, 2] and svg.count("<use") == 4
    (x0, y0, _), (x1, y1, _), (x2, y2, _), (x3, y3, _) = dots
    assert x1 == x0 and y2 == y0 and y3 == y1 < y0  # y points down
    scale = x2 - x0
    assert (y0 - y1, x3 - x0) == (pytest.approx(3 * scale), pytest.approx(9 * scale))
    assert not Page(svg).open and "tokens &lt;V&gt;</li>" in svg and "73%" in svg
    assert not re.search(r"#[0-9a-f]{6}", svg)


def test_a_label_is_no_formula():
    """Bug: a retriever's path with dollars in it ends an evaluation in matplotlib's ValueError."""
    label = r"retrieval by $runs/a\b_$x\$"
    svg = by_row("arms", "share", [label], [Measured("correct", 2, [Score(0.5, 0.25, 1.0)])])
    assert f">{label}</text>" in svg


def test_report_is_reproducible(run, tmp_path):
    """Catches a date or random id that makes two reports of one run differ."""
    pages = []
    for name in ("a", "b"):
        write_report(tmp_path / name, run)
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_run_without_evaluation(run, tmp_path):
    """Catches a crash on a run that stopped before its first line, or has no examples."""
    for metrics in ([], run["metrics"][1:2], run["metrics"][:1]):
        partial = run | {"metrics": metrics, "answers": {}, "summary": None, "baselines": {}}
        write_report(tmp_path / "report.html", partial)
        assert not Page((tmp_path / "report.html").read_text()).open


def test_only_the_answers_of_the_summary_are_shown(run, tmp_path):
    """Bug: a KeyError at the end of training, or answers of another checkpoint under this one's
    scores, where a later evaluation was killed after the summary was written."""
    part, record = run["summary"]["sets"][0], run["answers"]["world"]["no retrieval"][0]
    part |= {"name": "world", "arms": [arm("corpus", "trained", 0.7, run="now")]}
    unscored = {name: record[name] for name in ("id", "question", "answers", "output")}
    scored = record | {"scores": {"em": 1.0}}
    rows = [scored | {"run": "now"}, unscored | {"run": "now"}, scored | {"run": "later"}]
    directory = tmp_path / "evaluation" / "world"
    directory.mkdir(parents=True)
    (directory / "corpus.jsonl").write_text(records.lines(rows))
    (directory.parent / "summary.json").write_text(json.dumps(run["summary"]))
    assert page_lib.read_run(tmp_path, 3)["answers"] == {"world": {"trained": rows[:1]}}


def test_values_that_are_not_finite(run, tmp_path):
    """Catches a diverged run that has no report, when it is wanted most."""
    run["metrics"][5]["ntp/nats_per_token"] = math.nan
    run["metrics"][6]["grad/norm_gen"] = math.inf
    for line in run["metrics"]:
        if "nsp/nats_per_ret" in line:
            line["nsp/nats_per_ret"] = math.nan
    name = next(key for key in run["metrics"][-1] if key.startswith("eval/") and "ntp" in key)
    run["metrics"][-1][name] = None  # how metrics.jsonl keeps a NaN
    write_report(tmp_path / "report.html", run)
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert closing_table(closing_rows(run["metrics"], run["baselines"])).count("\n") > 2


def test_closing_rows(run):
    """Catches the untrained score shown as the result, or a baseline filed under another set."""
    rows = closing_rows(run["metrics"], run["baselines"])
    assert [row["system"] for row in rows] == [
        "trained, 1000 steps",
        "zero steps",
        "BM25",
        "bigram",
    ]
    assert [row.get("recall_at_1") for row in rows] == [0.9, 0.0, 0.5, None]
    assert {row["set"] for row in rows} == {"world"}
    one = closing_rows(run["metrics"][:1], {})
    assert [row["system"] for row in one] == ["zero steps"]


def test_closing_table_is_aligned(run):
    """Catches a number printed under another's heading."""
    lines = closing_table(closing_rows(run["metrics"], run["baselines"])).splitlines()
    assert len({len(line) for line in lines}) == 1
    end = lines[0].index("recall@1 ") + len("recall@1")
    assert [line[end - 5 : end].strip() for line in lines[2:]] == ["0.900", "0.000", "0.500", "-"]
    assert lines[2].startswith("world") and lines[3].startswith(" ")


def test_answers_that_were_measured_alone_close_nothing(run):
    """Catches a closing table of dashes, where the last line of metrics holds answers only."""
    last = {"step": 1001, "eval/world/answers_correct": 0.5}
    rows = closing_rows([*run["metrics"], last], run["baselines"])
    assert rows[0]["system"] == "trained, 1000 steps" and rows[0]["recall_at_1"] == 0.9


def test_table_of_answers_is_aligned():
    """Catches a number printed under another's heading, and a set without what it is judged by."""
    *lines, note, domain = answers_table(make_summary()).splitlines()
    assert note.startswith("R-prec is the share ")
    assert len({len(line) for line in lines}) == 1
    assert domain == (
        "in-domain, mean over the 1 set whose source training reads, by trained <retrieval>: "
        "acc_substring 0.700"
    )
    end = lines[0].index("correct") + len("correct")
    found = [line[end - 5 : end] for line in lines[2:9]]
    assert found == ["0.700", "0.700", "0.350", "0.800", "0.600", "0.900", "0.300"]
    assert "- retrieval failed" in lines[4] and lines[4].endswith(" 8")
    assert lines[2].startswith("world <b>") and lines[3].startswith("  acc_substring")
    assert lines[9].startswith("elements")
