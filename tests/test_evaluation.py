"""The numbers of an evaluation, each against one worked out by hand."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import config

from cosup_jax import assemble, sharding
from cosup_jax import held_out as held_out_lib
from cosup_jax import step as step_lib
from cosup_jax.config import MeshConfig
from cosup_jax.data import tokenizer, tokens
from cosup_jax.data.plan import left_out
from cosup_jax.data.schema import Dataset, Example, Passage
from cosup_jax.evaluation import retrieval
from cosup_jax.evaluation.baselines import BM25, Bigram, bm25_ranks
from cosup_jax.evaluation.metrics import answer_present, normalize_answer
from cosup_jax.search import index


@pytest.mark.parametrize("rows", [9, 300])
def test_ranks_equal_a_sort(rows, monkeypatch):
    """Bugs: a rank off by one, ties in the gold passage's favour; a last block of queries, or a
    last stretch of the corpus, that is wrong or counted twice."""
    monkeypatch.setattr(index, "STRETCH_BYTES", 1)  # a stretch of 128 rows
    rng = np.random.default_rng(0)
    corpus = rng.integers(-1, 2, (rows, 2)).astype(np.float32)  # few values: ties are certain
    query, gold = rng.integers(-1, 2, (23, 2)).astype(np.float32), rng.integers(0, rows, 23)
    order = np.argsort(-(query @ corpus.T), axis=1, kind="stable")
    expected = 1 + np.argmax(order == gold[:, None], axis=1)
    np.testing.assert_array_equal(index.ranks(query, corpus, gold, block=5), expected)
    scores, rows = index.search(query, corpus, 4)
    np.testing.assert_array_equal(rows, order[:, :4])
    np.testing.assert_allclose(scores, np.take_along_axis(query @ corpus.T, order, 1)[:, :4])


def test_copies_of_the_gold_passage_tie_with_it():
    """Bug: the last bit of a copy's score differs, so that it is ahead, or behind, by chance."""
    rng = np.random.default_rng(0)
    corpus = rng.normal(size=(300, 128)).astype(np.float32)[rng.integers(0, 300, 1200)]
    query = rng.normal(size=(300, 128)).astype(np.float32)
    _, rows = index.search(query, corpus, 40)
    gold, place = rows[np.arange(300), np.arange(300) % 40], np.arange(300) % 40
    np.testing.assert_array_equal(index.ranks(query, corpus, gold), 1 + place)


def test_a_vector_that_is_no_number_is_not_found():
    """Bug: every query of a model that has diverged finds its passage first."""
    corpus = np.array([[1, 0], [np.nan, 0], [0, 1]], np.float32)
    query = np.array([[1, 1], [1, 1], [np.nan, 1]], np.float32)
    assert index.ranks(query, corpus, np.array([2, 1, 0])).tolist() == [2, 4, 4]


def test_ranks_need_no_matrix_of_all_scores():
    """Bug: memory that grows as queries x corpus."""
    shape = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype)
    args = (shape(256, 8), shape(2**19, 8), shape(256, dtype=jnp.int32))
    temporary = index._ranks.lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * index.STRETCH_BYTES < 4 * 256 * 2**19 / 4


def test_retrieval_metrics():
    """Bug: a rank of k that does not count as within k; ranks beyond 10 in MRR@10."""
    assert retrieval.summary(np.array([1, 2, 10, 11])) == {
        "recall_at_1": 0.25,
        "recall_at_10": 0.75,
        "mrr_at_10": pytest.approx((1 + 1 / 2 + 1 / 10) / 4),
    }


def test_bm25_ranks():
    """Bug: the baseline ranks another passage, or ties in the gold passage's favour."""
    corpus = ["ulm lies on the danube", "bonn lies on the rhine", "essen", "essen"]
    ranks = bm25_ranks(BM25(corpus), ["where is bonn", "essen", "essen"], np.array([1, 2, 3]))
    np.testing.assert_array_equal(ranks, [1, 1, 2])


def test_sources_are_indexed_once_and_told_apart(monkeypatch):
    """Bugs: a BM25 index for each set of a source, or one source's for another's questions."""
    indexed = []
    monkeypatch.setattr(held_out_lib, "BM25", lambda texts: indexed.append(texts) or BM25(texts))
    pairs = np.arange(3)
    store = SimpleNamespace(gen_tokens=pairs, gen_roles=pairs.astype(np.uint8), ret_passages=pairs)
    store.gen_offsets, store.ret_offsets = np.array([0, 3]), np.arange(4)

    def part(name, version, *texts):
        passages = [Passage(text, "", text) for text in texts]
        examples = [Example(f"{i}", "open_qa", t, (), ()) for i, t in enumerate(("ulm", "bonn"))]
        examples.append(Example("2", "open_qa", "essen", (), ()))
        corpus = SimpleNamespace(passages=passages, row_of=pairs)
        data = Dataset.of(name, version, examples, passages)
        return held_out_lib.HeldOut(name, data, examples, store, (), corpus, pairs > 5)

    towns = ("ulm", "bonn", "essen")
    sets = [part("a", "1", *towns), part("b", "1", *towns), part("c", "2", *towns[::-1])]
    found = held_out_lib.baselines(sets, store, config())["BM25"]
    assert [found[name]["recall_at_1"] for name in "abc"] == [1, 1, pytest.approx(1 / 3)]
    assert indexed == [list(towns), list(towns[::-1])]


def test_bigram_by_hand():
    """Bug: a bigram model that is no distribution, so that beating it means nothing."""
    bigram = Bigram(3)
    bigram.fit(np.array([0, 0, 1]), np.array([1, 2, 1]))
    unigram = np.array([1, 3, 2]) / 6  # counts 0, 2, 1 plus one each
    expected = -np.log((1 + unigram[1]) / (2 + 1))  # 0 -> 1 seen once of twice
    np.testing.assert_allclose(bigram.nats(np.array([0]), np.array([1])), expected)
    for previous in range(3):
        nats = [bigram.nats(np.array([previous]), np.array([i])) for i in range(3)]
        np.testing.assert_allclose(np.exp(-np.array(nats)).sum(), 1)


def test_answers_are_compared_as_the_peers_do():
    """Bug: an empty answer counted right; articles or punctuation that decide."""
    assert normalize_answer("The  U.S.A., a Country") == "usa country"
    assert answer_present("It is the Danube.", ["Rhine", "danube"])
    assert not answer_present("", [""]) and not answer_present("Rhine", ["Danube"])


def test_scores_are_given_for_seen_and_unseen_passages(tmp_path):
    """Bugs: a score on passages that training has read passed off as one on new ones; what no row
    of training holds counted as read."""
    passages = [Passage(f"p{i}", "", f"town {i} lies by river {i}") for i in range(6)]
    ask = lambda i, split: Example(
        f"{split}{i}", "open_qa", f"town {i}?", (f"river {i}",), (f"p{i}",), split=split
    )
    examples = [ask(i, "train") for i in range(3)] + [ask(i, "test") for i in range(6)]
    examples.append(dataclasses.replace(ask(3, "train"), question="too long? " * 40))
    dataset = Dataset.of("towns", "1", examples, passages)
    small = {"layers": 1, "width": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp_width": 64}
    keys = {f"gen__arch__{name}": value for name, value in small.items()}
    c = assemble.resolve(config(data__max_gen_tokens=64, data__max_ctx_tokens=20, **keys))
    bpe = tokenizer.train([passage.text for passage in passages], 280)
    both = assemble.Tokenizers(bpe, bpe)
    t = assemble.make_towers(c, both)
    store = tokens.tokenize([(dataset, 1.0)], *both, c, tmp_path)
    (held_out,) = held_out_lib.held_out_sets(
        [dataset], both, c, tmp_path, store, left_out(store, c)
    )
    assert held_out.seen.tolist() == [True] * 3 + [False] * 3
    assert [held_out.corpus.passages[row].id for row in held_out.corpus.row_of] == [
        f"p{i}" for i in range(6)
    ]
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    params = jax.jit(lambda: step_lib.init_params(jax.random.key(0), t, c))()
    scores = held_out_lib.Evaluator(mesh, t, c).scores(params, [held_out])
    part = lambda name: scores[f"eval/towns.test/recall_at_1{name}"]
    assert part("") == pytest.approx((part("_seen") + part("_unseen")) / 2)
