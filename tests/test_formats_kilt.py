"""KILT: questions, provenance and pages of the knowledge source."""

import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imports import JUNK, WRONG, imported, paths, replaced, training_text, write_lines

from cosup_jax.data.formats import kilt
from cosup_jax.data.schema import Passage
from cosup_jax.errors import UserError

PAGES = [
    {
        **{"_id": "10", "wikipedia_id": "10", "wikipedia_title": "Oslo", "categories": "x"},
        "text": ["Oslo\n", "Oslo is a city.\n", "Section::::Food.\n", "Fish is eaten.\n", " "],
    },
    {"_id": 20, "wikipedia_id": 20, "wikipedia_title": "Sun", "text": ["Sun", "The sun is hot."]},
]


def cited(page="10", start=1, end=1):
    """One entry of a provenance."""
    return {
        **{"wikipedia_id": page, "title": "a title", "section": "Section::::Abstract"},
        **{"start_paragraph_id": start, "end_paragraph_id": end, "bleu_score": 1.0, "meta": {}},
    }


GOOD = {
    "id": "q1",
    "input": "Where?",
    "output": [
        {"answer": "In Oslo"},
        {"answer": "a city", "provenance": [cited(), cited("20"), cited()]},
        {"answer": "In Oslo", "provenance": [cited(start=3, end=3)]},
    ],
    "meta": {},
}


def write(directory, *rows, name="nq-dev-kilt.jsonl", pages=PAGES):
    """Both files, as a source names them."""
    source = write_lines(directory / "pages.json", *pages)
    return f"{write_lines(directory / name, *rows)}::{source}"


def read(directory, *rows, **where):
    return imported(kilt, write(directory, *rows, **where), directory / "cache")


def test_rows_and_pages_become_training_text(tmp_path):
    """Catches headings and titles as passages, evidence of an alternative, and repeated [Ret]."""
    dataset, problems = read(tmp_path, GOOD)
    assert not problems.counts
    assert list(dataset.passages.values()) == [
        Passage("10-1", "Oslo", "Oslo is a city."),
        Passage("10-3", "Oslo", "Fish is eaten."),
        Passage("20-1", "Sun", "The sun is hot."),
    ]
    (example,) = dataset.examples
    assert (example.answers, example.evidence) == (("In Oslo", "a city"), ("10-1", "20-1"))
    assert (example.id, example.task, example.split) == ("q1", "open_qa", "dev")
    assert training_text(dataset) == [
        [
            *[(1, "<ret>"), (2, "Oslo :: Oslo is a city."), (2, "<cs>"), (1, "Oslo is a city.")],
            *[(1, "<ce>"), (1, "<ret>"), (2, "Sun :: The sun is hot."), (2, "<cs>")],
            *[(1, "The sun is hot."), (1, "<ce>"), (1, "In Oslo"), (1, "<eos>")],
        ]
    ]


def test_a_range_leaves_headings_out(tmp_path):
    """Catches evidence that names the heading between two paragraphs, which is no passage."""
    row = GOOD | {"output": [{"answer": "a", "provenance": [cited(start=0, end=4)]}]}
    assert read(tmp_path, row)[0].examples[0].evidence == ("10-1", "10-3")


@pytest.mark.parametrize(
    ("name", "task", "split"),
    [
        ("fever-train-kilt.jsonl", "fact_check", "train"),
        ("hotpotqa-dev-kilt.jsonl", "multi_hop", "dev"),
        ("structured_zeroshot-train-kilt.jsonl", "slot_filling", "train"),
        ("trex-dev-kilt.jsonl", "slot_filling", "dev"),
        ("eli5-test-kilt.jsonl", "long_form", "test"),
        ("wow-train-kilt.jsonl", "dialog", "train"),
        ("triviaqa-dev_id-kilt.jsonl", "open_qa", "dev"),
        ("latest-trained.jsonl", "open_qa", "train"),
    ],
)
def test_the_name_tells_task_and_split(tmp_path, name, task, split):
    """Catches dev questions trained on, and a wrong instruction in the prompt."""
    (example,) = read(tmp_path, GOOD, name=name)[0].examples
    assert (example.task, example.split) == (task, split)


@pytest.mark.parametrize("provenance", [None, [], "absent"])
def test_a_row_without_provenance_stays(tmp_path, provenance):
    """Catches 10,000 questions of NQ that vanish: KILT gives no provenance for them."""
    output = {"answer": "a"} | ({} if provenance == "absent" else {"provenance": provenance})
    dataset, problems = read(tmp_path, GOOD | {"output": [output]})
    assert dict(problems.counts) == {"no_provenance": 1}
    assert training_text(dataset) == [[(1, "a"), (1, "<eos>")]]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"wikipedia_id": "10", "title": "Oslo"}, ("10-1",)),
        (cited(start=0, end=0), ("10-1",)),
        (cited(start=-1, end=-1), ("10-1",)),
        (cited(start=3, end=-1), ("10-1",)),
        (cited(start=2, end=2), ("10-3",)),
    ],
    ids=["page", "title", "not found", "end not found", "heading"],
)
def test_what_kilt_itself_writes_is_evidence(tmp_path, entry, expected):
    """Bug: rows of entity linking, answers found in a title and -1 refused: whole files of KILT."""
    dataset, problems = read(tmp_path, GOOD | {"output": [{"answer": "a", "provenance": [entry]}]})
    assert set(problems.counts) <= {"answer_not_in_evidence"}  # of a made-up answer
    assert dataset.examples[0].evidence == expected


UNUSABLE = [
    (cited("99"), "missing_passage"),
    (cited(start=4, end=4), "missing_passage"),
    (cited(start=1, end=5), "missing_passage"),
    (cited(start=1, end=10**12), "missing_passage"),
    (cited(start=3, end=1), "missing_passage"),
    (cited(start=-2), "wrong_type"),
    (cited(start="1"), "wrong_type"),
    (cited(start=True), "wrong_type"),
    (cited(end=None), "missing_field"),
    (cited(None), "missing_field"),
    (cited(["10"]), "wrong_type"),
]


@pytest.mark.parametrize(("entry", "kind"), [*UNUSABLE, ("10", "wrong_type")])
def test_a_bad_provenance_is_named(tmp_path, entry, kind):
    """Catches a gold passage that is another paragraph, or silently none."""
    row = GOOD | {"output": [{"answer": "a", "provenance": [entry]}]}
    dataset, problems = read(tmp_path, row)
    assert len(dataset.examples) == 0 and dict(problems.counts) == {kind: 1}
    assert problems.first_error[1:3] == (f"{tmp_path}/nq-dev-kilt.jsonl:1", "q1")


@pytest.mark.parametrize("beside", ["in one output", "in another output"])
def test_one_bad_entry_does_not_cost_the_good_ones(tmp_path, beside):
    """Bug: a single entry that cannot be used drops the row, good evidence and all."""
    for number, (entry, _) in enumerate(UNUSABLE):
        first, *others = [[entry, cited()]] if beside == "in one output" else [[entry], [cited()]]
        outputs = [{"answer": "a", "provenance": part} for part in (first, *others)]
        (directory := tmp_path / str(number)).mkdir()
        dataset, problems = read(directory, GOOD | {"output": outputs})
        assert dataset.examples[0].evidence == ("10-1",)
        assert dict(problems.counts) == {"evidence_dropped": 1}


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"output": None}, "missing_field"),
        ({"output": {}}, "wrong_type"),
        ({"output": []}, "empty_text"),
        ({"output": [{"provenance": [cited()]}]}, "empty_text"),
        ({"output": [{"answer": 3, "provenance": [cited()]}]}, "wrong_type"),
        ({"output": [{"answer": "a", "provenance": {"a": 1}}]}, "wrong_type"),
        ({"input": None}, "missing_field"),
        ({"input": " "}, "empty_text"),
        ({"id": None}, "missing_field"),
        ({"id": 1.5}, "wrong_type"),
    ],
)
def test_a_bad_row_is_named(tmp_path, fields, kind):
    """Catches questions without text or answer, as KILT's test files and TriviaQA's are."""
    dataset, problems = read(tmp_path, GOOD | fields)
    assert len(dataset.examples) == 0 and problems.counts[kind] == problems.errors == 1


@pytest.mark.parametrize(
    ("page", "kind"),
    [
        ({**PAGES[1], "wikipedia_id": None}, "missing_field"),
        ({**PAGES[1], "wikipedia_title": 3}, "wrong_type"),
        ({**PAGES[1], "text": None}, "wrong_type"),
        ({**PAGES[1], "text": ["Sun", 5]}, "wrong_type"),
        ({**PAGES[1], "text": ["Sun", "\ud800"]}, "not_utf8"),
        ("{", "not_json"),
    ],
)
def test_a_bad_page_is_named(tmp_path, page, kind):
    """Catches a page that is lost, and with it, unsaid, the evidence of its questions."""
    dataset, problems = read(tmp_path, GOOD, pages=[PAGES[0], page])
    assert dict(problems.counts) == {kind: 1, "evidence_dropped": 1}
    assert problems.listed[0].where == f"{tmp_path}/pages.json:2" and len(dataset.passages) == 2


def test_a_page_that_comes_twice_counts_once(tmp_path):
    """Catches evidence checked against the copy that does not count."""
    copy = PAGES[0] | {"text": ["Oslo", "Section::::Other"]}
    dataset, problems = read(tmp_path, GOOD, pages=[*PAGES, copy])
    assert len(dataset.examples) == 1 and dataset.passages["10-1"].text == "Oslo is a city."
    assert not problems.errors  # the copy has no passage


def test_the_knowledge_source_may_be_packed(tmp_path):
    """Catches a .gz that is read as if it were text."""
    lines = b"".join(json.dumps(page).encode() + b"\n" for page in PAGES)
    (tmp_path / "pages.json.gz").write_bytes(gzip.compress(lines))
    where = f"{write_lines(tmp_path / 'nq.jsonl', GOOD)}::{tmp_path / 'pages.json.gz'}"
    assert len(imported(kilt, where, tmp_path / "cache")[0].passages) == 3


def test_both_files_are_needed(tmp_path):
    """Catches a question file read without the pages, so that no evidence is found."""
    questions, _, pages = write(tmp_path, GOOD).partition("::")
    with pytest.raises(UserError, match="names no knowledge source"):
        kilt.files(questions)
    with pytest.raises(UserError, match="No such file"):
        kilt.files(f"{questions}::{pages}x")


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_mutation_gets_through_or_crashes(tmp_path_factory, data):
    """Catches an exception that is no UserError, and a broken field read as if it were none."""
    directory = tmp_path_factory.mktemp("kilt")
    needed = [("input",), ("output",)]
    broken = replaced(GOOD, data.draw(st.sampled_from(needed)), data.draw(WRONG))
    page = replaced(PAGES[1], data.draw(st.sampled_from(paths(PAGES[1]))), data.draw(JUNK))
    row = replaced(GOOD, data.draw(st.sampled_from(paths(GOOD))), data.draw(JUNK))
    dataset, problems = read(directory, row, broken | {"id": "broken"}, pages=[*PAGES, page])
    assert "broken" not in [example.id for example in dataset.examples] and problems.errors
