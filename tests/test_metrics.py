"""Scores against the peers' own code, by recorded numbers, and by hand where the peers differ.

The cases are those of the definitions of KILT, ALCE and the official code: each corner of them is
a line here or a suite of goldens/metrics.json, which record_metrics.py writes.
"""

import json
from pathlib import Path

import metric_cases
import pytest

from cosup_jax.evaluation import kilt, metrics, text
from cosup_jax.evaluation.sentences import sentences

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "metrics.json").read_text())


@pytest.mark.parametrize("name", metric_cases.SUITES)
def test_the_peers_own_numbers(name):
    """Bug: a score under a peer's name that is not the one the peer's code gives."""
    ours = metric_cases.SUITES[name][1]
    assert len(GOLDEN[name]) == metric_cases.SUITES[name][2]
    for case, theirs in GOLDEN[name]:
        assert metric_cases.difference(ours(case), theirs) < 1e-9, (case, ours(case), theirs)


@pytest.mark.parametrize(
    "raw, normalized",
    [
        ("U.S.A.", "usa"),
        ("U. S. A.", "u s"),
        ("rock-and-roll", "rockandroll"),
        ("3.14", "314"),
        ("vitamin A", "vitamin"),
        ("the-end", "theend"),
        ("snake_case", "snakecase"),
        ("“Caf\u00e9” — ok。", "“caf\u00e9” — ok。"),
        ("cafe\u0301", "cafe\u0301"),
        ("x\u00a0 \u3000y", "x y"),
        ("“the”", "“ ”"),
        ("The", ""),
        ("...", ""),
        ("?", ""),
    ],
)
def test_normalize_answer(raw, normalized):
    """Bugs: a blank in place of punctuation, Unicode punctuation or accents touched."""
    assert metrics.normalize_answer(raw) == normalized


@pytest.mark.parametrize(
    "raw, left",
    [
        ("Yes [1, 2].", "Yes, 2."),
        ("[a]", "[a"),
        ("a | b", "a b"),
        ("[Ret]", "[Ret"),
        ("a  [1]", "a "),
    ],
)
def test_remove_citations(raw, left):
    """Bug: a tidier rule than ALCE's, after which an answer is found that ALCE misses."""
    assert metrics.remove_citations(raw) == left


def test_short_answers():
    """Bugs: accuracy that folds case; a blank prediction that matches; articles that decide."""
    assert metrics.accuracy(" Paris ", ["Rome", "Paris"]) == 1.0
    assert metrics.accuracy("paris", ["Paris"]) == 0.0
    assert metrics.exact_match("the Paris!", ["paris"]) == 1.0
    assert metrics.exact_match("...", ["?"]) == 1.0 and metrics.f1("...", ["?"]) == 0.0
    assert metrics.f1("a b c c", ["c c d"]) == pytest.approx(2 / 3)  # of b c c and c c d: 2 and 2
    assert metrics.exact_match("Paris", "Paris") == 1.0  # one answer, not its letters
    for score in (metrics.accuracy, metrics.exact_match, metrics.f1, metrics.rouge_l):
        assert score(" ", ["the", " "]) == 0.0 and score(" ", []) == 0.0
        with pytest.raises(ValueError, match="no gold answer"):
            score("x", [" "])


def test_rouge_l():
    """Bugs: another ROUGE-L under KILT's name; a long text that ends in a RecursionError."""
    assert metrics.rouge_l("a b c", ["a b c"]) == pytest.approx(0.999999995, abs=1e-12)
    assert metrics.rouge_l("Suicide.", ["suicide"]) == 0.0
    assert metrics.rouge_l("a. ", ["a"]) == metrics.rouge_l("a.", ["a"])  # stripped
    assert text.rouge_l_of("a. ", "a") < 0.7  # not stripped: the blank is a word
    assert metrics.rouge_l("a a a b", ["a b"]) == pytest.approx(1)  # types, not tokens
    assert metrics.rouge_l("b a. b", ["a b"]) == pytest.approx(0.5)  # of two LCS, b is found
    assert metrics.rouge_l("...", ["x"]) == 0.0
    long = " ".join(map(str, range(1100)))
    assert metrics.rouge_l(long, [long]) == pytest.approx(1)


def test_answer_in_a_text():
    """Bugs: whole words asked for, where ALCE takes substrings; an empty prediction right."""
    assert metrics.exact_presence(["art"], "a party") and metrics.exact_presence(["1990"], "19905")
    assert metrics.exact_presence(["the"], "") and not metrics.answer_present("", ["the"])
    assert not metrics.exact_presence("xy", "x")  # one answer, not its letters


def gold(*outputs, **more):
    made = [{"answer": a, "provenance": [{"wikipedia_id": p} for p in ps]} for a, ps in outputs]
    return {"id": "1", "input": "q", "output": made, **more}


def guess(answer, pages, name="1"):
    found = [{"wikipedia_id": page} for page in pages]
    return {"id": name, "output": [{"answer": answer, "provenance": found}]}


def test_kilt_gate():
    """Bugs: the gate asks for the page of the answer that matched, or for the first page only."""
    wanted = gold(("Paris", ["1"]), ("Rome", ["2"]))
    found = metrics.kilt_scores([wanted], [guess("Paris", ["2", "9"])])
    assert (
        found["kilt"]["KILT-em"] == 1.0 and found["retrieval"]["Rprec"] == 1.0 and found["n"] == 1
    )
    half = metrics.kilt_scores([gold(("Paris", ["1", "2"]))], [guess("Paris", ["1", "9", "2"])])
    assert half["downstream"]["em"] == 1.0 and half["kilt"]["KILT-em"] == 0.0
    assert half["retrieval"]["Rprec"] == 0.5 and half["retrieval"]["recall@5"] == 1.0


def test_kilt_counts_every_gold_record():
    """Bugs: a blank guess left out of N; its retrieval not scored; guesses taken by position."""
    golds = [gold(("Paris", ["1"])), gold(("Rome", ["2"])) | {"id": 2}]
    guesses = [guess("Rome", ["2"], " 2 "), guess(" ", ["1"]), guess("x", [], "extra")]
    found = metrics.kilt_scores(golds, guesses)
    assert found["downstream"] == {
        "accuracy": 0.5,
        "em": 0.5,
        "f1": 0.5,
        "rougel": pytest.approx(0.5),
    }
    assert found["retrieval"]["Rprec"] == 1.0 and found["n"] == 2
    assert metrics.kilt_scores([], [])["n"] == 0
    blank = gold((" ", ["1"]))
    assert metrics.kilt_scores([blank], [guess("", [])])["downstream"]["em"] == 0.0
    bare = metrics.kilt_scores([{k: v for k, v in golds[0].items() if k != "input"}], guesses[1:])
    assert "entity_in_input" not in bare["retrieval"]


@pytest.mark.parametrize(
    "golds, guesses, words",
    [
        ([gold(("a", []))], [], "no guess for the gold record 1"),
        ([gold(("a", []))] * 2, [guess("a", [])], "two gold records have the id 1"),
        ([gold(("a", []))], [guess("a", []), guess("b", [], "1 ")], "two guess records"),
        ([gold(("a", []))], [{"id": 1, "output": []}], "exactly one output"),
        ([gold(("a", []))], [{"id": 1, "output": [{"provenance": []}]}], "with an answer"),
        ([gold((" ", []))], [guess("a", [])], "gold record 1: there is no gold answer"),
    ],
)
def test_kilt_refuses(golds, guesses, words):
    """Bug: a record that cannot be scored is left out, and the mean is over fewer."""
    with pytest.raises(ValueError, match=words):
        metrics.kilt_scores(golds, guesses)


def test_kilt_ranks():
    """Bugs: a page counts before its evidence set is complete; equal sets, pages without an id or
    empty sets dropped from the denominator, or counted twice."""
    wanted = gold(("a", ["1", "2"]), ("a", ["3"]))
    assert metrics.recall_at_k(guess("a", ["1"]), wanted, 5) == 0.0
    assert metrics.recall_at_k(guess("a", ["1", "3", "2"]), wanted, 1) == 0.5  # 3; 2 comes after it
    assert metrics.recall_at_k(guess("a", ["1", "2", "3"]), wanted, 2) == 1.0  # places, not pages
    assert metrics.precision_at_k(guess("a", ["1", "9", "2"]), wanted, 2) == 0.5
    assert metrics.success_at_k(guess("a", ["9", "3"]), wanted, 1) == 0.0
    assert metrics.success_at_k(guess("a", ["9", "3"]), wanted, 2) == 1.0
    twice = gold(("a", ["3"]), ("b", ["3", "3"]))
    assert metrics.recall_at_k(guess("a", ["3"]), twice, 5) == 1.0
    empty = gold(("a", ["3"]), ("b", []))
    assert metrics.recall_at_k(guess("a", ["3"]), empty, 5) == 0.5
    assert metrics.r_precision(guess("a", ["3"]), empty) == 1.0
    assert metrics.recall_at_k(guess("a", ["3"]), {"output": [{"answer": "a"}]}, 5) == 0.0
    nameless = gold(("a", ["3"]))
    nameless["output"][0]["provenance"].append({"title": "x"})
    assert metrics.r_precision(guess("a", ["3"]), nameless) == 1.0  # yet its set is never complete
    assert metrics.recall_at_k(guess("a", ["3"]), nameless, 5) == 0.0
    assert metrics.recall_at_k(guess("a", ["3", " "]), nameless, 5) == 1.0  # "" is that page's id
    both = gold(("a", ["1", "2"]), ("b", ["2", "3"]))
    assert metrics.precision_at_k(guess("a", ["1", "3", "2"]), both, 2) == 1.0  # 2 completes both
    assert metrics.r_precision(guess("a", [" 3", 3, "1"]), gold(("a", ["1", "3"]))) == 1.0
    with pytest.raises(ValueError, match="k is 0"):
        metrics.recall_at_k(guess("a", ["3"]), twice, 0)


def test_kilt_other_rank_keys():
    """Bug: a page counts for a paragraph of it, where ids join several fields."""
    wanted = {"output": [{"provenance": [{"wikipedia_id": "1", "section": "s"}]}]}
    found = lambda s: {"output": [{"provenance": [{"wikipedia_id": "1", "section": s}]}]}
    keys = ("wikipedia_id", "section")
    assert metrics.r_precision(found("s"), wanted, keys) == 1.0
    assert metrics.r_precision(found("t"), wanted, keys) == 0.0
    assert metrics.recall_at_k(found(" s "), wanted, 1, keys) == 1.0


def test_kilt_context():
    """Bugs: answer and entity taken from different passages; a passage beyond the first k."""
    wanted = {"output": [{"answer": "Paris", "provenance": [{"title": "The Seine"}]}]}
    texts = [{"title": "no text"}, {"text": "in paris!"}, {"text": "the seine"}]
    found = {"output": [{"provenance": texts}]}
    assert [metrics.answer_in_context(found, wanted, k) for k in (1, 2)] == [0.0, 1.0]
    assert [kilt.entity_in_context(found, wanted, k) for k in (2, 3)] == [0.0, 1.0]
    assert kilt.answer_and_entity_in_context(found, wanted, 3) == 0.0
    texts[2]["text"] += " paris"
    assert kilt.answer_and_entity_in_context(found, wanted, 3) == 1.0


def test_sentences():
    """Bugs: data that must be downloaded; a splitter that is nearly NLTK's."""
    assert sentences("One. [1] Two.") == ["One.", "[1] Two."]
    assert sentences("Dr. A. Smith of the U.S. left. Why?! Well... yes. . .") == [
        "Dr. A. Smith of the U.S. left.", "Why?!", "Well... yes.", ".", ".",
    ]  # fmt: skip
    assert sentences(" \n") == []
