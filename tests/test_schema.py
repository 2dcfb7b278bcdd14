"""Our JSONL and what is said of rows that are none: one finding each, nothing accepted silently."""

import copy
import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosup_jax.config import DataConfig
from cosup_jax.data import markup, sources
from cosup_jax.data.problems import ERRORS, KINDS, Problems
from cosup_jax.data.schema import Example, Passage
from cosup_jax.errors import UserError

PASSAGE = {"id": "p1", "title": "Lima", "text": "Lima is a city. It lies in Peru."}
OTHER = {"id": "p2", "title": "", "text": "Quito lies in Ecuador."}
EXAMPLE = {
    **{"id": "e1", "task": "open_qa", "question": "Where is Lima?", "answers": ["Peru"]},
    "evidence": ["p1"],
}


def write(path, examples, passages=(PASSAGE, OTHER)):
    """Rows are dicts, or bytes that stand for themselves."""
    for name, rows in (("x.jsonl", examples), ("x.passages.jsonl", passages)):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (path / name).write_bytes(b"".join(line + b"\n" for line in lines))
    return path / "x.jsonl"


def load(path):
    """The data set and what is wrong with the rest."""
    return sources.load(str(path), DataConfig(), path.parent / "data")


def changed(**fields):
    """EXAMPLE with an id of its own and some fields replaced."""
    return {**EXAMPLE, "id": "e2", **fields}


def test_reads_every_field(tmp_path):
    """Catches a field that is dropped or renamed, or a reader that refuses extra fields."""
    full = {
        **{"id": "e2", "split": "test", "long_answer": "In Peru.", "support": [[16, 32]]},
        **{"kind": "span", "hard_negatives": ["p2"], "candidates": ["p1"], "source": "mine"},
        **{"output": "[Ret:p1]Peru", "answer_groups": [["Peru", "Perú"], ["Lima"]]},
    }
    dataset, problems = load(write(tmp_path, [EXAMPLE, {**EXAMPLE, **full}]))
    assert (dataset.name, dict(problems.counts)) == ("x", {})
    assert dataset.passages == {"p1": Passage(**PASSAGE), "p2": Passage(**OTHER)}
    assert [dataset.passages.row(id) for id in ("p1", "p2")] == [0, 1]
    assert list(dataset.passages.values()) == [Passage(**PASSAGE), Passage(**OTHER)]
    plain = Example("e1", "open_qa", "Where is Lima?", ("Peru",), ("p1",))
    assert list(dataset.examples) == [
        plain,
        Example(
            **{"id": "e2", "task": "open_qa", "question": "Where is Lima?", "answers": ("Peru",)},
            **{"evidence": ("p1",), "split": "test", "long_answer": "In Peru."},
            **{"support": ((16, 32),), "kind": "span", "hard_negatives": ("p2",)},
            **{"candidates": ("p1",), "output": "[Ret:p1]Peru"},
            **{"answer_groups": (("Peru", "Perú"), ("Lima",))},
        ),
    ]
    assert {split: rows.tolist() for split, rows in dataset.splits.items()} == {
        "train": [0],
        "test": [1],
    }


def test_null_means_absent_and_blank_lines_are_skipped(tmp_path):
    """Catches null read as the text "None", and a trailing newline taken for a bad line."""
    row = {**EXAMPLE, "long_answer": None, "support": [None], "split": None}
    dataset, problems = load(write(tmp_path, [row, b"", b" \r"]))
    (example,) = dataset.examples
    assert (example.long_answer, example.support, example.split) == ("", (None,), "train")
    assert not problems.counts


def test_the_version_follows_the_content_of_both_files(tmp_path):
    """Catches stale tokens being reused after the corpus alone has changed."""
    version = lambda *rows: load(write(tmp_path, *rows))[0].version
    one = version([EXAMPLE])
    two = version([EXAMPLE], [{**PASSAGE, "title": "The city"}])
    three = version([{**EXAMPLE, "question": "Where?"}])
    assert len({one, two, three}) == 3
    assert version([EXAMPLE]) == one


def test_gzip_and_a_byte_order_mark_are_read(tmp_path):
    """Catches a packed file read as text, and a first line refused for an invisible mark."""
    path = write(tmp_path, [b"\xef\xbb\xbf" + json.dumps(EXAMPLE).encode()])
    plain = list(load(path)[0].examples)
    packed = path.with_name("x.jsonl.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    dataset, problems = load(packed)
    assert list(dataset.examples) == plain and not problems.counts
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"x\.jsonl\.gz:2: breaks off"):
        load(packed)


# What the row is, what is wrong with it, and what the message says.
BAD_EXAMPLES = [
    (b'{"id": ', "not_json", "not JSON"),
    (b'{"id": \xff}', "not_utf8", "byte 8 is not UTF-8"),
    (b"[1]", "not_json", "not a JSON object"),
    (b"null", "not_json", "not a JSON object"),
    (b'{"id": ' + b"1" * 5000 + b"}", "not_json", "number too long"),
    (b'{"id": NaN}', "not_json", "NaN is no number"),
    (b"[" * 100_000, "not_json", "nesting too deep"),
    (json.dumps(changed()).encode()[:-1] + b', "id": "e3"}', "not_json", "'id' stands twice"),
    (json.dumps(changed()).encode() * 2, "not_json", "not JSON"),
    ({key: EXAMPLE[key] for key in EXAMPLE if key != "id"}, "missing_field", "'id' is missing"),
    (changed(answers=None), "missing_field", "'answers' is missing"),
    (changed(answers=[]), "empty_text", "'answers' is empty"),
    (changed(answers=[" "]), "empty_text", "'answers' holds an empty string"),
    (changed(answers="Peru"), "wrong_type", "'answers' must be a list"),
    (changed(answers=[3]), "wrong_type", "'answers' must be text"),
    (changed(question="  "), "empty_text", "'question' is empty"),
    (changed(question=["Where?"]), "wrong_type", "'question' must be text"),
    (changed(task=3), "wrong_type", "'task' must be text, not 3"),
    (changed(split=""), "empty_text", "'split' is empty"),
    (changed(split="../../x"), "wrong_type", "split '../../x' must be a short word"),
    (changed(split="x" * 300), "wrong_type", "must be a short word"),
    (changed(split="Train"), "wrong_type", "split 'Train' would be held out; write 'train'"),
    (changed(question="\ud800"), "not_utf8", "half a surrogate pair"),
    (EXAMPLE, "duplicate_id", "taken by an earlier line"),
    (changed(evidence=["p9"]), "missing_passage", "evidence 'p9' has no passage"),
    (changed(evidence="p1"), "wrong_type", "'evidence' must be a list"),
    (changed(hard_negatives=["p9"]), "missing_passage", "hard_negatives 'p9' has no"),
    (changed(candidates=["p9"]), "missing_passage", "candidates 'p9' has no passage"),
    (changed(output="[Ret:p9]"), "missing_passage", "[Ret:p9] has no passage"),
    (changed(output="[Ret:p2]no"), "marker_without_evidence", "[Ret:p2] is not in evidence"),
    (changed(output="no"), "evidence_without_marker", "no [Ret:p1] for this evidence"),
    (
        changed(output="[Ret:p2]a[Ce][Ret:p1]b", evidence=["p1", "p2"]),
        *("order_mismatch", "output inserts ['p2', 'p1'], evidence is ['p1', 'p2']"),
    ),
    (changed(output="a[Cs]b[Ce][Ret:p1]"), "bad_marker", "[Cs] or [Ce] that belongs to no"),
    (changed(output="[Ret:p1]a[Ce]b[Ce]"), "bad_marker", "[Cs] or [Ce] that belongs to no"),
    (changed(output="[Ret:p1]a[Ce]b[Ret]"), "bad_marker", "[Ret] without a passage"),
    (changed(support=[None, None]), "bad_support", "'support' has 2 spans for 1"),
    (changed(support=[[16, 33]]), "bad_support", "(16, 33) lies outside passage"),
    (changed(support=[[5, 5]]), "bad_support", "(5, 5) lies outside passage"),
    (changed(support=[[-1, 5]]), "bad_support", "(-1, 5) lies outside passage"),
    # Bug: blanks accepted as what to generate.
    (changed(answers=[], output="   ", evidence=[]), "empty_text", "nothing but blanks"),
    (changed(output="   ", evidence=[]), "empty_text", "'output' holds nothing but blanks"),
    (changed(long_answer="  "), "empty_text", "'long_answer' holds nothing but blanks"),
    (changed(output="[Ret:p1]"), "empty_text", "[Ret:ID] of the output grounds no text"),
    (changed(output="so [Ret:p1][Cs]  [Ce] it"), "empty_text", "of the output grounds no text"),
    (changed(support=[[4, 5]], answers=["x"]), "empty_text", "covers only blanks"),
    (changed(answer_groups="Peru"), "wrong_type", "'answer_groups' must be a list of lists"),
    (changed(answer_groups=["Peru"]), "wrong_type", "'answer_groups' must be a list of lists"),
    (changed(answer_groups=[["Peru", " "]]), "empty_text", "'answer_groups' holds an empty"),
    (changed(support=[[0, True]]), "wrong_type", "must be a list of [start, end]"),
    (changed(support=[[0, 1, 2]]), "wrong_type", "must be a list of [start, end]"),
    (changed(support={"p1": [0, 1]}), "wrong_type", "must be a list of [start, end]"),
]


@pytest.mark.parametrize(("row", "kind", "reason"), BAD_EXAMPLES, ids=lambda x: str(x)[:20])
def test_a_bad_example_is_left_out_and_named_by_file_and_line(tmp_path, row, kind, reason):
    """Catches bad rows that get through, and messages that leave the user searching."""
    path = write(tmp_path, [EXAMPLE, b"", row, changed(id="e9")])
    dataset, problems = load(path)
    assert [example.id for example in dataset.examples] == ["e1", "e9"]
    assert dict(problems.counts) == {kind: 1} and problems.errors == 1
    message = str(problems.first_error)
    assert message.startswith(f"{path}:3: ") and reason in message and "\n" not in message
    if isinstance(row, dict) and "id" in row:
        assert f":3: {row['id']}: " in message


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        ({**PASSAGE, "id": "p3", "text": ""}, "empty_text", "'text' is empty"),
        ({**PASSAGE, "id": 7}, "wrong_type", "'id' must be text, not 7"),
        ({**PASSAGE, "id": "p3", "title": []}, "wrong_type", "'title' must be text"),
        (PASSAGE, "duplicate_id", "p1: this id is taken"),
        (b'"p1"', "not_json", "not a JSON object"),
    ],
)
def test_a_bad_passage_is_named_by_file_and_line(tmp_path, row, kind, reason):
    """Catches empty or doubled passages, which would be unreachable or ambiguous evidence."""
    path = write(tmp_path, [EXAMPLE], [PASSAGE, row, OTHER])
    dataset, problems = load(path)
    assert dict(problems.counts) == {kind: 1}
    assert problems.listed[0].where.endswith("x.passages.jsonl:2") and reason in str(
        problems.listed[0]
    )
    assert dataset.passages == {"p1": Passage(**PASSAGE), "p2": Passage(**OTHER)}
    assert list(dataset.passages) == ["p1", "p2"]


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        (changed(answers=["Chile"]), "answer_not_in_evidence", "'Chile' stands in none"),
        (changed(question="Is [Ret] a word?"), "control_text", "'[Ret]' in the text"),
        (changed(hard_negatives=["p2", "p1"]), "own_negative", "'p1' is in evidence too"),
        (changed(hard_negative=["p2"]), "unknown_field", "did you mean 'hard_negatives'"),
    ],
)
def test_an_odd_example_is_kept_and_noted(tmp_path, row, kind, reason):
    """Catches a slip that trains on something else than meant, without a word."""
    dataset, problems = load(write(tmp_path, [row]))
    assert len(dataset.examples) == 1 and dict(problems.counts) == {kind: 1}
    assert reason in problems.listed[0].reason and not problems.errors


def test_a_label_need_not_stand_in_the_evidence(tmp_path):
    """Catches a warning for every yes, no and SUPPORTS."""
    assert not load(write(tmp_path, [changed(answers=["no"], kind="label")]))[1].counts


def test_a_missing_or_empty_file_is_named(tmp_path):
    """Catches a traceback for a mistyped path, and an empty file that trains on nothing."""
    with pytest.raises(UserError, match=r"x\.jsonl: No such file; check"):
        load(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match=r"x\.jsonl: the file is empty"):
        load(write(tmp_path, []))
    (tmp_path / "x.passages.jsonl").unlink()
    with pytest.raises(UserError, match=r"x\.passages\.jsonl: No such file"):
        load(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (json.dumps([EXAMPLE] * 2, indent=1), r"an array, .*jq -c '\.\[\]'"),
        (json.dumps([EXAMPLE]), "an array, where each line must be one obj"),
        ("\ufeff\n " + json.dumps(EXAMPLE, indent=1), "an object over several lines, where"),
    ],
)
def test_json_in_another_layout_is_told_once(tmp_path, text, reason):
    """Bug: a finding for every line of a JSON array, and none says what is wrong."""
    path = write(tmp_path, [text.encode()])
    with pytest.raises(UserError, match=rf"x\.jsonl:\d: JSON, but {reason}"):
        load(path)


def test_findings_are_counted_whole_and_listed_in_part(tmp_path):
    """Catches a report that grows without end, a count of what is listed only, findings that a
    second reading has lost."""
    problems = Problems(keep=2)
    for i in range(5):
        problems.add("empty_text", f"x:{i}", "", "empty")
    assert problems.counts == {"empty_text": 5} and len(problems.listed) == 2
    path = write(tmp_path, [EXAMPLE, changed(question="")])
    assert load(path)[1] == load(path)[1] and load(path)[1].errors == 1


@pytest.mark.parametrize(
    "file", ["about.json", "examples_rows", "examples_split", "corpus_by_hash"]
)
def test_a_damaged_copy_of_a_source_is_one_line(tmp_path, file):
    """Bug: a traceback for a file in the workdir that lost its end."""
    load(path := write(tmp_path, [EXAMPLE]))
    (kept,) = tmp_path.glob(f"data/*/{file}")
    kept.write_bytes(kept.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"x-\w+: damaged \(.*\); delete .*data, all of which"):
        load(path)


def test_one_id_for_all_is_told_in_time(tmp_path):
    """Catches hours spent on comparing every copy with every other."""
    rows = [{**EXAMPLE, "id": "0", "question": f"{i}?"} for i in range(3000)]
    dataset, problems = load(write(tmp_path, rows))
    assert problems.counts == {"duplicate_id": 2999} and len(dataset.examples) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
FULL = {
    **{**EXAMPLE, "split": "train", "long_answer": "In Peru.", "support": [[16, 32]]},
    **{"kind": "span", "hard_negatives": ["p2"], "candidates": ["p1"], "output": "[Ret:p1]x[Ce]"},
    "answer_groups": [["Peru"]],
}


@settings(max_examples=300, deadline=None)
@given(field=st.sampled_from(sorted(FULL)), value=JSON, cut=st.integers(0, 40))
def test_no_broken_row_gives_a_traceback_or_passes_unseen(tmp_path_factory, field, value, cut):
    """Catches a type that nobody thought of; a row that trains although it means nothing."""
    path = tmp_path_factory.mktemp("rows")
    row = {**copy.deepcopy(FULL), field: value}
    line = json.dumps(row).encode()
    write(path, [changed(id="good"), line[: len(line) - cut] if cut < 20 else line])
    dataset, problems = load(path / "x.jsonl")
    assert set(problems.counts) <= set(KINDS)
    kept = [example for example in dataset.examples if example.id != "good"]
    assert len(kept) + problems.errors == 1
    for example in kept:  # it can be written as training text, and says what the row said
        markup.pieces(example, dataset.passages)
        if value is not None:
            found = getattr(example, field)
            assert json.loads(json.dumps(found)) == value and type(value) in (str, list)
    assert all(problem.kind in ERRORS for problem in problems.listed if not kept)
