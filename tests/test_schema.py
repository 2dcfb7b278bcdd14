"""The JSONL reader: what it accepts, and one clear line for what it does not."""

import json

import pytest

from cosup_jax.data.schema import Example, Passage, read_jsonl
from cosup_jax.errors import UserError

PASSAGE = {"id": "p1", "title": "Lima", "text": "Lima is a city. It lies in Peru."}
EXAMPLE = {
    **{"id": "e1", "task": "open_qa", "question": "Where is Lima?", "answers": ["Peru"]},
    "evidence": ["p1"],
}


def write(path, examples, passages=(PASSAGE,)):
    """Rows are dicts, or bytes that stand for themselves."""
    for name, rows in (("x.jsonl", examples), ("x.passages.jsonl", passages)):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (path / name).write_bytes(b"".join(line + b"\n" for line in lines))
    return path / "x.jsonl"


def test_reads_every_field_and_ignores_unknown_ones(tmp_path):
    """Catches a field that is dropped or renamed, or a reader that refuses extra fields."""
    full = {
        **{"id": "e2", "split": "test", "long_answer": "In Peru.", "support": [[16, 32]]},
        **{"kind": "span", "hard_negatives": ["p1"], "candidates": ["p1"], "source": "mine"},
        "output": "[Ret:p1]Peru",
    }
    dataset = read_jsonl(write(tmp_path, [EXAMPLE, {**EXAMPLE, **full}]))
    assert dataset.name == "x"
    assert dataset.passages == {"p1": Passage(**PASSAGE)}
    plain = Example("e1", "open_qa", "Where is Lima?", ("Peru",), ("p1",))
    assert dataset.examples == [
        plain,
        Example(
            **{"id": "e2", "task": "open_qa", "question": "Where is Lima?", "answers": ("Peru",)},
            **{"evidence": ("p1",), "split": "test", "long_answer": "In Peru."},
            **{"support": ((16, 32),), "kind": "span", "hard_negatives": ("p1",)},
            **{"candidates": ("p1",), "output": "[Ret:p1]Peru"},
        ),
    ]
    assert plain.split == "train"


def test_null_means_absent_and_blank_lines_are_skipped(tmp_path):
    """Catches null read as the text "None", and a trailing newline taken for a bad line."""
    row = {**EXAMPLE, "long_answer": None, "support": [None], "split": None}
    (example,) = read_jsonl(write(tmp_path, [row, b""])).examples
    assert (example.long_answer, example.support, example.split) == ("", (None,), "train")


def test_the_version_follows_the_content_of_both_files(tmp_path):
    """Catches stale tokens being reused after the corpus alone has changed."""
    one = read_jsonl(write(tmp_path, [EXAMPLE])).version
    two = read_jsonl(write(tmp_path, [EXAMPLE], [{**PASSAGE, "title": "The city"}])).version
    three = read_jsonl(write(tmp_path, [{**EXAMPLE, "question": "Where?"}])).version
    assert len({one, two, three}) == 3
    assert read_jsonl(write(tmp_path, [EXAMPLE])).version == one


BAD_EXAMPLES = {
    "not JSON": b'{"id": ',
    "byte 8 is not UTF-8": b'{"id": \xff}',
    "not a JSON object": b"[1]",
    "number too long": b'{"id": ' + b"1" * 5000 + b"}",
    "'id' is missing": {key: EXAMPLE[key] for key in EXAMPLE if key != "id"},
    "'answers' is missing": {**EXAMPLE, "id": "e2", "answers": None},
    "'answers' is empty": {**EXAMPLE, "id": "e2", "answers": []},
    "'answers' holds an empty string": {**EXAMPLE, "id": "e2", "answers": [" "]},
    "'answers' must be a list": {**EXAMPLE, "id": "e2", "answers": "Peru"},
    "'answers' must be text": {**EXAMPLE, "id": "e2", "answers": [3]},
    "'question' is empty": {**EXAMPLE, "id": "e2", "question": "  "},
    "'task' must be text, not 3": {**EXAMPLE, "id": "e2", "task": 3},
    "half a surrogate pair": {**EXAMPLE, "id": "e2", "question": "\ud800"},
    "taken by an earlier line": EXAMPLE,
    "evidence 'p9' has no passage": {**EXAMPLE, "id": "e2", "evidence": ["p9"]},
    "hard_negatives 'p9' has no": {**EXAMPLE, "id": "e2", "hard_negatives": ["p9"]},
    "candidates 'p9' has no passage": {**EXAMPLE, "id": "e2", "candidates": ["p9"]},
    "[Ret:p9] has no passage": {**EXAMPLE, "id": "e2", "output": "[Ret:p9]"},
    "'support' has 2 spans for 1": {**EXAMPLE, "id": "e2", "support": [None, None]},
    "(16, 33) lies outside passage": {**EXAMPLE, "id": "e2", "support": [[16, 33]]},
    "(5, 5) lies outside passage": {**EXAMPLE, "id": "e2", "support": [[5, 5]]},
    "(-1, 5) lies outside passage": {**EXAMPLE, "id": "e2", "support": [[-1, 5]]},
    "must be a list of [start, end]": {**EXAMPLE, "id": "e2", "support": [[0, True]]},
}


@pytest.mark.parametrize("reason", BAD_EXAMPLES)
def test_a_bad_example_is_named_by_file_and_line(tmp_path, reason):
    """Catches bad rows that get through, and messages that leave the user searching."""
    path = write(tmp_path, [EXAMPLE, b"", BAD_EXAMPLES[reason]])
    with pytest.raises(UserError) as caught:
        read_jsonl(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ") and reason in message and "\n" not in message
    if isinstance(BAD_EXAMPLES[reason], dict) and "id" in BAD_EXAMPLES[reason]:
        assert f":3: {BAD_EXAMPLES[reason]['id']}: " in message


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**PASSAGE, "text": ""}, "'text' is empty"),
        ({**PASSAGE, "id": 7}, "'id' must be text, not 7"),
        (PASSAGE, "p1: this id is taken"),
    ],
)
def test_a_bad_passage_is_named_by_file_and_line(tmp_path, row, reason):
    """Catches empty or doubled passages, which would be unreachable or ambiguous evidence."""
    path = write(tmp_path, [EXAMPLE], [PASSAGE, row])
    with pytest.raises(UserError, match=r"x\.passages\.jsonl:2: ") as caught:
        read_jsonl(path)
    assert reason in str(caught.value)


def test_a_missing_or_empty_file_is_named(tmp_path):
    """Catches a traceback for a mistyped path, and an empty file that trains on nothing."""
    with pytest.raises(UserError, match=r"x\.jsonl' does not exist"):
        read_jsonl(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match=r"x\.jsonl: the file is empty"):
        read_jsonl(write(tmp_path, []))
    (tmp_path / "x.passages.jsonl").unlink()
    with pytest.raises(UserError, match=r"x\.passages\.jsonl: No such file"):
        read_jsonl(tmp_path / "x.jsonl")
