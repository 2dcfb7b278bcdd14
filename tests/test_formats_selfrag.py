"""Self-RAG's training data: what is grounded, what is dropped, and what is refused."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imports import JUNK, WRONG, imported, paths, replaced, training_text, write_lines

from cosup_jax.data.formats import selfrag
from cosup_jax.data.rows import content_id
from cosup_jax.errors import UserError

OSLO = "<paragraph>Oslo\nOslo is a city.\nIt is old.</paragraph>"
FISH = "<paragraph>Fish swim.</paragraph>"
OSLO_ID = content_id("Oslo", "Oslo is a city.\nIt is old.")
GOOD = {
    "instruction": "Answer the following question.## Input:\n\nWhere is it?",
    "input": "",
    "output": f"Well.[Retrieval]{OSLO}[Relevant]In Oslo.[Fully supported][Utility:5]",
    "id": "nq_1",
    "dataset_name": "nq",
}


def one_row(directory, **fields):
    """A file with one row, ingested."""
    path = write_lines(directory / "train.jsonl", GOOD | fields)
    return imported(selfrag, path, directory / "cache")


def inserted(text, span):
    return [(1, "<ret>"), (2, text), (2, "<cs>"), (1, span), (1, "<ce>")]


OSLO_TEXT = "Oslo :: Oslo is a city.\nIt is old."


@pytest.mark.parametrize(
    ("output", "expected", "dropped"),
    [
        (GOOD["output"], [(1, "Well."), *inserted(OSLO_TEXT, "In Oslo.")], []),
        (
            f"[Retrieval]{OSLO}[Relevant]One.[Fully supported]"
            f"[Retrieval]{FISH}[Relevant]Two.[Partially supported]"
            f"[Continue to Use Evidence]Three.[Retrieval]{OSLO}[Relevant]Four.[Fully supported]",
            [
                *inserted(OSLO_TEXT, "One."),
                *inserted("Fish swim.", "Two."),
                (1, "Three."),
                *inserted(OSLO_TEXT, "Four."),
            ],
            [],
        ),
        (
            f"[Retrieval]{OSLO}[Irrelevant]One.[Retrieval]{FISH}[Relevant]Two."
            f"[No support / Contradictory]Three.{FISH}[Relevant]Four.[Utility:1]{FISH}",
            [(1, "One. Two. Three. Four.")],
            ["[Irrelevant]", "[Relevant][No support / Contradictory]", "[Relevant]", "not judged"],
        ),
        (
            "[No Retrieval]One.[No Retrieval] Two [x] <b>.[Utility:5]",
            [(1, "One. Two [x] <b>.")],
            [],
        ),
        (f"{FISH}[Fully supported]Two.", [(1, "Two.")], ["[Fully supported]"]),
    ],
)
def test_only_what_a_paragraph_supports_is_grounded(tmp_path, output, expected, dropped):
    """Catches judgements in the training text, glued sentences, and [Ret] before a bad passage."""
    dataset, problems = one_row(tmp_path, output=output)
    assert training_text(dataset) == [[*expected, (1, "<eos>")]]
    reasons = [found.reason for found in problems.listed if found.kind == "paragraph_dropped"]
    assert reasons == dropped and not problems.errors


@pytest.mark.parametrize(
    ("paragraph", "passage"),
    [
        ("\nOne.\nTwo.", ("", "One.\nTwo.")),
        (" \n One.", ("", "One.")),
        ("Oslo\n", ("", "Oslo")),
        (" Oslo \n One.\nTwo. ", ("Oslo", "One.\nTwo.")),
    ],
)
def test_a_title_may_be_empty(tmp_path, paragraph, passage):
    """Bug: where a title is empty, the first line of the text becomes one."""
    output = f"<paragraph>{paragraph}</paragraph>[Relevant]Yes.[Fully supported]"
    (found,) = one_row(tmp_path, output=output)[0].passages.values()
    assert (found.title, found.text) == passage


def test_the_same_paragraph_is_one_passage(tmp_path):
    """Catches a passage that is its own in-batch negative, and ids that change between runs."""
    other = {**GOOD, "id": "nq_1", "output": f"{OSLO}[Relevant]Yes.[Partially supported]"}
    path = write_lines(tmp_path / "train.jsonl", GOOD, other)
    dataset, problems = imported(selfrag, path, tmp_path / "cache")
    assert not problems.counts and list(dataset.passages) == [OSLO_ID]
    assert [example.evidence for example in dataset.examples] == [(OSLO_ID,), (OSLO_ID,)]


@pytest.mark.parametrize(
    ("fields", "task", "question"),
    [
        ({}, "open_qa", "Where is it?"),
        ({"dataset_name": "fever"}, "fact_check", "Where is it?"),
        (
            {"instruction": "Add.", "input": "1 2", "dataset_name": "alpaca"},
            "open_qa",
            "Add.\n\n1 2",
        ),
        ({"instruction": "Add.", "input": None, "dataset_name": None}, "open_qa", "Add."),
        ({"instruction": "Write C#.\n\n### Input:\n\nAdd."}, "open_qa", "Write C#.\n\nAdd."),
        ({"instruction": "Write C#\n\n## Input:\n\nAdd."}, "open_qa", "Write C#\n\nAdd."),
    ],
)
def test_the_prompt_keeps_the_question_alone(tmp_path, fields, task, question):
    """Catches an instruction within ours, and an `input` that is left out."""
    (example,) = one_row(tmp_path, **fields)[0].examples
    assert (example.task, example.question, example.id) == (task, question, "1")


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"output": f"<paragraph>{OSLO}[Relevant]One.[Fully supported]"}, "bad_judgement"),
        ({"output": "<paragraph>Oslo[Relevant]One.[Fully supported]"}, "bad_judgement"),
        (
            {"output": f"<paragraph>a {FISH} b</paragraph>[Relevant]x[Fully supported]"},
            "bad_judgement",
        ),
        ({"output": "One.</paragraph>[Relevant]x[Fully supported]"}, "bad_judgement"),
        ({"output": f"{OSLO}[Relevant][Irrelevant]One.[Fully supported]"}, "bad_judgement"),
        ({"output": f"{OSLO}[Relevant]x[Fully supported][Partially supported]"}, "bad_judgement"),
        ({"output": "[Relevant]One.[Fully supported]"}, "bad_judgement"),
        ({"output": f"{OSLO}[Relevant] [Fully supported]Two."}, "bad_judgement"),
        ({"output": "<paragraph> </paragraph>[Relevant]x[Fully supported]"}, "empty_text"),
        ({"output": "[No Retrieval][Utility:5]"}, "empty_text"),
        ({"output": f"[Retrieval]{OSLO}[Utility:1]"}, "empty_text"),
        ({"output": "See [Ret:x] there."}, "missing_passage"),
        ({"output": "A [Cs] mark."}, "bad_marker"),
        ({"output": None}, "missing_field"),
        ({"output": ["One."]}, "wrong_type"),
        ({"instruction": None}, "missing_field"),
        ({"instruction": "Do.## Input:\n\n "}, "empty_text"),
        ({"input": 3}, "wrong_type"),
    ],
)
def test_a_bad_row_is_named(tmp_path, fields, kind):
    """Catches text taken for a passage, or a judgement learnt as text, after a broken row."""
    dataset, problems = one_row(tmp_path, **fields)
    assert len(dataset.examples) == 0 and problems.counts[kind] == problems.errors == 1
    assert problems.first_error.where == f"{tmp_path}/train.jsonl:1"


def test_a_row_of_tokens_alone_says_so(tmp_path):
    """Catches a complaint about answers, of which Self-RAG has none."""
    problems = one_row(tmp_path, output="[No Retrieval][Utility:5]")[1]
    assert problems.first_error.reason == "'output' holds nothing but tokens of Self-RAG"


def test_bad_lines_leave_the_good_ones(tmp_path):
    """Catches a reader that stops at the first bad line, and one that counts lines wrongly."""
    path = write_lines(tmp_path / "train.jsonl", "[1]", b"\xff", "", GOOD, "{")
    dataset, problems = imported(selfrag, path, tmp_path / "cache")
    assert dict(problems.counts) == {"not_json": 2, "not_utf8": 1}
    assert [example.id for example in dataset.examples] == ["4"]


def test_a_file_that_is_not_there_is_named(tmp_path):
    """Catches a traceback in place of the path."""
    with pytest.raises(UserError, match=r"nothing\.jsonl: No such file"):
        selfrag.files(str(tmp_path / "nothing.jsonl"))


TOKENS = ["<paragraph>", "</paragraph>", "[Relevant]", "[Irrelevant]", "[Fully supported]"]
TOKENS += ["[Retrieval]", "[Utility:3]", "[No support / Contradictory]", "a", " ", "\n", "[Ce]"]
MANY = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@MANY
@given(data=st.data())
def test_no_mutation_gets_through_or_crashes(tmp_path_factory, data):
    """Catches an exception that is no UserError, and tokens of Self-RAG in a training text."""
    directory = tmp_path_factory.mktemp("selfrag")
    place = data.draw(st.sampled_from(paths(GOOD)))
    output = "".join(data.draw(st.lists(st.sampled_from(TOKENS), max_size=12)))
    broken = data.draw(st.sampled_from(["instruction", "output"]))
    path = write_lines(
        directory / "train.jsonl",
        replaced(GOOD, place, data.draw(JUNK)),
        GOOD | {"output": output},
        GOOD | {broken: data.draw(WRONG)},
    )
    dataset, problems = imported(selfrag, path, directory / "cache")
    assert "3" not in [example.id for example in dataset.examples] and problems.errors
    for pieces in training_text(dataset):
        assert not any(token in text for _, text in pieces for token in TOKENS[:8])
