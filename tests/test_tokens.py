"""The token store: what is written, what is reused, what a kill leaves behind."""

import dataclasses
import hashlib
import pickle

import numpy as np
import pytest

from cosup_jax.config import Config, replace_dotted
from cosup_jax.data import markup, pipeline, tokenizer, tokens
from cosup_jax.data.batch import BatchShape
from cosup_jax.data.schema import Dataset, Example, Passage
from cosup_jax.errors import UserError

PASSAGES = {
    id: Passage(id, title, text)
    for id, title, text in (
        ("a", "Paris", "Paris lies on the Seine."),
        ("b", "Rome", "Rome lies on the Tiber, in Italy, far from the Seine."),
        ("c", "Paris", "Paris lies on the Seine."),
    )
}
EXAMPLES = [
    Example("1", "open_qa", "Where is Paris?", ("the Seine",), ("a",), hard_negatives=("b", "c")),
    Example("2", "open_qa", "Which rivers?", ("two",), ("b", "a"), support=((0, 22), None)),
    Example("3", "open_qa", "Hello?", ("Hello.",), ()),
    Example("4", "open_qa", "Held out?", ("yes",), ("b",), split="test"),
]
DATASET = Dataset("toy", "v1", EXAMPLES, PASSAGES)


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.train([p.text for p in PASSAGES.values()], 300)


def build(directory, bpe, dataset=DATASET, split="train", weight=1.0, **changes):
    config = Config(num_steps=1)
    for dotted, value in changes.items():
        config = replace_dotted(config, dotted.replace("__", "."), value)
    return tokens.tokenize([(dataset, weight)], bpe, bpe, config, directory, split)


def test_store_holds_what_markup_wrote(tmp_path, bpe):
    """An offset off by one hands every example its neighbour's tokens."""
    store = build(tmp_path, bpe)
    assert store.example_ids == ["1", "2", "3"] and store.passage_ids == ["a", "b", "c"]
    for row, example in enumerate(EXAMPLES[:3]):
        (marked,) = markup.encode([markup.pieces(example, PASSAGES)], bpe, 96)
        found, roles = store.gen(row)
        assert found.tolist() == marked.tokens.tolist()
        assert roles.tolist() == marked.roles.tolist()
        positions, passages = store.rets(row)
        assert [store.passage_ids[p] for p in passages] == list(example.evidence)
        assert (found[positions] == bpe.ret).all() and len(positions) == len(example.evidence)
    assert store.negative_passages.tolist() == [1, 2]
    assert store.negative_offsets.tolist() == [0, 2, 2, 2]


def test_identity_is_that_of_the_tokens_ctx_reads(tmp_path, bpe):
    """Identity of the text, or of uncut tokens, lets equal inputs count as negatives."""
    store = build(tmp_path, bpe)
    expected = np.array([*bpe.encode("Paris :: Paris lies on the Seine."), bpe.eos], "<i4")
    assert store.ctx[0].tolist() == expected.tolist()
    digest = hashlib.sha256(expected.tobytes()).digest()
    assert store.identities[0].tobytes() == digest[:8]
    assert (store.identities[0] == store.identities[2]).all()
    assert (store.identities[0] != store.identities[1]).any()
    cut = build(tmp_path, bpe, data__max_ctx_tokens=6)
    assert {len(passage) for passage in cut.ctx} == {6}
    assert all(passage[-1] == bpe.eos for passage in cut.ctx)


def test_vector_is_read_at_emb(tmp_path, bpe):
    """A vector read beside [Emb] is that of "go on writing", not of "condense this passage"."""
    store = build(tmp_path, bpe, ctx__pooling="token", data__max_ctx_tokens=12)
    shape = BatchShape(B=1, T=8, R=1, S=1, U=2, L=30, P=2)
    (packed,) = pipeline.pack_passages(store.ctx, shape)
    rows, slots = np.nonzero(packed.passage_valid_UxP)
    assert sorted(packed.index_UxP[rows, slots]) == [0, 1, 2]
    at_end = packed.ctx_tokens_UxL[rows, packed.passage_ends_UxP[rows, slots]]
    assert (at_end == bpe.emb).all() and (packed.ctx_tokens_UxL == bpe.emb).sum() == 3
    assert max(map(len, store.ctx)) == 12, "no passage was cut"


def test_store_is_reused_only_where_nothing_changed(tmp_path, bpe):
    """Stale tokens after a changed setting train silently on yesterday's data."""
    first = build(tmp_path, bpe)
    stamp = (first.directory / "gen_tokens").stat().st_mtime_ns
    again = build(tmp_path, bpe, data__no_evidence_fraction=0.0, batch_size=64)
    assert again.directory == first.directory
    assert (again.directory / "gen_tokens").stat().st_mtime_ns == stamp
    other_bpe = tokenizer.train(["something else"], 300)
    fewer = dataclasses.replace(DATASET, examples=EXAMPLES[:1])
    others = [
        build(tmp_path, bpe, data__max_ctx_tokens=50),
        build(tmp_path, bpe, ctx__pooling="last"),
        build(tmp_path, bpe, ctx__pooling="token"),
        build(tmp_path, bpe, data__no_evidence_fraction=0.5),
        build(tmp_path, bpe, data__drop_without_ret=True),
        build(tmp_path, bpe, weight=2.0),
        build(tmp_path, bpe, dataclasses.replace(DATASET, version="v2")),
        build(tmp_path, bpe, fewer),
        build(tmp_path, bpe, split="test"),
        build(tmp_path, other_bpe),
    ]
    assert len({store.fingerprint for store in (first, *others)}) == 1 + len(others)
    assert not list(tmp_path.glob(".*")), "a temporary directory stayed behind"


def test_share_without_evidence_is_a_function_of_the_id(tmp_path, bpe):
    """A draw that moves with order or seed changes the data under a resumed run."""
    many = [dataclasses.replace(EXAMPLES[0], id=f"e{i}") for i in range(400)]
    found = []
    for examples in (many, many[::-1]):
        dataset = dataclasses.replace(DATASET, examples=examples, version=examples[0].id)
        store = build(tmp_path, bpe, dataset, data__no_evidence_fraction=0.25)
        rets = np.diff(store.ret_offsets)
        assert ((np.diff(store.negative_offsets) > 0) == (rets > 0)).all()
        found.append({id for id, n in zip(store.example_ids, rets, strict=True) if n == 0})
    assert found[0] == found[1] and 70 <= len(found[0]) <= 130


def test_drop_without_ret_is_counted_and_spares_evaluation(tmp_path, bpe):
    """Dropping unseen makes two runs differ; dropping held-out questions flatters the score."""
    store = build(tmp_path, bpe, data__drop_without_ret=True)
    assert store.example_ids == ["1", "2"] and store.dropped == 1
    held_out = dataclasses.replace(EXAMPLES[2], split="test")
    dataset = dataclasses.replace(DATASET, examples=[held_out])
    kept = build(tmp_path, bpe, dataset, "test", data__drop_without_ret=True)
    assert kept.example_ids == ["3"] and kept.dropped == 0


def test_sources_keep_their_own_passages(tmp_path, bpe):
    """Two sources that use the same passage ids would cite each other's text."""
    other = Dataset("other", "v1", [EXAMPLES[3]], {"b": Passage("b", "", "Oslo.")})
    other = dataclasses.replace(other, examples=[dataclasses.replace(EXAMPLES[3], split="train")])
    config = Config(num_steps=1)
    sources = [(DATASET, 1.0), (other, 2.5)]
    store = tokens.tokenize(sources, bpe, bpe, config, tmp_path)
    assert store.rets(3)[1].tolist() == [3]
    assert bpe.decode(store.ctx[3], skip_control=True) == "Oslo."
    assert store.weights.tolist() == [1.0, 1.0, 1.0, 2.5]


def test_store_pickles_as_a_path(tmp_path, bpe):
    """A store that pickles its arrays sends gigabytes to every worker process."""
    store = build(tmp_path, bpe)
    packed = pickle.dumps(store)
    assert len(packed) < 500
    assert pickle.loads(packed).gen_tokens.tolist() == store.gen_tokens.tolist()


def test_killed_writer_leaves_nothing_that_counts(tmp_path, bpe, monkeypatch):
    """Half a store under its final name would be opened by the next run."""

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokens._Writer, "finish", die)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, bpe)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert build(tmp_path, bpe).num_examples == 3


def test_empty_split_is_refused(tmp_path, bpe):
    """An evaluation over nothing would report a perfect or an undefined score."""
    with pytest.raises(UserError, match="data source toy: no example has split 'dev'"):
        build(tmp_path, bpe, split="dev")
