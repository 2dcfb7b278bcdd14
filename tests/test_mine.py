"""Hard negatives mined by the model, against loops over all scores."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from files import full_disk
from test_vectors import TEXTS, trained  # noqa: F401

from cosup_jax import encode, held_out, mine
from cosup_jax.config import IndexConfig
from cosup_jax.data import pipeline, sources, tokens
from cosup_jax.data.batch import batch_shape
from cosup_jax.data.plan import Plan
from cosup_jax.data.schema import Dataset, Example, Passage
from cosup_jax.errors import UserError
from cosup_jax.runtime.workdir import Workdir

SETTINGS = IndexConfig(mine_margin=0.1, mine_keep=3)


def chosen(*found, evidence=(), config=SETTINGS):
    """(rows, counts) where each [Ret] has its positive's score and {row: score}."""
    counts = mine.Counts()
    arrays = [(np.array([*up.values(), -np.inf]), np.array([*up, -1]), own) for own, up in found]
    return mine.choose(arrays, set(evidence), config, counts), counts


def test_what_scores_near_the_positive_is_no_negative():
    """Bugs: a likely answer taught as wrong; a margin in units of similarity; a positive below
    zero, whose margin points the other way; padding kept as a row."""
    up = {7: 1.1, 0: 1.0, 1: 0.95, 2: 0.9, 3: 0.8, 4: 0.7, 5: 0.6, 6: 0.5}
    rows, counts = chosen((1.0, up), evidence=[0])
    assert rows == [2, 3, 4]  # 0.9 is the margin itself
    assert counts == mine.Counts(questions=1, rets=1, evidence=1, likely_false=2, kept=3)
    rows, _ = chosen((-1.0, {1: -1.05, 2: -1.1, 3: -1.2}), evidence=[0])
    assert rows == [2, 3]
    assert chosen((1.0, {}), evidence=[0])[0] == []


def test_the_rets_of_an_example_take_turns():
    """Bugs: all negatives from the first [Ret]; one twice; what may be right for one [Ret], or is
    the evidence of another, taught as wrong by way of a third."""
    first = (1.0, {0: 1.0, 9: 0.99, 1: 0.5, 2: 0.4, 5: 0.3})
    second = (0.5, {8: 0.5, 2: 0.3, 9: 0.2, 3: 0.1})
    rows, counts = chosen(first, second, evidence=[0, 8])
    assert rows == [2, 1, 3]  # turns: 0 8 | 9 2 | 1 9 | 2 3
    assert counts == mine.Counts(questions=1, rets=2, evidence=2, likely_false=1, kept=3)


def rivers() -> Dataset:
    """Questions of one and of two passages, one without, copies of passages, a held-out part."""
    passages = [Passage(f"p{i}", "", TEXTS[i % 6]) for i in range(9)]
    example = lambda id, *evidence, **fields: Example(
        id, "open_qa", f"how long is {id}?", ("long",), evidence, **fields
    )
    examples = [
        example("a", "p0", hard_negatives=("p5",), support=((0, 9),)),
        example("b", "p7", "p2"),
        example("c", split="test"),
        example("d", output="It is long.", kind="label"),
        example("e", "p3", split="test", hard_negatives=("p1",)),
        example("f", "p4"),
    ]
    return Dataset.of("rivers", "2", examples, passages)


@pytest.fixture(scope="module")
def mined(trained, tmp_path_factory):  # noqa: F811
    path = tmp_path_factory.mktemp("mined")
    settings = dataclasses.replace(trained.config.index, mine_margin=0.0, mine_keep=2)
    own = trained._replace(config=dataclasses.replace(trained.config, index=settings))
    corpus, vectors = encode.index(rivers(), own, path)
    data = dataclasses.replace(own.config.data, no_evidence_fraction=0.9, drop_without_ret=True)
    asking = own._replace(config=dataclasses.replace(own.config, data=data))
    found = mine.search(rivers(), corpus, vectors, asking, path / "data")
    return own, path, corpus, vectors, found


def test_negatives_are_the_models_own(mined):
    """Bugs: queries of another [Ret], rows of another numbering, an example's negatives given to
    its neighbour; none for the examples that a run trains without their evidence."""
    own, path, corpus, vectors, found = mined
    store = tokens.tokenize([(rivers(), 1.0)], *own.tokenizers, own.config, path / "data")
    evaluator = held_out.Evaluator(own.mesh, own.towers, own.config)
    packed, _ = pipeline.pack_examples(store, batch_shape(own.config))
    expected = {}
    for batch, index_BxR in packed:
        query_BxRxD = evaluator._read(own.params, held_out.to_mesh(batch, own.mesh))[2]
        for b, r in np.argwhere(batch.ret_valid_BxR):
            score_N = vectors.take(range(len(vectors))) @ np.asarray(query_BxRxD[b, r])
            example = np.searchsorted(store.ret_offsets, index_BxR[b, r], "right") - 1
            gold = corpus.row_of[store.ret_passages[index_BxR[b, r]]]
            expected.setdefault(int(example), []).append((score_N, gold))
    assert sorted(found.rows) == [0, 1, 5] == [int(store.gen_rows[e]) for e in sorted(expected)]
    for example, rets in expected.items():
        evidence = {gold for _, gold in rets}
        right = {row for score, gold in rets for row in range(6) if score[row] > score[gold]}
        kept = []
        for turn in range(6):
            for score_N, _ in rets:
                row = int(np.argsort(-score_N, kind="stable")[turn])
                if row not in evidence | right and row not in kept:
                    kept.append(row)
        assert found.rows[int(store.gen_rows[example])] == kept[:2]
    assert found.counts.rets == 4 and found.counts.questions == 3
    assert found.counts.kept == sum(map(len, found.rows.values())) > 0


def test_a_source_without_evidence(mined):
    """Bugs: it ends the mining of all others where a run trains without such examples; a [Ret]
    that nobody asked."""
    own, path, corpus, vectors, _ = mined
    data = dataclasses.replace(own.config.data, drop_without_ret=True)
    asking = own._replace(config=dataclasses.replace(own.config, data=data))
    bare = [dataclasses.replace(e, evidence=(), support=()) for e in rivers().examples]
    plain = Dataset.of("plain", "1", bare, list(rivers().passages.values()))
    assert mine.search(plain, corpus, vectors, asking, path / "data") == ({}, mine.Counts())


def test_a_source_that_is_only_evaluated(mined, tmp_path, monkeypatch, capsys):
    """Bug: as a part of prepared:DIR it ends the mining of all others, or the training on them."""
    own, _, corpus, vectors, _ = mined
    examples = [dataclasses.replace(e, split="test") for e in rivers().examples]
    asked = Dataset.of("asked", "1", examples, list(rivers().passages.values()))
    data = SimpleNamespace(train=[(asked, 1.0), (rivers(), 1.0)])
    monkeypatch.setattr(mine.assemble, "trained", lambda *_: own._replace(data=data))
    monkeypatch.setattr(mine.assemble, "refuse_bad_rows", lambda *_: [])
    monkeypatch.setattr(mine, "encoded", lambda *_: (corpus, vectors))
    Workdir(str(tmp_path)).close()
    mine.mine(own.config, str(tmp_path))
    written = sorted(path.name for path in (tmp_path / "mined").iterdir())
    assert written == ["rivers.jsonl", "rivers.passages.jsonl"]
    assert "asked: no row to train on, nothing mined" in capsys.readouterr().out


def test_the_written_source_trains(mined, tmp_path):
    """Bugs: a field lost on the way, a split that moves, negatives that no batch holds."""
    own, _, _, vectors, found = mined
    mine.write(tmp_path / "rivers.jsonl", rivers(), found, vectors)
    again, problems = sources.load(str(tmp_path / "rivers.jsonl"), own.config.data, tmp_path / "d")
    assert not problems.counts and list(again.passages.values()) == list(rivers().passages.values())
    before, after = list(rivers().examples), list(again.examples)
    for row, example in enumerate(before):
        negatives = tuple(vectors.ids[r] for r in found.rows.get(row, ()))
        negatives = negatives if row in found.rows else example.hard_negatives
        assert after[row] == dataclasses.replace(example, hard_negatives=negatives)
    store = tokens.tokenize([(again, 1.0)], *own.tokenizers, own.config, tmp_path / "d")
    plan, wanted = Plan(store, own.config), set()
    shape = plan.shape
    batch = pipeline.host_batch(store, plan, shape, 0, slice(0, shape.B), slice(0, shape.U), False)
    held = set(map(tuple, batch.passage_ids_UxPx2[batch.passage_valid_UxP].tolist()))
    for example in range(store.num_examples):
        wanted |= set(map(tuple, store.identities[store.negatives(example)].tolist()))
    assert wanted and wanted <= held


def test_a_full_disk_is_one_line_and_keeps_the_old(mined, tmp_path):
    """Bug: half a source, which trains as if it were all."""
    _, _, _, vectors, found = mined
    target = tmp_path / "rivers.jsonl"
    mine.write(target, rivers(), found, vectors)
    before = target.read_bytes()
    with full_disk(50), pytest.raises(UserError, match="cannot write"):
        mine.write(target, rivers(), found, vectors)
    assert target.read_bytes() == before and len(list(tmp_path.iterdir())) == 2
