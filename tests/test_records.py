"""Answers on disk, across kills and changes of the model."""

import json
import os

import pytest

from cosup_jax.answer import records
from cosup_jax.errors import UserError


def test_records_survive_a_kill(tmp_path):
    """Bugs: half a line read as an answer, or the next one written behind it; answers of another
    model, config or data taken for this one's; a question answered twice; answers kept back until
    the end, which a kill loses."""
    path = tmp_path / "set" / "corpus.jsonl"
    with records.Answers(path, "run1") as answers:
        answers.add({"id": "a", "text": "é\u2028"})
        answers.add({"id": "b", "text": "2"})
        assert [record["id"] for record in records.read(path)] == ["a", "b"]  # before it is closed
    whole = path.read_bytes()
    for cut in (len(whole) - 1, len(whole) - 9):
        path.write_bytes(whole[:cut])
        with records.Answers(path, "run1") as answers:
            assert list(answers.known) == ["a"] and answers.known["a"]["text"] == "é\u2028"
            answers.add({"id": "b", "text": "2"})
        assert path.read_bytes() == whole
    assert [record["id"] for record in records.read(path)] == ["a", "b"]
    with records.Answers(path, "run2") as answers:
        assert answers.known == {}
        answers.add({"id": "b", "text": "3"})
        answers.add({"id": "a", "text": "4"})
        finished = answers.finish(["a", "b"], {"a": {"scores": {"em": 1.0}}})
    assert records.read(path) == finished
    assert [record["text"] for record in finished] == ["4", "3"]
    assert finished[0]["scores"] == {"em": 1.0} and "scores" not in finished[1]
    assert records.read(tmp_path / "none.jsonl") == []
    assert os.listdir(path.parent) == ["corpus.jsonl"]


def test_a_record_that_somebody_edited(tmp_path):
    """Bug: a KeyError, or a wrong score, from a record that lacks what it was written with."""
    path, like = tmp_path / "corpus.jsonl", {"id": "", "spans": [{"text": "", "number": 0}]}
    good = {"id": "a", "run": "r", "spans": [{"text": "x", "number": 1, "passage": "p"}]}
    bad = [{"spans": None}, {"spans": [{"text": "x"}]}, {"spans": [{"text": 1, "number": 1}]}]
    for change in bad:
        edited = json.dumps(good) + "\n" + json.dumps(good | {"id": "b"} | change) + "\n"
        path.write_text(edited)
        with pytest.raises(UserError, match=r"corpus.jsonl: the answer to 'b' is not as it was"):
            records.Answers(path, "r", like)
        assert path.read_text() == edited
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | {"spans": [], "id": "c"}) + "\n")
    with records.Answers(path, "r", like) as answers:
        assert list(answers.known) == ["a", "c"]


@pytest.mark.parametrize(
    ("content", "ours"),
    [
        (b"", True),
        (b'{"id": "a", "run": "r"}\n', True),
        (b'{"id": "a", "run": "r"}\n{"i', True),
        (b'{"id": "a", "run": "r"}\n{"id": "b", "text": "x', True),
        (b'{"id": "a", "run": "r"}', True),  # all but the end of the line
        (b'{"id": "a", "run": "r"}\n{"id": "b", "run": "s"}\n', False),
        (b"\n", False),
        (b"notes", False),
        (b'{"id": "a", "run": "r"}\nnotes', False),
        (b'{"id": "a", "run": "s"}', False),
        (b'{"id": "a", "question": "b"}', False),
        (b'{"question": "b"}', False),
    ],
)
def test_what_is_a_file_of_answers(tmp_path, content, ours):
    """Bugs: a file of one line, which no line break ends, taken for a record that a kill cut off;
    a run that was killed while it wrote refused."""
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    assert records.all_of(path, "r") is ours


def test_lines_that_are_no_records(tmp_path):
    """Bug: a file that something else wrote ends the evaluation in a traceback."""
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'[1]\n{"run": "r"}\n\xff\n\n' + json.dumps({"id": 3, "run": "r"}).encode())
    with records.Answers(path, "r") as answers:
        assert answers.known == {}
    assert path.read_bytes() == b""
