"""Which questions an evaluation asks, over which passages, and what is known of them."""

import dataclasses
import itertools

import numpy as np
import pytest
from batches import config

from cosup_jax import assemble, held_out
from cosup_jax.answer import asked
from cosup_jax.data import markup, tokenizer, tokens
from cosup_jax.data.schema import Dataset, Example, Passage
from cosup_jax.evaluation.baselines import BM25


@pytest.fixture(scope="module")
def towns(tmp_path_factory):
    """20 towns; 12 questions about the first 8, training read the first 3; one passage twice."""
    directory = tmp_path_factory.mktemp("towns")
    passages = [Passage(f"p{i}", "", f"town {i} lies by river {i}") for i in range(20)]
    passages.append(dataclasses.replace(passages[4], id="copy"))
    ask = lambda i, split, *more: Example(
        f"{split}{i}", "open_qa", f"town {i}?", (f"river {i}",), (f"p{i % 8}", *more), split=split
    )
    examples = [ask(i, "train") for i in range(3)]
    examples += [ask(i, "test") for i in range(10)]
    examples += [ask(10, "test", "copy"), ask(11, "test", "p0")]
    examples.append(dataclasses.replace(ask(12, "test"), evidence=(), answer_groups=(("a", "b"),)))
    dataset = Dataset.of("towns", "1", examples, passages)
    c = assemble.resolve(config(data__max_gen_tokens=160, data__max_ctx_tokens=20))
    bpe = tokenizer.train([passage.text for passage in passages], 280)
    both = assemble.Tokenizers(bpe, bpe)
    store = tokens.tokenize([(dataset, 1.0)], *both, c, directory)

    def sets(make=held_out.asked_sets, run_seed=0, **changed):
        changed = dataclasses.replace(c, seed=run_seed, eval=dataclasses.replace(c.eval, **changed))
        none = np.zeros(0, np.int32)
        (found,) = make([dataset], both, changed, directory, store, none)
        return found

    return sets


def test_fewer_questions_are_the_first_of_more(towns):
    """Bugs: another draw for another number, so that nothing answered can be used again; questions
    in the order of the file, of which the first are all alike."""
    few, more, every = (
        [example.id for example in towns(questions=count).examples] for count in (4, 9, 0)
    )
    assert few == more[:4] and more == every[:9]
    assert len(set(every)) == 13 and every != sorted(every)


def test_questions_are_not_drawn_by_the_seed_of_the_run(towns):
    """Bugs: seeds of training compared on other questions, or over other distractors, so that the
    spread between them is that of the draw; a draw that nothing changes."""
    for make, key in ((held_out.asked_sets, "questions"), (held_out.held_out_sets, "examples")):
        ids = lambda make=make, key=key, **seeds: [
            example.id for example in towns(make, **seeds, **{key: 4}).examples
        ]
        assert ids() == ids(run_seed=1) != ids(seed=1)
    part = towns(questions=0)
    found = lambda **seeds: asked.arms(part, None, config(eval__corpus_sizes="12", **seeds))
    rows = lambda **seeds: found(**seeds)[1].rows.tolist()
    assert rows() == rows(seed=1) != rows(eval__seed=1)


def test_what_is_known_of_a_question(towns):
    """Bugs: evidence by an id that retrieval never returns, as the corpus holds its text once;
    a question counted as seen for one of its two passages."""
    part = towns(questions=0)
    facts = {f["id"]: f for f in (asked.about(part, i) for i in range(len(part.examples)))}
    first = part.corpus.passages[part.corpus.row_of[20]].id
    assert facts["test4"]["evidence"] == [first] and first in ("p4", "copy")
    assert facts["test10"]["evidence"] == ["p2", first]
    seen = {id: fact["seen"] for id, fact in facts.items()}
    assert seen["test0"] is True and seen["test3"] is False
    assert seen["test10"] is False and seen["test11"] is False  # one of two
    assert seen["test12"] is None and facts["test12"]["answer_groups"] == [["a", "b"]]
    assert {fact["set"] for fact in facts.values()} == {"towns.test"}
    assert not any(fact["long"] or fact["long_answer"] for fact in facts.values())


def test_an_output_without_a_short_answer_is_the_long_one(towns):
    """Bugs: a set of outputs alone has nothing to be scored by; markers in the expected text."""
    part = towns(questions=1)
    output = "It lies [Ret:p1]by river 1[Ce]there. "
    given = dataclasses.replace(part.examples[0], output=output, answers=("river 1",))
    for answers, wanted in (((), "It lies by river 1 there."), (given.answers, "")):
        example = dataclasses.replace(given, answers=answers)
        fact = asked.about(part._replace(examples=[example]), 0)
        assert fact["long"] and fact["long_answer"] == wanted


def test_corpora_of_growing_size(towns):
    """Bugs: a question whose evidence is not there to be found; sizes that are not nested, so that
    more passages may be easier; a size that is the whole corpus, or the same as another."""
    part = towns(questions=0)
    gold = {row for question in range(13) for row in part.evidence(question)}
    assert len(gold) == 8 and len(part.corpus) == 20
    drawn = lambda seed: np.random.default_rng(seed).permutation
    found = asked.subsets(part, [2, 5, 12, 15, 20, 100], drawn(0))
    assert [len(rows) for rows in found] == [8, 12, 15]
    for small, large in itertools.pairwise(found):
        assert set(small) < set(large)
    assert gold == set(found[0]) and all((np.diff(rows) > 0).all() for rows in found)
    assert asked.subsets(part, [20, 100], ordered=None) == []  # asked for no order
    again = asked.subsets(part, [12], drawn(1))
    assert set(again[0]) != set(found[1]) and gold < set(again[0])


def test_hard_corpora_hold_what_resembles_the_questions(towns):
    """Bugs: distractors that no question comes near, or that only one question's words choose; a
    passage of a question that is no longer in its corpus."""
    part = towns(questions=0)
    passages = [markup.passage_text(part.corpus.passages[row]) for row in range(20)]
    gold = {row for question in range(13) for row in part.evidence(question)}
    others = [row for row in range(20) if row not in gold]
    bm25 = BM25(passages)
    best = dict.fromkeys(others, len(others))
    for example in part.examples:
        scores = bm25.scores(example.question).tolist()
        ranked = sorted(others, key=lambda row, scores=scores: (-scores[row], row))
        for rank, row in enumerate(ranked):
            best[row] = min(best[row], rank)
    wanted = sorted(others, key=lambda row: (best[row], row))
    c = config(eval__hard_corpus_sizes="10,13", eval__arms="corpus")
    arms = asked.arms(part, lambda: bm25, c)
    assert [arm.name for arm in arms] == ["corpus", "corpus_hard_10", "corpus_hard_13"]
    assert [set(arm.rows) - gold for arm in arms[1:]] == [set(wanted[:2]), set(wanted[:5])]
    assert wanted[:5] != others[:5] and all(gold < set(arm.rows) for arm in arms[1:])


def test_no_passage_needs_a_word():
    """Bug: BM25 has nothing to index, and the evaluation ends in a traceback."""
    for texts in ([], ["?", "!"]):
        assert BM25(texts).scores("Which town?").tolist() == [0.0] * len(texts)


def test_arms(towns):
    """Bugs: an arm without passages to take, or a size of the corpus passed off as the whole."""
    part = towns(questions=0, corpus_sizes="12", arms="none,corpus,candidates,gold")
    c = config(eval__corpus_sizes="12", eval__arms="none,corpus,candidates,gold")
    arms = asked.arms(part, None, c)
    assert [(a.name, a.passages, a.subset) for a in arms] == [
        ("none", None, False),
        ("corpus", 20, False),
        ("corpus_12", 12, True),
        ("gold", None, False),
    ]
    named = [dataclasses.replace(e, candidates=("p1",), evidence=()) for e in part.examples]
    arms = asked.arms(part._replace(examples=named), None, c)
    assert [a.name for a in arms] == ["none", "corpus", "corpus_12", "candidates"]
