"""Official training data: what becomes of it, and what is refused."""

import json
import os
import pickle
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imports import JUNK, WRONG, imported, paths, replaced, training_text

from cosup_jax.data import markup
from cosup_jax.data.formats import official
from cosup_jax.data.formats.plain_pickle import read_pickle
from cosup_jax.errors import UserError

TEXTS = {"[k_1]": "Oslo :: Oslo is a city.", "[k_2]": "Fish swim.", "[k_3]": "Sun :: It is hot."}
PROMPT = "Answer the following question.## Input:\n\nWhere?## Output:\n\n"
OUTPUT = "In [k_1]Oslo :: Oslo is a city. [Cs] Oslo [Ce] [k_2] [Cs] Fish [Ce] so."
GOOD = {
    "input": [PROMPT, "What?"],
    "output": [OUTPUT, "Nothing."],
    "evidence": [["1", 2], []],
    "hard_negs": [["3", "It is hot."], []],
    "input_ids": [[1, 32003], [1]],
}
MANY = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(directory, table=GOOD, texts=TEXTS):
    """The two files; returns the first."""
    (directory / "ids2text.json").write_text(json.dumps(texts))
    path = directory / "train.pickle"
    path.write_bytes(table if isinstance(table, bytes) else pickle.dumps(table))
    return path


def one_row(directory, texts=TEXTS, **fields):
    """A file with one row, ingested."""
    row = {"input": PROMPT, "output": OUTPUT, "evidence": ["1", "2"]} | fields
    table = {name: [value] for name, value in row.items()}
    return imported(official, write(directory, table, texts), directory / "cache")


@pytest.mark.parametrize("ending", ["pickle", "json"])
def test_rows_become_our_training_text(tmp_path, ending):
    """Catches a passage inserted twice, blanks of the marks in the spans, and a lost title."""
    path = write(tmp_path)
    if ending == "json":
        path = tmp_path / "train.json"
        path.write_text(json.dumps(GOOD))
    dataset, problems = imported(official, path, tmp_path / "cache")
    assert not problems.errors and dict(problems.counts) == {"other_prompt": 1}
    assert training_text(dataset) == [
        [
            *[(1, "In "), (1, "<ret>"), (2, "Oslo :: Oslo is a city."), (2, "<cs>"), (1, "Oslo")],
            *[(1, "<ce>"), (1, "<ret>"), (2, "Fish swim."), (2, "<cs>"), (1, "Fish"), (1, "<ce>")],
            *[(1, "so."), (1, "<eos>")],
        ],
        [(1, "Nothing."), (1, "<eos>")],
    ]
    assert markup.prompt_text(dataset.examples[0]) == (
        "Answer the question.\n\n## Input:\n\nWhere?## Output:\n\n"
    )
    assert dataset.passages["1"].title == "Oslo"
    assert dataset.examples[0].evidence == ("1", "2")
    assert dataset.examples[0].hard_negatives == ("3",)
    assert [example.question for example in dataset.examples] == ["Where?", "What?"]


def test_ids2text_may_lie_elsewhere(tmp_path):
    """Catches a second path that is ignored, so that another corpus is read."""
    path = write(tmp_path)
    (tmp_path / "ids2text.json").rename(tmp_path / "corpus.json")
    where = f"{path}::{tmp_path / 'corpus.json'}"
    assert len(imported(official, where, tmp_path / "cache")[0].passages) == 3
    with pytest.raises(UserError, match="No such file"):
        official.files(str(path))


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"evidence": ["2", "1"]}, "order_mismatch"),
        ({"evidence": ["1"]}, "marker_without_evidence"),
        ({"evidence": ["1", "2", "3"]}, "evidence_without_marker"),
        ({"evidence": None}, "marker_without_evidence"),
        ({"output": OUTPUT.replace("k_2", "k_9"), "evidence": ["1", "9"]}, "missing_passage"),
        ({"output": "[k_1]Oslo is a city."}, "bad_marker"),
        ({"output": "[k_1] [Ce] [Cs] Oslo"}, "bad_marker"),
        ({"output": f"{OUTPUT} [Cs] more [Ce]"}, "bad_marker"),
        ({"output": ""}, "empty_text"),
        ({"output": "[k_1][Cs][Ce] [k_2] [Cs] Fish [Ce]"}, "empty_text"),
        ({"output": None}, "missing_field"),
        ({"input": "Do.## Input:\n\n ## Output:\n\n"}, "empty_text"),
        ({"input": 7}, "wrong_type"),
        ({"evidence": "12"}, "wrong_type"),
        ({"evidence": [["1"], "2"]}, "wrong_type"),
        ({"evidence": ["1", "\ud800"]}, "not_utf8"),
        ({"hard_negs": ["3"]}, "wrong_type"),
        ({"hard_negs": [["3", "4"], ["a", "b"]]}, "missing_passage"),
    ],
)
def test_a_bad_row_is_named(tmp_path, fields, kind):
    """Catches [Ret] bound to another passage than it inserts, and rows that vanish."""
    dataset, problems = one_row(tmp_path, **fields)
    assert len(dataset.examples) == 0 and dict(problems.counts) == {kind: 1}
    assert problems.first_error.where == f"{tmp_path}/train.pickle[0]"


@pytest.mark.parametrize(
    ("inserted", "kept"),
    [("Oslo is a city.", True), ("Oslo  ::\nOslo is", True), ("Bergen is a city.", False)],
)
def test_an_inserted_text_that_is_no_passage_is_noted(tmp_path, inserted, kept):
    """Catches a corpus of another version, whose texts silently take the place of the right ones"""
    output = f"[k_1]{inserted} [Cs] Oslo [Ce]"
    dataset, problems = one_row(tmp_path, output=output, evidence=[1])
    assert training_text(dataset)[0][1][1] == "Oslo :: Oslo is a city."
    assert problems.counts["other_insertion"] == (not kept)


def test_their_text_inserts_nothing(tmp_path):
    """Bug: a literal [Ret:1] in an answer becomes a second insertion of passage 1."""
    for output in (f"See [Ret:1]. {OUTPUT}", OUTPUT.replace("so.", "so [Ret:2].")):
        dataset, problems = one_row(tmp_path, output=output)
        assert not len(dataset.examples) and dict(problems.counts) == {"bad_marker": 1}


def test_a_span_without_an_end_is_noted(tmp_path):
    """Bug: a forgotten [Ce] turns the rest of the answer into a grounded span, without a word."""
    dataset, problems = one_row(tmp_path, output=OUTPUT.replace("Fish [Ce]", "Fish"))
    assert len(dataset.examples) == 1 and dict(problems.counts) == {"open_span": 1}
    assert "passage '2'" in problems.listed[0].reason


def test_a_marker_may_come_again(tmp_path):
    """Catches the official trainer's assert: more [Ret] than evidence."""
    output = "[k_1] [Cs] Oslo [Ce] and [k_1] [Cs] city [Ce]"
    dataset, problems = one_row(tmp_path, output=output, evidence=["1"])
    assert not problems.errors and len(dataset.examples) == 1


@pytest.mark.parametrize(
    ("texts", "kind"),
    [
        ({"[k_4]": ""}, "empty_text"),
        ({"[k_4]": "Title :: "}, "empty_text"),
        ({"[k_4]": None}, "missing_field"),
        ({"4": "Text"}, "wrong_type"),
        ({"[k_4": "Text"}, "wrong_type"),
    ],
)
def test_a_bad_passage_is_named(tmp_path, texts, kind):
    """Catches passages without text in the corpus, and keys that no marker finds."""
    dataset, problems = one_row(tmp_path, texts=TEXTS | texts)
    assert dict(problems.counts) == {kind: 1} and len(dataset.passages) == 3


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({**GOOD, "output": ["one"]}, r"input 2, output 1"),
        ({**GOOD, "input_ids": [[1]]}, r"input_ids 1"),
        ({"input": ["a"]}, "not official training data"),
        ({"input": "ab", "output": "cd"}, "not official training data"),
        ([GOOD], "not official training data"),
        ({"input": [], "output": []}, "lists are empty"),
        ({**GOOD, "input": {"a"}}, "more than plain data"),
        ({**GOOD, "input": [bytearray(3)]}, r"bytearray|more than plain"),
        ({**GOOD, ("a", 1): []}, "neither text nor number"),
        (pickle.dumps(GOOD)[:-20], "not a whole pickle"),
        (b"", "not a whole pickle"),
        (b"{}", "not a whole pickle|more than"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, table, message):
    """Catches lists cut to the shortest, as the official code does, and half a download."""
    with pytest.raises(UserError, match=message) as error:
        list(official.read(str(write(tmp_path, table)), None))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


class Attack:
    """Calls os.system when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_runs_nothing(tmp_path, protocol):
    """Catches a data file that runs a command."""
    mark = tmp_path / "ran"
    bomb = pickle.dumps({**GOOD, "input": [Attack(f"touch {mark}")]}, protocol)
    with pytest.raises(UserError, match=r"holds a (posix|nt)\.system"):
        read_pickle(write(tmp_path, bomb))
    assert not mark.exists()


def shared_tuples(depth):
    """A pickle whose dict key is a tuple that holds the same tuple twice, and so on."""
    return b"\x80\x04}(" + b"K\x01\x85\x94" + b"2\x86\x94" * depth + b"K\x01u."


@pytest.mark.parametrize(
    "attack",
    [
        b"\x80\x04Pname\n.",  # a persistent id
        b"\x80\x04\x82\x01.",  # the extension registry
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",  # a bytearray of 1 TiB
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",  # bytes of 1 TiB
        b"\x80\x04\x8d" + struct.pack("<Q", 2**63 + 1) + b"x.",
        b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"N.",  # a frame of 1 TiB
        b"\x80\x04h\x07.",  # a memo that is not there
        b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        shared_tuples(200),
    ],
)
def test_a_hostile_pickle_is_refused_at_once(tmp_path, attack):
    """Catches memory claimed on a file's word, and a hash that takes longer than a life."""
    with pytest.raises(UserError, match=r"this pickle holds|not a whole pickle"):
        read_pickle(write(tmp_path, attack))


@pytest.mark.parametrize(
    ("before", "after"), [(b"}", b"s"), (b"}(", b"u"), (b"(", b"d")], ids=["s", "u", "d"]
)
def test_every_way_to_make_a_dict_checks_its_keys(tmp_path, before, after):
    """Bug: nested tuples as keys, whose hash takes for ever, refused in one of three opcodes."""
    key = b"K\x01\x85"
    with pytest.raises(UserError, match="keys that are neither text nor numbers"):
        read_pickle(write(tmp_path, b"\x80\x04" + before + key + b"K\x01" + after + b"."))
    found = read_pickle(write(tmp_path, b"\x80\x04" + before + b"K\x02K\x01" + after + b"."))
    assert found == {2: 1}


def test_a_memo_at_a_far_place_takes_no_room(tmp_path):
    """Catches the unpickler in C, whose table then has 2**32 entries (this kills the machine)."""
    far = b"\x80\x04Nr" + struct.pack("<I", 2**32 - 1) + b"."
    assert read_pickle(write(tmp_path, far)) is None


def test_deep_nesting_is_an_ordinary_bad_value(tmp_path):
    """Catches a RecursionError out of the message that shows the value."""
    text = lambda name: b"\x8c" + bytes([len(name)]) + name
    deep = b"]" * 50_000 + b"a" * 49_999
    table = text(b"input") + b"]" + deep + b"a" + text(b"output") + b"]" + text(b"x") + b"a"
    write(tmp_path, b"\x80\x04}(" + table + b"u.")
    problems = imported(official, tmp_path / "train.pickle", tmp_path / "cache")[1]
    assert dict(problems.counts) == {"wrong_type": 1}


@MANY
@given(data=st.data())
def test_no_mutation_gets_through_or_crashes(tmp_path_factory, data):
    """Catches an exception that is no UserError, and a broken field read as if it were none."""
    directory = tmp_path_factory.mktemp("official")
    cache = directory / "cache"
    place = data.draw(st.sampled_from(paths(GOOD)))
    for junk in (JUNK, st.binary(max_size=3)):
        path = write(directory, replaced(GOOD, place, data.draw(junk)))
        try:
            imported(official, path, cache)
        except UserError as error:
            assert "\n" not in str(error)
    cell = (data.draw(st.sampled_from(["input", "output"])), 0)
    problems = imported(official, write(directory, replaced(GOOD, cell, data.draw(WRONG))), cache)[
        1
    ]
    assert problems.errors == 1


@MANY
@given(data=st.binary(max_size=60), cut=st.integers(0, 200))
def test_no_damage_to_a_pickle_crashes(tmp_path_factory, data, cut):
    """Catches an exception of the unpickler that reaches the user as a traceback."""
    whole = pickle.dumps(GOOD)
    path = write(tmp_path_factory.mktemp("damaged"), whole[:cut] + data + whole[cut + len(data) :])
    try:
        read_pickle(path)
    except UserError as error:
        assert "\n" not in str(error)
