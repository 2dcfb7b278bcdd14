"""The token store: what is written, what is reused, what a kill leaves behind."""

import concurrent.futures
import dataclasses
import hashlib
import os
import pickle
import shutil
import threading

import numpy as np
import pytest

from cosup_jax.config import make
from cosup_jax.data import markup, pipeline, tokenizer, tokens
from cosup_jax.data.batch import BatchShape
from cosup_jax.data.schema import Dataset, Example, Passage
from cosup_jax.dotted import replace_dotted
from cosup_jax.errors import UserError
from cosup_jax.freeze import freeze

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
CONFIG = freeze(make({"num_steps": 1}, {}))
DATASET = Dataset.of("toy", "v1", EXAMPLES, PASSAGES.values())


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.train([p.text for p in PASSAGES.values()], 300)


def build(directory, bpe, dataset=DATASET, split="train", weight=1.0, **changes):
    config = CONFIG
    for dotted, value in changes.items():
        config = replace_dotted(config, dotted.replace("__", "."), value)
    return tokens.tokenize([(dataset, weight)], bpe, bpe, config, directory, split)


def test_store_holds_what_markup_wrote(tmp_path, bpe):
    """An offset off by one hands every example its neighbour's tokens."""
    store = build(tmp_path, bpe)
    assert store.gen_rows.tolist() == [0, 1, 2] and store.sources.tolist() == [0, 0, 0]
    for row, example in enumerate(EXAMPLES[:3]):
        (marked,) = markup.encode([markup.pieces(example, PASSAGES)], bpe, 96)
        found, roles = store.gen(row)
        assert found.tolist() == marked.tokens.tolist()
        assert roles.tolist() == marked.roles.tolist()
        positions, passages = store.rets(row)
        assert ["abc"[p] for p in passages] == list(example.evidence)
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
    fewer = dataclasses.replace(DATASET, splits={"train": np.array([0])})
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
    left = [path.name for path in tmp_path.glob(".*") if not path.name.endswith(".lock")]
    assert not left, "a temporary directory stayed behind"


def test_each_tokenizer_and_the_template_count(tmp_path, bpe, monkeypatch):
    """Bug: tokens of another Gen tokenizer, or of an older template, used again."""
    other, config = tokenizer.train(["something else"], 300), CONFIG
    tokenize = lambda gen, ctx: tokens.tokenize([(DATASET, 1.0)], gen, ctx, config, tmp_path)
    stores = [tokenize(*pair) for pair in ((bpe, bpe), (other, bpe), (bpe, other), (other, other))]
    monkeypatch.setattr(markup, "VERSION", markup.VERSION + 1)
    stores.append(tokenize(bpe, bpe))
    assert len({store.fingerprint for store in stores}) == 5
    corpora = {(store.directory / "about.json").read_text().split("corpus-")[1] for store in stores}
    assert len(corpora) == 3  # of two tokenizers, and of another template


def test_share_without_evidence_is_a_function_of_the_id(tmp_path, bpe):
    """A draw that moves with order or seed changes the data under a resumed run."""
    many = [dataclasses.replace(EXAMPLES[0], id=f"e{i}") for i in range(400)]
    found = []
    for examples in (many, many[::-1]):
        dataset = Dataset.of("toy", examples[0].id, examples, PASSAGES.values())
        store = build(tmp_path, bpe, dataset, data__no_evidence_fraction=0.25)
        rets = np.diff(store.ret_offsets)
        assert ((np.diff(store.negative_offsets) > 0) == (rets > 0)).all()
        found.append({examples[row].id for row in store.gen_rows[rets == 0]})
    assert found[0] == found[1] and 70 <= len(found[0]) <= 130


def test_drop_without_ret_is_counted_and_spares_evaluation(tmp_path, bpe):
    """Dropping unseen makes two runs differ; dropping held-out questions flatters the score."""
    store = build(tmp_path, bpe, data__drop_without_ret=True)
    assert store.gen_rows.tolist() == [0, 1] and store.dropped == 1
    dataset = dataclasses.replace(DATASET, splits={"test": np.array([2])})
    kept = build(tmp_path, bpe, dataset, "test", data__drop_without_ret=True)
    assert kept.gen_rows.tolist() == [2] and kept.dropped == 0


def test_sources_keep_their_own_passages(tmp_path, bpe):
    """Two sources that use the same passage ids would cite each other's text."""
    asked = dataclasses.replace(EXAMPLES[3], split="train", hard_negatives=("b",))
    other = Dataset.of("other", "v1", [asked], [Passage("b", "", "Oslo.")])
    config = CONFIG
    sources = [(DATASET, 1.0), (other, 2.5)]
    store = tokens.tokenize(sources, bpe, bpe, config, tmp_path)
    assert store.rets(3)[1].tolist() == store.negatives(3).tolist() == [3]
    assert bpe.decode(store.ctx[3], skip_control=True) == "Oslo."
    assert store.weights.tolist() == [1.0, 1.0, 1.0, 2.5]
    assert store.sources.tolist() == [0, 0, 0, 1]


def test_store_pickles_as_a_path(tmp_path, bpe):
    """A store that pickles its arrays sends gigabytes to every worker process."""
    store = build(tmp_path, bpe)
    packed = pickle.dumps(store)
    assert len(packed) < 500
    assert pickle.loads(packed).gen_tokens.tolist() == store.gen_tokens.tolist()


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path, bpe, monkeypatch):
    """Half a store, or half a shard, under its final name would be opened by the next run."""

    def die(*_):
        raise KeyboardInterrupt

    for module, name in (
        *((tokens, "identity"), (tokens, "_join_corpus")),
        *((markup, "encode"), (tokens, "_join_examples")),
    ):
        monkeypatch.setattr(module, name, die)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, bpe)
        assert not list(tmp_path.glob("train-*")) and not list(tmp_path.rglob("*.part"))
        monkeypatch.undo()
    assert build(tmp_path, bpe).num_examples == 3


def test_what_a_kill_left_is_removed(tmp_path, bpe):
    """A run that is killed every day would fill the disk with halves."""
    store = build(tmp_path, bpe)
    half = tmp_path / f".{store.directory.name}.xyz.part"
    half.mkdir()
    shutil.rmtree(store.directory)
    build(tmp_path, bpe)
    assert not half.exists()


def test_processes_share_the_shards(tmp_path, monkeypatch):
    """Every process tokenising everything, or one waiting for all: hosts that help nobody."""
    passages = [Passage(f"{i}", "", f"text {i}") for i in range(200)]
    examples = [Example(f"{i}", "open_qa", f"{i}?", ("no",), (f"{i}",)) for i in range(200)]
    dataset = Dataset.of("many", "1", examples, passages)
    bpe = tokenizer.train(["a text"], 300)
    alone, made = build(tmp_path / "alone", bpe, dataset), []
    monkeypatch.setattr(tokens, "SHARD", 8)

    build_once = tokens.build_once

    def note(target, write, wait=True):
        def noted(directory):
            made.append((target.name, threading.get_ident()))
            write(directory)

        return build_once(target, noted, wait)

    monkeypatch.setattr(tokens, "build_once", note)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        stores = list(pool.map(lambda _: build(tmp_path / "all", bpe, dataset), range(3)))
    shards = [thread for name, thread in made if name.isdecimal()]
    assert len(shards) == 50 and len(set(shards)) > 1 and len(made) == 52
    for store in stores:
        assert store.fingerprint == alone.fingerprint
        for name in ("gen_tokens", "gen_offsets", "ret_passages", "ret_offsets", "identities"):
            assert np.array_equal(getattr(store, name), getattr(alone, name)), name


@pytest.mark.parametrize("file", ["about.json", *tokens._GEN, *tokens._PER_SOURCE, *tokens._CTX])
@pytest.mark.parametrize("left", ["nothing", "a value less"])
def test_a_damaged_store_is_one_line(tmp_path, bpe, file, left):
    """Bug: a traceback over a file that lost its end; or tokens of another example, unseen."""
    store = build(tmp_path, bpe)
    (path,) = tmp_path.glob(f"*/{file}")
    if left == "nothing":
        path.unlink()
    else:
        dtype = np.dtype((tokens._GEN | tokens._PER_SOURCE | tokens._CTX).get(file, "|u1"))
        os.truncate(path, path.stat().st_size - dtype.itemsize)
    with pytest.raises(UserError, match=rf"damaged \(.*\); delete {tmp_path}, all"):
        build(tmp_path, bpe)
    shutil.rmtree(tmp_path)
    assert build(tmp_path, bpe).fingerprint == store.fingerprint


def test_chunks_together_are_everything(tmp_path, bpe, monkeypatch):
    """Rows past the first chunk of a shard lost without a word."""
    whole = build(tmp_path / "whole", bpe)
    monkeypatch.setattr(tokens, "CHUNK", 1)
    monkeypatch.setattr(tokens, "SHARD", 2)
    cut = build(tmp_path / "cut", bpe)
    for name in (*tokens._CTX, *tokens._GEN, *tokens._PER_SOURCE):
        assert np.array_equal(getattr(whole, name), getattr(cut, name)), name


def test_nothing_left_is_refused(tmp_path, bpe):
    """A traceback from the plan where no example has evidence and those are dropped."""
    dataset = dataclasses.replace(DATASET, splits={"train": np.array([2])})
    with pytest.raises(UserError, match="drop_without_ret leaves nothing: none of 1"):
        build(tmp_path, bpe, dataset, data__drop_without_ret=True)


def test_empty_split_is_refused(tmp_path, bpe):
    """An evaluation over nothing would report a perfect or an undefined score."""
    with pytest.raises(UserError, match="data source toy: no example has split 'dev'"):
        build(tmp_path, bpe, split="dev")
