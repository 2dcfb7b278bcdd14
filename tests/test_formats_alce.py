"""ALCE: items with retrieved passages, of three data sets."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imports import JUNK, WRONG, imported, paths, replaced, training_text

from cosup_jax.data.formats import alce
from cosup_jax.data.rows import content_id
from cosup_jax.data.schema import Passage
from cosup_jax.errors import UserError

DOCS = [
    {"id": "7", "title": "Oslo", "text": "Oslo is a city.", "score": 0.5, "answers_found": [0, 1]},
    {"id": 8, "title": "Sun", "text": "It is hot.", "score": 0.4},
]
ASQA = {
    "sample_id": "s1",
    "question": "Where and when?",
    "qa_pairs": [
        {"question": "Where?", "short_answers": ["Oslo", "in Oslo"], "context": "c"},
        {"question": "When?", "short_answers": ["1048", "Oslo"], "wikipage": None},
    ],
    "annotations": [{"long_answer": "x", "knowledge": []}],
    "answer": "In Oslo, in 1048.",
    "docs": DOCS,
}
QAMPARI = {
    "id": "q1",
    "question": "Which?",
    "answers": [["Oslo", "Christiania"], ["Bergen"]],
    "answer": "Oslo, Bergen.",
    "docs": DOCS,
}
ELI5 = {
    "question": "Why?",
    "question_ctx": "[removed]",
    "answer": "Because.",
    "claims": ["It is so."],
    "docs": [{"title": "Web", "url": "u", "text": "A page."}],
}


def read(directory, *items):
    path = directory / "asqa.json"
    path.write_text(json.dumps(list(items)))
    return imported(alce, path, directory / "cache")


def test_items_become_questions_to_rank(tmp_path):
    """Catches candidates taken for evidence, lost answers, and test items in training."""
    dataset, problems = read(tmp_path, ASQA, QAMPARI, ELI5)
    assert not problems.counts and set(dataset.splits) == {"test"}
    web = content_id("Web", "A page.")
    assert list(dataset.passages.values()) == [
        Passage("7", "Oslo", "Oslo is a city."),
        Passage("8", "Sun", "It is hot."),
        Passage(web, "Web", "A page."),
    ]
    assert [(e.id, e.task, e.answers, e.candidates, e.evidence) for e in dataset.examples] == [
        ("s1", "long_form", ("Oslo", "in Oslo", "1048"), ("7", "8"), ()),
        ("q1", "open_qa", ("Oslo", "Christiania", "Bergen"), ("7", "8"), ()),
        ("2", "long_form", (), (web,), ()),
    ]
    assert training_text(dataset) == [
        [(1, text), (1, "<eos>")] for text in ("In Oslo, in 1048.", "Oslo, Bergen.", "Because.")
    ]


def test_what_scores_need_is_kept(tmp_path):
    """Bug: sub-questions, aliases and claims melted into one list, from which neither ASQA's
    recall nor QAMPARI's nor ELI5's can be computed."""
    dataset, _ = read(tmp_path, ASQA, QAMPARI, ELI5)
    assert [example.answer_groups for example in dataset.examples] == [
        (("Oslo", "in Oslo"), ("1048", "Oslo")),
        (("Oslo", "Christiania"), ("Bergen",)),
        (("It is so.",),),
    ]


def test_the_first_text_of_an_id_stays(tmp_path):
    """Bug: a third file that agrees with the first is told to differ from it."""
    docs = [[{**DOCS[0], "text": text}] for text in ("one", "two", "one")]
    items = [QAMPARI | {"id": f"q{i}", "docs": found} for i, found in enumerate(docs)]
    dataset, problems = read(tmp_path, *items)
    assert dict(problems.counts) == {"duplicate_id": 1} and dataset.passages["7"].text == "one"


def test_two_texts_under_one_id_are_noted(tmp_path):
    """Catches a question ranked over a text that its file does not have."""
    other = QAMPARI | {"docs": [DOCS[0] | {"text": "Oslo is a town."}]}
    dataset, problems = read(tmp_path, ASQA, other)
    assert dict(problems.counts) == {"duplicate_id": 1}
    assert problems.first_error[1:3] == (f"{tmp_path}/asqa.json[1]", "7")
    assert dataset.passages["7"].text == "Oslo is a city." and len(dataset.examples) == 2


def test_a_document_listed_twice_is_one_candidate(tmp_path):
    """Catches a passage that is ranked twice and shifts everything below it."""
    (example,) = read(tmp_path, ASQA | {"docs": [*DOCS, DOCS[0]]})[0].examples
    assert example.candidates == ("7", "8")


def test_an_annotation_that_is_null_is_none(tmp_path):
    """Catches ALCE's own null fields taken for errors."""
    fields = {"qa_pairs": None, "annotations": None, "sample_id": None}
    dataset, problems = read(tmp_path, ASQA | fields)
    assert not problems.counts and dataset.examples[0].id == "0"


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"docs": None}, "missing_field"),
        ({"docs": []}, "missing_field"),
        ({"docs": {"id": 1}}, "wrong_type"),
        ({"docs": [DOCS[0], None]}, "wrong_type"),
        ({"docs": [DOCS[0] | {"text": None}]}, "missing_field"),
        ({"docs": [DOCS[0] | {"text": " "}]}, "empty_text"),
        ({"docs": [DOCS[0] | {"id": [7]}]}, "wrong_type"),
        ({"docs": [DOCS[0] | {"title": "\ud800"}]}, "not_utf8"),
        ({"question": None}, "missing_field"),
        ({"question": ["Why?"]}, "wrong_type"),
        ({"answer": None, "qa_pairs": None}, "missing_field"),
        ({"answer": 5}, "wrong_type"),
        ({"qa_pairs": {"short_answers": ["a"]}}, "wrong_type"),
        ({"qa_pairs": [{"question": "Where?"}]}, "missing_field"),
        ({"qa_pairs": [{"short_answers": "Oslo"}]}, "wrong_type"),
        ({"answers": [["a", 3]]}, "wrong_type"),
        ({"answers": "Oslo"}, "wrong_type"),
        ({"claims": "a", "qa_pairs": None}, "wrong_type"),
        ({"sample_id": 1.5}, "wrong_type"),
    ],
)
def test_a_bad_item_is_named(tmp_path, fields, kind):
    """Catches an item scored with half its documents or without its answers."""
    dataset, problems = read(tmp_path, ASQA | fields, QAMPARI)
    assert dict(problems.counts) == {kind: 1} and len(dataset.examples) == 1
    assert problems.first_error.where == f"{tmp_path}/asqa.json[0]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({"data": [ASQA]}), "not an ALCE file"),
        (json.dumps([1, 2]), "not an ALCE file"),
        ("[]", "not an ALCE file"),
        (json.dumps([ASQA])[:-30], "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("", "not JSON"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, text, message):
    """Catches a result file scored as data, and half a download."""
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        list(alce.read(str(path), None))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    with pytest.raises(UserError, match="No such file"):
        alce.files(str(tmp_path / "y.json"))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_mutation_gets_through_or_crashes(tmp_path_factory, data):
    """Catches an exception that is no UserError, and a broken field read as if it were none."""
    directory = tmp_path_factory.mktemp("alce")
    items = []
    for item in (ASQA, QAMPARI, ELI5):
        items.append(replaced(item, data.draw(st.sampled_from(paths(item))), data.draw(JUNK)))
    needed = [("question",), ("docs",), ("docs", 1), ("docs", 1, "text"), ("qa_pairs", 0)]
    broken = replaced(ASQA, data.draw(st.sampled_from(needed)), data.draw(WRONG))
    dataset, problems = read(directory, *items, broken | {"sample_id": "broken"})
    assert "broken" not in [example.id for example in dataset.examples] and problems.errors
