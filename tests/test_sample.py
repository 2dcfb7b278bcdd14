"""Answers in training: which questions, how often, and what is logged of them."""

from types import SimpleNamespace

import numpy as np
import pytest
from batches import config

from cosup_jax.answer import sample
from cosup_jax.data.schema import Dataset, Example, Passage
from cosup_jax.held_out import HeldOut

COUNT = 7
PASSAGES = [Passage(f"p{row}", "", f"river{row} is long") for row in range(COUNT)]


class Rows:
    """Stands for a corpus."""

    passages, row_of = PASSAGES, np.arange(COUNT)

    def __len__(self):
        return COUNT


def held_out(name, version, **fields):
    ask = lambda i: Example(f"{i}", "open_qa", f"{i}?", (f"river{i}",), (f"p{i}",), split="test")
    examples = [ask(i) for i in range(COUNT)]
    for i in range(fields.get("groups", 0)):
        examples[i] = Example(f"{i}", "open_qa", "?", (), (), "test", answer_groups=(("river0",),))
    dataset = Dataset.of(name, version, examples, PASSAGES)
    store, seen = SimpleNamespace(ret_offsets=np.arange(COUNT + 1)), np.zeros(COUNT, bool)
    return HeldOut(f"{name}.test", dataset, examples, store, (), Rows(), seen)


@pytest.fixture
def told(monkeypatch):
    """What was encoded and asked; every answer is "river0"."""
    told = SimpleNamespace(encoded=0, asked=[], most=[])

    class Encoder:
        def __init__(self, *parts):
            pass

        def corpus(self, params, packed, count):
            told.encoded += 1
            return np.full((count, 2), told.encoded)

    class Answering:
        def __init__(self, *parts):
            told.most.append(parts[-1])

        def answers(self, params, part, questions, arm, vector_NxD):
            told.asked.append((part.name, list(questions), vector_NxD[0, 0], arm.passages))
            span = {"text": "river0", "number": 1, "passage": "p0"}
            source = {"number": 1, "id": "p0", "title": "", "text": PASSAGES[0].text}
            for question in questions:
                yield {
                    **{"id": part.examples[question].id, "answer": "river0", "text": "river0"},
                    **{"output": "river0[1]", "raw": "", "ranking": ["p0"]},
                    **{"spans": [span], "sources": [source]},
                }

    monkeypatch.setattr(sample, "Encoder", Encoder)
    monkeypatch.setattr(sample, "Answering", Answering)
    return told


def sample_of(sets, **keys):
    c = config(**keys)
    return sample.Sample(sets, None, None, c, None), c


def test_the_same_questions_each_time(told):
    """Bugs: other questions at another step, so that the curve is noise; the first of the file; a
    corpus encoded for each set, or another source's vectors; a step answered twice, or another
    step's answers shown."""
    sets = [held_out("a", "1"), held_out("b", "1"), held_out("c", "2")]
    draws = {"seed": 1, "eval__seed": 0}  # those of the run's seed would be others
    keys = {"eval__answers": 2, "generate__examples": 7, "generate__batch_size": 2}
    found, c = sample_of(sets, **keys, **draws)
    assert found.shown == 3 and told.most == [2]
    first = found.at(10, None)
    assert first is found.at(10, None) and told.encoded == 2
    order = np.random.default_rng(c.eval.seed).permutation(COUNT)[:3].tolist()
    assert order != [0, 1, 2]
    assert told.asked == [
        ("a.test", order, 1, COUNT),
        ("b.test", order, 1, COUNT),
        ("c.test", order, 2, COUNT),
    ]
    assert [record["id"] for record in first["b.test"]] == [str(i) for i in order]
    found.at(20, None)
    assert told.encoded == 4 and [asked[:2] for asked in told.asked[:3]] == [
        asked[:2] for asked in told.asked[3:]
    ]
    none, _ = sample_of(sets, eval__answers=0, generate__examples=0)
    assert none.at(1, None) == {} and none.metrics(1, None) == {}


def test_what_is_logged(told):
    """Bugs: a mean over answers that are only shown, or over questions that a score has no ground
    for, or None in it; a score without NLI under the name of one with it; a set judged by another
    score than it is judged by after."""
    sets = [held_out("a", "1"), held_out("b", "2", groups=4)]
    found, _ = sample_of(sets, eval__answers=COUNT, generate__examples=1)
    logged = found.metrics(5, None)
    share = pytest.approx(1 / COUNT)
    assert logged["eval/a.test/answers_correct"] == logged["eval/a.test/answers_Rprec"] == share
    assert logged["eval/a.test/answers_f1"] == share
    assert logged["eval/a.test/answers_containment_citation_rec"] == 1
    assert not any("answers_citation" in name for name in logged)
    assert logged["eval/b.test/answers_correct"] == 1  # STR-EM, of the four that have groups
    assert logged["eval/b.test/answers_Rprec"] == 0  # of the three others
    fewer, _ = sample_of(sets[:1], eval__answers=1, generate__examples=COUNT)
    first = [record["correct"] for record in fewer.at(5, None)["a.test"]]
    assert len(first) == COUNT and fewer.metrics(5, None)["eval/a.test/answers_correct"] == first[0]
    assert first[0] != np.mean(first)
    right = [record["correct"] for record in found.at(5, None)["b.test"]]
    assert sorted(map(str, right)) == ["1.0"] * 4 + ["None"] * 3
