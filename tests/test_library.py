"""All passages of a run: rows, ids and vectors of several sets behind one another."""

import numpy as np
import pytest
from batches import config
from test_vectors import CONTRACT, Numbers

from cosup_jax.answer import library as library_lib
from cosup_jax.answer.library import Library
from cosup_jax.config import IndexConfig
from cosup_jax.data import tokenizer, tokens
from cosup_jax.data.batch import batch_shape
from cosup_jax.data.schema import Dataset, Example, Passage
from cosup_jax.errors import UserError
from cosup_jax.search import index
from cosup_jax.search.corpus import Corpus, encode_to_disk

SETS = {
    "towns": {"d": "ulm", "a": "bonn", "b": "essen"},
    "rivers": {"c": "danube", "a": "rhine", "e": "rhine"},
}


@pytest.fixture(scope="module")
def shelves(tmp_path_factory):
    """Two sets that share an id; the second has a copy, and int8 vectors."""
    directory, c = tmp_path_factory.mktemp("library"), config(data__max_ctx_tokens=20)
    bpe, found = tokenizer.train(["ulm bonn essen danube rhine"], 280), []
    for first, (name, texts) in enumerate(SETS.items()):
        passages = [Passage(id, "", text) for id, text in texts.items()]
        dataset = Dataset.of(name, name, [], passages)
        store = tokens.tokenize_passages(dataset, bpe, c, directory)
        corpus = Corpus(dataset, store, batch_shape(c))
        settings = IndexConfig(dtype=("float32", "int8")[first], shard_rows=2)
        parts = (Numbers(), {"first": 5 * first}, CONTRACT, settings)
        found.append((dataset, corpus, encode_to_disk(directory / name, corpus, *parts)))
    return found


def test_rows_passages_and_vectors_go_together(shelves, monkeypatch):
    """Bugs: the second set's rows counted from 0; a row on a border given to the set before; int8
    vectors without their scale; a large library that is read into memory, or searched otherwise
    than a small one."""
    small = Library(shelves)
    assert [p.text for p in small.passages] == ["bonn", "essen", "ulm", "rhine", "danube"]
    wanted = np.concatenate([v.take(range(len(v))) for *_, v in shelves])
    np.testing.assert_allclose(small.vectors, wanted, rtol=1e-6)
    assert np.abs(wanted[3] - [5, 5.5, -5]).max() < 0.1
    monkeypatch.setattr(library_lib, "IN_MEMORY_BYTES", 4 * 5 * 3 - 1)
    large = Library(shelves)
    assert not isinstance(large.vectors, np.ndarray)
    rows = [4, 2, 3, 0]
    np.testing.assert_array_equal(large.vectors.take(rows), wanted[rows])
    query_QxD = np.array([[1, 0, 0], [-1, -1, 0]], np.float32)
    for ours, theirs in zip(
        index.search(query_QxD, large.vectors, 4),
        index.search(query_QxD, small.vectors, 4),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    with pytest.raises(IndexError):
        large.passages[5]


def test_ids_are_those_of_the_first_set_that_has_them(shelves):
    """Bugs: an id looked up in the last set; a copy that is another row than the passage it copies;
    evidence twice; an unknown id as a KeyError."""
    library = Library(shelves)
    asks = lambda *ids: library.rows(Example("q", "open_qa", "?", (), ids), "evidence")
    assert asks("c", "a", "d", "a") == [4, 0, 2]
    assert asks("e", "b") == [3, 1]
    with pytest.raises(UserError, match=r"question 'q': evidence 'f' is no passage of"):
        asks("a", "f")


def test_a_change_of_any_set_is_another_version(shelves):
    """Bug: answers over other passages taken for these."""
    versions = {Library(some).version for some in (shelves, shelves[:1], shelves[1:])}
    assert len(versions) == 3


def test_bm25_is_over_all_and_indexed_once(shelves):
    """Bugs: words of the first set only; an index for every question."""
    library = Library(shelves)
    assert np.argmax(library.bm25.scores("danube")) == 4 and library.bm25 is library.bm25
