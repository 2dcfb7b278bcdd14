"""report.html and the closing table."""

import math
import re
from html.parser import HTMLParser

import pytest

from cosup_jax.report import closing_rows, closing_table, write_report

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
    source = {
        "number": 1,
        "id": "p<7>",
        "title": "Lyon & <Co>",
        "text": "Lyon is in <b>France</b>.",
        "score": 0.8125,
        "span": [14, 20],
        "gold": True,
    }
    example = {
        "set": "world",
        "question": "<script>alert(1)</script>?",
        "gold_answers": ["France", "<FR>"],
        "answer_parts": [{"text": "<France>", "cite": 1}, {"text": " yes", "cite": None}],
        "sources": [source],
        "right": False,
    }
    return {
        "title": "configs/<base>.py",
        "facts": {"steps": "1000", "devices": "<2>"},
        "metrics": [evaluation(0, 0.0), *training, evaluation(1000, 0.9)],
        "baselines": {
            "BM25": {"world": {"recall_at_1": 0.5}},
            "bigram": {"world": {"ntp_nats_per_token": 2.5}},
        },
        "examples": [example],
    }


@pytest.fixture
def run():
    return make_run()


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
    assert {"script", "b"} & set(parsed.tags) == {"b"}  # a source's title is set in bold
    assert parsed.tags.count("b") == 1
    text = "".join(parsed.text)
    for wanted in ("<script>alert(1)</script>?", "<FR>", "Lyon & <Co>", "p<7>", "<2>"):
        assert wanted in text


def test_page_needs_nothing_else(page):
    """Catches a picture, font or script that the page would fetch from somewhere."""
    links = [value for name, value in Page(page).attrs if name in ("src", "href", "xlink:href")]
    assert all(value.startswith("#") for value in links)
    assert "url(http" not in page and "@import" not in page


def test_plots_follow_the_theme(page):
    """Catches colours fixed at drawing time, which vanish on a dark page."""
    plots = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
    assert len(plots) == 6
    for plot in plots:
        assert not re.search(r"#[0-9a-f]{6}", plot)
        assert "var(--series-1)" in plot or "var(--series-2)" in plot
    assert "prefers-color-scheme: dark" in page


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
    """Catches a highlight shifted by escaping, and a citation without its number."""
    assert "Lyon is in &lt;b&gt;<mark>France</mark>&lt;/b&gt;." in page
    assert '&lt;France&gt;<sup class="cite">[1]</sup> yes' in page
    assert ">wrong</span>" in page and ">gold</span>" in page and "0.812" in page


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
        partial = run | {"metrics": metrics, "examples": [], "baselines": {}}
        write_report(tmp_path / "report.html", partial)
        assert not Page((tmp_path / "report.html").read_text()).open


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
