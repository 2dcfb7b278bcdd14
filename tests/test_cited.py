"""From the tokens of an answer to text, citations and sources."""

import pytest

from cosup_jax.answer import cited
from cosup_jax.answer.decode import Answer, Found
from cosup_jax.data import markup, tokenizer
from cosup_jax.data.schema import Example, Passage

PASSAGES = [Passage("a", "Ulm", "Ulm lies on the Danube. It is old."), Passage("b", "", "Bonn.")]
ASKED = Example("7", "open_qa", "Where?", ("Danube",), ())
A, B = Found(0, 0.5), Found(1, 0.1234567)


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.train([p.text for p in PASSAGES], 280)


def record(bpe, retrieved, *pieces, **fields):
    """Of an answer in pieces: text, or a control token by name."""
    control = {"R": [bpe.ret], "[": [bpe.cs], "]": [bpe.ce], ".": [bpe.eos]}
    tokens = [token for p in pieces for token in control.get(p, bpe.encode(p))]
    answer = Answer(tokens, retrieved, 9, "eos")._replace(**fields)
    return cited.record(ASKED, answer, PASSAGES, bpe, 100)


def test_a_whole_record(bpe):
    """Bugs: a citation before its text, or behind the full stop; numbers by span and not by
    passage; the inserted passage in the text; scores or ids of another passage, or scores with the
    digits that depend on what was scored together; eos in raw."""
    text = lambda row: markup.passage_text(PASSAGES[row])
    pieces = ["So: ", "R", text(1), "[", "Bonn", "]", "R", text(0), "[", " It is old. ", "]"]
    pieces += ["R", text(1), "[", "Bonn.", "]", "Yes", "."]
    found = record(bpe, [[B], [A], [B]], *pieces)
    assert found == {
        "id": "7",
        "question": "Where?",
        "answers": ["Danube"],
        "output": "So: Bonn[1] It is old[2]. Bonn[1]. Yes",
        "text": "So: Bonn It is old. Bonn. Yes",
        "raw": "So: [Ret]Bonn.[Cs]Bonn[Ce][Ret]Ulm :: Ulm lies on the Danube. It is old.[Cs] It is "
        "old. [Ce][Ret]Bonn.[Cs]Bonn.[Ce]Yes",
        "spans": [
            {"text": "Bonn", "passage": "b", "number": 1},
            {"text": "It is old.", "passage": "a", "number": 2},
            {"text": "Bonn.", "passage": "b", "number": 1},
        ],
        "retrieved": [
            {"id": "b", "score": 0.12346, "number": 1},
            {"id": "a", "score": 0.5, "number": 2},
            {"id": "b", "score": 0.12346, "number": 1},
        ],
        "sources": [
            {"number": 1, "id": "b", "title": "", "text": "Bonn."},
            {"number": 2, "id": "a", "title": "Ulm", "text": "Ulm lies on the Danube. It is old."},
        ],
        "tokens": 9,
        "retrievals": 3,
        "stopped": "eos",
    }


def test_dropped_passages_read_the_same(bpe):
    """Bug: where passages are dropped behind their spans, the n-th span has lost its passage."""
    kept = record(bpe, [[A], [B]], "R", "x", "[", "old", "]", "and", "R", "y", "[", "Bonn", "]")
    gone = record(bpe, [[A], [B]], "[", "old", "]", "and", "[", "Bonn", "]")
    open_end = record(bpe, [[A], [B]], "[", "old", "]", "and", "R", "y", "[", "Bonn")
    assert kept == gone == open_end


@pytest.mark.parametrize(
    ("pieces", "output", "spans"),
    [
        (["R", "Ulm", "[", "]", "Old."], "Old.", [""]),  # it has a number, and prints nothing
        (["text", "R"], "text", []),  # no room for the passage
        (["R", "Ulm", "[", "lies"], "lies[1]", ["lies"]),  # cut off
        ([], "", []),
    ],
)
def test_incomplete_answers(bpe, pieces, output, spans):
    """Bugs: an answer that was cut off raises, or loses its open span; an empty span is cited."""
    found = record(bpe, [[A]] if spans else [], *pieces, stopped="context")
    assert (found["output"], [s["text"] for s in found["spans"]]) == (output, spans)
    assert found["raw"].count("[Cs]") == found["raw"].count("[Ce]") == len(spans)


def test_of_several_passages_the_span_cites_the_one_that_holds_it(bpe):
    """Bug: with several passages at a [Ret] every span cites the first."""
    pieces = ["[", "the Danube", "]", "[", "Elbe", "]"]
    found = record(bpe, [[B, A], [B, A]], *pieces)
    assert [s["passage"] for s in found["spans"]] == ["a", "b"]
