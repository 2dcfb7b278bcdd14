"""Each source of passages against what it should find, worked out by hand."""

import numpy as np
import pytest

from cosup_jax import sharding
from cosup_jax.answer.decode import Found
from cosup_jax.answer.retrieve import Candidates, Gold, Lexical, Search, Wrong
from cosup_jax.config import MeshConfig
from cosup_jax.data.schema import Example, Passage
from cosup_jax.evaluation.baselines import BM25
from cosup_jax.search import index

TEXTS = ["ulm on the danube", "bonn on the rhine", "essen", "essen", "the danube and the rhine"]
PASSAGES = [Passage(f"p{row}", "", text) for row, text in enumerate(TEXTS)]
CORPUS = np.array([[1, 0], [0, 1], [1, 0], [-1, 0], [0.5, 0.5]], np.float32)
QUERY = np.array([[2, 0], [0, 1]], np.float32)
rows = lambda found: [[one.row for one in each] for each in found]


class OnDisk:
    """Vectors that can only be taken, as a large index."""

    def take(self, rows):
        return CORPUS[rows]


def test_search_and_candidates():
    """Bugs: the nearest of another question's candidates; ties against the order of rows; a
    candidate that is named twice found twice; more passages than there are, or a search that waits
    for one where there is none; a score of another passage."""
    search = Search(PASSAGES, CORPUS)
    assert search.limit(0) > 1000 and Search([], CORPUS[:0]).limit(0) == 0
    assert rows(search(QUERY, [0, 1], [0, 0], 2)) == [[0, 2], [1, 4]]
    assert search(QUERY[1:], [1], [0], 9)[0][0] == Found(1, 1.0)
    assert len(search(QUERY[1:], [1], [0], 9)[0]) == len(PASSAGES)
    for corpus in (CORPUS, OnDisk()):
        own = Candidates(PASSAGES, corpus, [[4, 3], [2, 0, 2], []])
        assert rows(own(QUERY[[0, 0]], [1, 0], [0, 0], 3)) == [[0, 2], [4, 3]]
        assert own(QUERY, [0, 0], [0, 0], 1) == [[Found(4, 1.0)], [Found(4, 0.5)]]
        assert own.limit(1) > 1000 and own.limit(2) == 0


def test_gold_comes_in_the_order_needed():
    """Bug: the second [Ret] of a two-hop question gets the first passage again."""
    gold = Gold(PASSAGES, [[3, 1], []])
    assert gold(QUERY, [0, 0], [1, 0], 5) == [[Found(1, None)], [Found(3, None)]]
    assert (gold.limit(0), gold.limit(1)) == (2, 0)


def test_bm25_goes_down_its_list():
    """Bugs: another ranking than BM25's; a further [Ret] that gets the same passage, or, with two
    passages each, more turns than there are passages; a question without a known word."""
    questions = ["where is bonn?", "essen", "xyzzy"]
    lexical = Lexical(PASSAGES, BM25(TEXTS), questions)
    assert rows(lexical(QUERY, [0, 1], [0, 0], 1)) == [[1], [2]]
    assert rows(lexical(QUERY, [2, 2], [0, 4], 1)) == [[0], [4]]
    assert lexical.limit(0) == 5
    pairs = Lexical(PASSAGES, BM25(TEXTS), questions, each=2)
    assert rows(pairs(QUERY, [1, 1], [0, 1], 2)) == [[2, 3], [0, 1]]
    assert pairs.limit(0) == 3 and rows(pairs(QUERY, [1], [2], 2)) == [[4]]


def test_the_wrong_passage_is_wrong_and_stays():
    """Bugs: a passage that is evidence, or says the answer all the same; another at each [Ret]."""
    asked = Example("q", "open_qa", "which river?", ("the Danube",), ("p1",))
    wrong = Wrong(
        PASSAGES, [asked] * 2 + [Example("r", "open_qa", "?", (), ())], [[1], [1], range(5)]
    )
    (first,), (second,) = wrong(QUERY, [0, 1], [0, 3], 2)
    assert first == second and first.row in (2, 3) and first.score is None
    assert (wrong.limit(0) > 1000, wrong.limit(2)) == (True, 0)
    drawn = {wrong._wrong(Example("s", "open_qa", f"{n}?", (), ()), set()) for n in range(40)}
    assert drawn == set(range(5))


def test_what_a_wrong_passage_must_not_say():
    """Bugs: the answer in its title, or one of a group of answers; no passage is wrong for the
    label "no", which is in most texts."""
    passages = [Passage("a", "Ulm", "a city"), Passage("b", "", "not a place")]

    def rows(*answers, **more):
        ask = lambda n: Example("s", "open_qa", f"{n}?", answers, (), **more)
        return set(Wrong(passages, [ask(n) for n in range(9)], [[]] * 9)._rows)

    assert rows("Ulm") == rows(answer_groups=(("x",), ("ulm",))) == {1}
    assert rows("no") == {0} and rows("no", kind="label") == rows("c", kind="choice") == {0, 1}


def test_a_corpus_in_memory_is_sent_once(monkeypatch):
    """Bugs: all vectors travel to the devices again for each search; the rows that pad them, whose
    score is 0, found before those below 0."""
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    asked = (-QUERY, [0, 1], [0, 0], 9)
    search, expected = Search(PASSAGES, CORPUS, mesh), Search(PASSAGES, CORPUS)(*asked)
    monkeypatch.setattr(index, "_placed", None)
    assert search(*asked) == expected


@pytest.mark.parametrize("k", [1, 2])
def test_one_list_a_query(k):
    """Bug: a retriever that answers in another shape than the others."""
    lists = [
        Search(PASSAGES, CORPUS),
        Candidates(PASSAGES, CORPUS, [[1, 2]] * 3),
        Lexical(PASSAGES, BM25(TEXTS), ["ulm"] * 3, k),
    ]
    for retriever in lists:
        assert [len(found) for found in retriever(QUERY, [0, 2], [0, 0], k)] == [k, k]
