"""Passage vectors on disk: the bytes of an unbroken run, whatever breaks it, or one line."""

import dataclasses
import json
import signal
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from batches import config
from files import full_disk

from cosup_jax import assemble, contract, encode, sharding
from cosup_jax import step as step_lib
from cosup_jax.answer import retrieve
from cosup_jax.config import IndexConfig, MeshConfig
from cosup_jax.data import ingest, prepared, tokenizer, tokens
from cosup_jax.data.batch import batch_shape
from cosup_jax.data.schema import Dataset, Passage
from cosup_jax.errors import UserError
from cosup_jax.evaluation.baselines import BM25
from cosup_jax.search import index, vectors
from cosup_jax.search.corpus import Corpus, encode_to_disk
from cosup_jax.search.encoder import Encoder
from cosup_jax.search.vectors import Layout, Vectors

ROOT = Path(__file__).parent.parent
TEXTS = [f"the river {name} is long" for name in ("Aare", "Elbe", "Inn", "Oder", "Rur", "Ruhr")]
CONTRACT = contract.EmbeddingContract(
    **{"pooling": "eos", "prompt": "", "normalize": True, "temperature": 0.05, "template": "1"},
    **dict.fromkeys(("ret", "cs", "ce", "emb", "pad", "eos"), 1),
    **{"max_ctx_tokens": 10, "width": 3, "tokenizer": "t", "weights": "w"},
)


def dataset(copies: int = 2) -> Dataset:
    """Every text under several ids."""
    ids = [f"{c}/Fluß {i}\n" for c in range(copies) for i in range(len(TEXTS))]
    return Dataset.of(
        "rivers", "1", [], [Passage(id, "", TEXTS[i % 6]) for i, id in enumerate(ids)]
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Random towers on eight devices, as `assemble.trained` gives them."""
    small = {"layers": 1, "width": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp_width": 64}
    keys = {f"gen__arch__{name}": value for name, value in small.items()}
    keys |= {"data__max_gen_tokens": 160, "data__max_ctx_tokens": 20, "index__shard_rows": 4}
    c = assemble.resolve(config(**keys))
    bpe = tokenizer.train(TEXTS, 300)
    both = assemble.Tokenizers(bpe, bpe)
    t, mesh = assemble.make_towers(c, both), sharding.make_mesh(MeshConfig(8, 1, 1))
    params = jax.jit(lambda: step_lib.init_params(jax.random.key(0), t, c))()
    made = assemble.embedding_contract(c, both, "digest")
    return assemble.Trained(c, None, both, t, mesh, params, 7, made, {})


def test_vectors_are_those_of_the_encoder(trained, tmp_path):
    """Bugs: a shard's rows under other rows' ids, a passage encoded twice, padding encoded, other
    vectors than training scores."""
    corpus, found = encode.index(dataset(), trained, tmp_path)
    assert list(found.ids) == [f"0/Fluß {i}\n" for i in range(6)] and len(found) == 6
    encoder = Encoder(trained.mesh, trained.towers, trained.config)
    for rows in (range(4), range(4, 6)):
        expected = encoder.corpus(trained.params, corpus.packed(rows), len(rows))
        np.testing.assert_array_equal(found.take(rows), expected)
    whole = encoder.corpus(trained.params, corpus, len(corpus))
    np.testing.assert_allclose(found.take(range(6)), whole, atol=1e-6)
    assert np.abs(whole[0] - whole[1]).max() > 1e-3
    for ours, theirs in zip(
        index.search(whole, found, 4), index.search(whole, whole, 4), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert found.contract == trained.contract
    again = encode.index(dataset(), trained._replace(params=None), tmp_path)[1]  # nothing to encode
    assert again.key == found.key


@pytest.mark.parametrize("kind", ["memory", "disk", "prepared"])
def test_equal_scores_come_by_id(tmp_path, kind):
    """Bugs: passages of equal score in the order of the source, or in that of the numbers in their
    ids; a positive or a source's title looked up in another order than the vectors are in; of
    copies another one kept when the source is shuffled."""
    texts = {"b": "one", "é": "two", "10": "three", "9": "four", "a": "three", "\U0001f600": "five"}
    passages = [Passage(id, "", text) for id, text in texts.items()]
    found, c = Dataset.of("x", "1", [], passages), config(data__max_ctx_tokens=20)
    bpe = tokenizer.train(list(texts.values()), 300)
    if kind != "memory":
        read = lambda problems: iter([("here", passage) for passage in passages])
        found, _ = ingest.ingest("x", "1", read, tmp_path)
    if kind == "prepared":
        plain = tokens.tokenize_passages(found, bpe, c, tmp_path)
        ctx = [(plain.ctx[row], 0) for row in range(6)]
        about = {"x": prepared.write(tmp_path, found, ctx, {})}
        manifest = {"format": prepared.FORMAT, "settings": {}, "sources": about}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        found = prepared.load(str(tmp_path), "x", tmp_path)
    corpus = Corpus(found, tokens.tokenize_passages(found, bpe, c, tmp_path), batch_shape(c))
    wanted = ["10", "9", "b", "é", "\U0001f600"]  # "a" has the tokens of "10"
    assert [passage.id for passage in corpus.passages] == wanted
    assert [wanted[row] for row in corpus.row_of] == ["b", "é", "10", "9", "10", "\U0001f600"]
    same = Numbers()
    same.corpus = lambda params, packed, count: np.ones((count, 3), np.float32)
    made = encode_to_disk(tmp_path / "i", corpus, same, {}, CONTRACT, IndexConfig(shard_rows=2))
    query_QxD, asked = np.ones((1, 3), np.float32), ([0], [0], 3)
    for vectors_NxD in (made, made.take(range(5))):
        for retriever in (
            retrieve.Search(corpus.passages, vectors_NxD),
            retrieve.Search(corpus.passages, vectors_NxD, sharding.make_mesh(MeshConfig(8, 1, 1))),
            retrieve.Candidates(corpus.passages, vectors_NxD, [corpus.row_of[[0, 1, 2, 3]]]),
            retrieve.Lexical(corpus.passages, BM25([p.text for p in corpus.passages]), ["x"]),
        ):
            (best,) = retriever(query_QxD, *asked)
            assert [corpus.passages[one.row].id for one in best] == ["10", "9", "b"]


class Numbers:
    """Stands for an encoder: row i of the corpus is [i, i + 0.5, -i]; notes what it encodes."""

    def __init__(self, dtype="float32"):
        self.encoded, self.dtype = [], dtype

    def corpus(self, params, packed, count):
        first = self.encoded[-1][1] if self.encoded else params["first"]
        self.encoded.append((first, first + count))
        rows = np.arange(first, first + count, dtype=np.float32)
        return np.stack([rows, rows + 0.5, -rows], axis=1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Ten passages."""
    path, words = tmp_path_factory.mktemp("tokens"), [f"passage {i}" for i in range(10)]
    found = Dataset.of("ten", "1", [], [Passage(f"p{i}", "", w) for i, w in enumerate(words)])
    c = config(data__max_ctx_tokens=20)
    store = tokens.tokenize_passages(found, tokenizer.train(words, 300), c, path)
    return Corpus(found, store, batch_shape(c))


def write(directory, corpus, dtype="float32", first=0, contract=CONTRACT):
    encoder, settings = Numbers(), IndexConfig(dtype=dtype, shard_rows=3)
    found = encode_to_disk(directory, corpus, encoder, {"first": first}, contract, settings)
    return found, encoder.encoded


def contents(directory: Path) -> dict[str, bytes]:
    """Everything but locks and remembered digests."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    paths = [p for p in paths if p.parent.name != "digests" and not p.name.startswith(".")]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


KILLED = """
import json, os, signal, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[1])
from cosup_jax.search import vectors

filled = vectors.write_array
def killed(path, values, dtype):
    filled(path, values, dtype)
    if "00002" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
vectors.write_array = killed
for name, numbers, ids in json.load(sys.stdin):
    vectors.write_shard(Path(sys.argv[2]) / name, np.array(numbers, np.float32), ids, "int8")
"""


def test_a_kill_costs_one_shard(tmp_path, corpus):
    """Bugs: half a shard taken for a whole one, whole ones encoded again, litter left behind."""
    whole, encoded = write(tmp_path / "whole", corpus, "int8")
    assert encoded == [(0, 3), (3, 6), (6, 9), (9, 10)]
    given = [
        (name, Numbers().corpus({"first": rows.start}, None, len(rows)).tolist(), ids)
        for name, rows in Layout(CONTRACT, corpus.fingerprint, 10, "int8", 3, "float32").shards()
        for ids in [[f"p{row}" for row in rows]]
    ]
    script = [sys.executable, "-c", KILLED, str(ROOT), str(tmp_path / "killed")]
    run = subprocess.run(script, input=json.dumps(given), text=True)
    assert run.returncode == -signal.SIGKILL
    (part,) = (tmp_path / "killed").glob(".*.part")
    assert [path.name for path in part.iterdir()] == ["vectors"]
    found, encoded = write(tmp_path / "killed", corpus, "int8", first=6)
    assert encoded == [(6, 9), (9, 10)]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*")) and found.key == whole.key


def test_a_full_disk_is_one_line(tmp_path, corpus):
    """Bugs: a traceback, or a shard that is cut off."""
    with full_disk(20), pytest.raises(UserError, match=r"cannot write .*-00000.* File too large"):
        write(tmp_path, corpus)
    assert len(write(tmp_path, corpus)[0]) == 10


def test_damage_is_named_and_mended(tmp_path, corpus):
    """Bugs: vectors, ids or a manifest that are not what was written, searched all the same; an
    encoding that takes the damaged shard for done."""
    found, _ = write(tmp_path, corpus, "int8")
    before, shard = contents(tmp_path), found.files[0].parent
    for path in (*found.files[:5], tmp_path / "manifest.json"):
        good, last = path.read_bytes(), -3 if path.suffix else -1
        flipped = good[:last] + bytes([good[last] ^ 1])
        for bad in (None, b"", good[:last], flipped, b"[]", b"{}", b'{"format": 1}'):
            path.unlink(missing_ok=True)
            if bad is not None:
                path.write_bytes(bad)
            if path.name == "about.json":  # only encoding reads it
                continue
            with pytest.raises(UserError, match=path.name):
                Vectors.open(tmp_path)
        encoded = write(tmp_path, corpus, "int8", first=0)[1]
        assert encoded == ([(0, 3)] if path.parent == shard else []), path
        assert contents(tmp_path) == before
    with pytest.raises(UserError, match="no index here; run --mode=encode"):
        Vectors.open(tmp_path / "none")


def test_another_model_is_refused_and_replaces_what_was_there(tmp_path, corpus):
    """Bugs: questions of one model searched in another's vectors; its shards taken for ours; the
    old index gone before the new one is whole; an index.faiss of the old vectors beside the new."""
    other, old = dataclasses.replace(CONTRACT, weights="v"), write(tmp_path, corpus)[0]
    faiss = tmp_path / "index.faiss"
    old.write_faiss(faiss)
    assert not write(tmp_path, corpus)[1] and faiss.exists()
    assert Vectors.open(tmp_path, CONTRACT).ids[9] == "p9"
    with pytest.raises(UserError, match=r"the index .* was made with weights='w', this model has"):
        Vectors.open(tmp_path, other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "write_manifest", lambda *_: Vectors.open(tmp_path, CONTRACT))
        with pytest.raises(UserError, match="weights"):
            write(tmp_path, corpus, contract=other)
    new, encoded = write(tmp_path, corpus, contract=other)
    assert not encoded and new.key != old.key
    assert not any(old.key in name for name in contents(tmp_path)) and not faiss.exists()
    changes = ({"dtype": "int8"}, {"corpus": "x"}, {"shard_rows": 4}, {"rows": 11})
    for change in (*changes, {"computed": "bfloat16"}):
        layout = Layout(CONTRACT, corpus.fingerprint, 10, "float32", 3, "float32")
        assert layout.key == old.key != Layout(**(layout._asdict() | change)).key


def test_vectors_of_another_precision_are_made_anew(trained, tmp_path, corpus):
    """Bugs: an encode in float32 that takes what bfloat16 has left for its own; one that goes on
    where that was killed, and mixes them."""
    half = dataclasses.replace(trained.towers.ctx.arch, dtype="bfloat16")
    ctx = dataclasses.replace(trained.towers.ctx, arch=half)
    towers = dataclasses.replace(trained.towers, ctx=ctx)
    encoder = lambda towers: Encoder(trained.mesh, towers, trained.config)
    assert (encoder(trained.towers).dtype, encoder(towers).dtype) == ("float32", "bfloat16")
    settings = IndexConfig(shard_rows=3)
    made = lambda numbers: encode_to_disk(
        tmp_path, corpus, numbers, {"first": 0}, CONTRACT, settings
    )
    made(Numbers("bfloat16"))
    again = Numbers()
    made(again)
    assert again.encoded == [(0, 3), (3, 6), (6, 9), (9, 10)]


def test_a_diverged_model_is_refused(tmp_path, corpus, monkeypatch):
    """Bug: an index of NaN, in which nothing is ever found."""
    nan = np.array([[0, 1, 2], [0, np.nan, 2], [0, 1, np.inf]], np.float32)
    monkeypatch.setattr(Numbers, "corpus", lambda *_: nan)
    with pytest.raises(UserError, match=r"vector of passage 'p1' \(first of 2\) is not finite"):
        write(tmp_path, corpus)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_vectors_come_back_as_their_dtype_keeps_them(tmp_path, corpus, dtype):
    """Bugs: a scale of another row, int8 that wraps round, a row of zeros that becomes NaN."""
    rng = np.random.default_rng(0)
    vector_NxD = rng.standard_normal((10, 3)).astype(np.float32)
    vector_NxD[4], vector_NxD[5] = 0, [1e-30, -1e30, 1]
    with np.errstate(invalid="raise", divide="raise"):
        kept = vectors.quantized(vector_NxD, dtype)
    if dtype == "int8":
        for row, scale, step in zip(vector_NxD, kept.scales, kept.vectors, strict=True):
            assert np.abs(step).max() == (127 if row.any() else 0)
            assert np.abs(step * scale - row).max() <= scale / 2 * 1.0001
    else:
        far = 0 if dtype == "float32" else 2**-8
        assert (
            np.abs(kept.vectors.astype(np.float32) - vector_NxD) <= far * np.abs(vector_NxD)
        ).all()
    found, _ = write(tmp_path, corpus, dtype)
    meant = np.arange(10)[:, None] * np.array([1.0, 1, -1]) + np.array([0, 0.5, 0])
    back = found.take(range(10))
    np.testing.assert_allclose(back, meant, atol={"int8": 9.5 / 254}.get(dtype, 0.03))
    scores, rows = index.search(np.array([[1, 1, 0]], np.float32), found, 12)
    np.testing.assert_allclose(scores[0, :10], np.sort(back[:, :2].sum(axis=1))[::-1], rtol=1e-6)
    assert rows[0].tolist() == [*range(9, -1, -1), -1, -1]


def test_an_empty_corpus(tmp_path):
    """Bug: a traceback where all that is to be encoded is nothing."""
    vectors.write_manifest(tmp_path, Layout(CONTRACT, "none", 0, "float32", 3, "float32"))
    found = Vectors.open(tmp_path)
    assert len(found) == 0 and index.search(np.ones((1, 3)), found, 2)[1].tolist() == [[-1, -1]]


def test_faiss_file(tmp_path, corpus):
    """Bug: a header field that is missing or of another size; rows in another order."""
    write(tmp_path, corpus)[0].write_faiss(tmp_path / "index.faiss")
    raw = (tmp_path / "index.faiss").read_bytes()
    assert struct.unpack("<4siqqqBiQ", raw[:45]) == (b"IxFI", 3, 10, 1 << 20, 1 << 20, 1, 0, 30)
    expected = Vectors.open(tmp_path).take(range(10))
    np.testing.assert_array_equal(np.frombuffer(raw[45:], "<f4").reshape(10, 3), expected)


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_faiss_reads_it(tmp_path, corpus, dtype):
    """Bug: a file that only we read."""
    faiss = pytest.importorskip("faiss")
    found, _ = write(tmp_path, corpus, dtype)
    found.write_faiss(tmp_path / "index.faiss")
    theirs = faiss.read_index(str(tmp_path / "index.faiss"))
    assert isinstance(theirs, faiss.IndexFlatIP) and theirs.ntotal == 10 and theirs.d == 3
    query_QxD = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    scores, rows = index.search(query_QxD, found, 5)
    expected, order = theirs.search(query_QxD, 5)
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
