"""Batches from plan and tokens: every field, every host, every start."""

import dataclasses
import pickle
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cosup_jax.config import Config, DataConfig, LossConfig, MeshConfig, TowerConfig
from cosup_jax.data import blocks, pipeline, plan, storage, tokenizer, tokens
from cosup_jax.data.batch import Batch, BatchShape
from cosup_jax.data.schema import Dataset, Example, Passage
from cosup_jax.errors import UserError
from cosup_jax.sharding import make_mesh, rows

CITIES = ("Paris", "Rome", "Oslo", "Bern", "Lima", "Cairo", "Delhi", "Quito")


def dataset(count=60):
    passages = {c: Passage(c, c, f"{c} is a city with {len(c)} letters.") for c in CITIES}
    passages["Paris again"] = Passage("Paris again", "Paris", passages["Paris"].text)
    examples = []
    for i in range(count):
        first, second = CITIES[i % 8], CITIES[(i * 3 + 1) % 8]
        evidence = ((), (first,), (first, second), (first, first), ("Paris again", first))[i % 5]
        negatives = (second,) if i % 7 == 0 else ()
        question = f"Question {i} about {first}" + " please" * (i % 4)
        examples.append(
            Example(str(i), "open_qa", question, ("no",), evidence, hard_negatives=negatives)
        )
    return Dataset.of("cities", "1", examples, passages.values())


def config(**changes):
    data = {
        **{"max_gen_tokens": 256, "ret_slots": 8, "max_positives": 2, "ctx_rows": 8},
        **{"ctx_row_tokens": 96, "passage_slots": 4, "max_ctx_tokens": 48},
        **changes.pop("data", {}),
    }
    at_eos = TowerConfig(init="gen", pooling="eos")
    return Config(num_epochs=1, batch_size=8, ctx=at_eos, data=DataConfig(**data), **changes)


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.train([p.text for p in dataset().passages.values()], 300)


@pytest.fixture(scope="module")
def built(bpe, tmp_path_factory):
    found = config()
    store = tokens.tokenize([(dataset(), 1.0)], bpe, bpe, found, tmp_path_factory.mktemp("t"))
    return store, plan.Plan(store, found), found


def host(built, step, gen=None, ctx=None, mask_evidence=False):
    store, planned, _ = built
    shape = planned.shape
    gen, ctx = gen or slice(0, shape.B), ctx or slice(0, shape.U)
    return pipeline.host_batch(store, planned, shape, step, gen, ctx, mask_evidence)


def assert_equal(left, right):
    for name, a, b in zip(Batch._fields, left, right, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
        assert a.dtype == b.dtype, name


def hand_made(tmp_path):
    """A store of three passages and two examples, written number by number."""
    with storage.ArrayWriter(tmp_path, tokens._CTX | tokens._GEN | tokens._PER_SOURCE) as writer:
        for ids, identity in (([7, 8], [1, 1]), ([9], [2, 2]), ([5, 6, 4], [3, 3])):
            writer.add_item("ctx", tokens=ids)
            writer.add("identities", identity)
            writer.add("ctx_cut", [0])
        # prompt 10 11, [Ret] 1, passage 7, [Cs] 2, span 12, [Ce] 3, the same again, eos 0
        body = [10, 11, 1, 7, 2, 12, 3, 1, 9, 2, 13, 3, 0]
        roles = [0, 0, 1, 2, 2, 1, 1, 1, 2, 2, 1, 1, 1]
        writer.add_item("gen", tokens=body, roles=roles)
        writer.add_item("ret", positions=[2, 7], passages=[0, 1])
        writer.add_item("negative", passages=[2])
        writer.add_item("gen", tokens=[10, 14, 0], roles=[0, 1, 1])
        writer.add_item("ret", positions=[], passages=[])
        writer.add_item("negative", passages=[])
        writer.add("gen_rows", [0, 1])
        writer.add("weights", [1.0, 1.0])
        writer.add("sources", [0, 0])
    (tmp_path / "about.json").write_text('{"fingerprint": "by hand", "dropped": 0, "corpus": "."}')
    return tokens.TokenStore(tmp_path)


def test_every_field_of_a_small_batch(tmp_path):
    """Targets shifted across segments, weights on the wrong token, slots of another example."""
    store = hand_made(tmp_path)
    shape = BatchShape(B=2, T=18, R=3, S=2, U=2, L=5, P=2)
    columns = [[0, 2], [0, 1], [0, 0], [0, 3], [0, 2, 1], [0, 0, 1], [[18, 5]]]
    block = blocks.Block(*(np.array(column, np.int32) for column in columns))
    whole = slice(0, 2), slice(0, 2)
    batch = pipeline._build(store, block, shape, 0, *whole, False)
    masked = pipeline._build(store, block, shape, 0, *whole, True)
    pad = [0, 0]
    expected = {
        "gen_tokens_BxT": [10, 11, 1, 7, 2, 12, 3, 1, 9, 2, 13, 3, 0, 10, 14, 0, *pad],
        "gen_segments_BxT": [1] * 13 + [2] * 3 + pad,
        "gen_positions_BxT": [*range(13), *range(3), *pad],
        "ntp_targets_BxT": [11, 1, 7, 2, 12, 3, 1, 9, 2, 13, 3, 0, 0, 14, 0, 0, *pad],
        "ntp_weights_BxT": [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, *pad],
        "ret_positions_BxR": [2, 7, 0],
        "ret_valid_BxR": [True, True, False],
        "ret_positives_BxRxSx2": [[[1, 1], [2, 2]], [[2, 2], [1, 1]], [[0, 0], [0, 0]]],
    }
    for name, row in expected.items():
        found = getattr(batch, name)
        assert found[0].tolist() == row, name
        assert not found[1].any(), name
    supervised = [0, 1, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0, *pad]
    assert masked.ntp_weights_BxT[0].tolist() == supervised
    assert batch.ctx_tokens_UxL.tolist() == [[7, 8, 5, 6, 4], [9, 0, 0, 0, 0]]
    assert batch.ctx_segments_UxL.tolist() == [[1, 1, 2, 2, 2], [1, 0, 0, 0, 0]]
    assert batch.ctx_positions_UxL.tolist() == [[0, 1, 0, 1, 2], [0, 0, 0, 0, 0]]
    assert batch.passage_ends_UxP.tolist() == [[1, 4], [0, 0]]
    assert batch.passage_valid_UxP.tolist() == [[True, True], [True, False]]
    assert batch.passage_ids_UxPx2.tolist() == [[[1, 1], [3, 3]], [[2, 2], [0, 0]]]


def test_slots_point_at_ret_and_positives_are_in_the_step(built, bpe):
    """A query read beside its [Ret], or one whose passage was never encoded, learns nothing."""
    for step in range(built[1].steps_per_epoch(0)):
        batch = host(built, step)
        row, slot = np.nonzero(batch.ret_valid_BxR)
        assert (batch.gen_tokens_BxT[row, batch.ret_positions_BxR[row, slot]] == bpe.ret).all()
        assert (batch.gen_tokens_BxT == bpe.ret).sum() == len(row)
        passages = list(map(tuple, batch.passage_ids_UxPx2[batch.passage_valid_UxP]))
        assert len(passages) == len(set(passages))
        positives = {tuple(p) for p in batch.ret_positives_BxRxSx2[row, slot].reshape(-1, 2)}
        assert positives - {(0, 0)} <= set(passages)
        u, p = np.nonzero(batch.passage_valid_UxP)
        ends = batch.ctx_tokens_UxL[u, batch.passage_ends_UxP[u, p]]
        assert (ends == bpe.eos).all()


def test_hosts_make_up_the_batch(built):
    """A host that reads a row too many or too few trains on other data than one process does."""
    for parts in (2, 4, 8):
        spans = [slice(i * 8 // parts, (i + 1) * 8 // parts) for i in range(parts)]
        pieces = [host(built, 1, span, span) for span in spans]
        whole = Batch(*(np.concatenate(fields) for fields in zip(*pieces, strict=True)))
        assert_equal(whole, host(built, 1))


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(2, 2, 2)], ids=["data", "all"])
def test_batches_start_anywhere(built, mesh):
    """A resumed run that replays, skips or repeats a step; arrays put on the wrong devices."""
    store, planned, found = built
    sharding = rows(make_mesh(mesh))
    steps = planned.total_steps(1) + 2
    run = list(pipeline.batches(store, planned, found, sharding, sharding, 0, steps))
    assert len(run) == steps and run[0].gen_tokens_BxT.sharding == sharding
    for start in (1, steps - 1):
        resumed = list(pipeline.batches(store, planned, found, sharding, sharding, start, steps))
        for step, batch in enumerate(resumed, start):
            assert_equal(batch, run[step])
            assert_equal(batch, host(built, step))
            alone = pipeline.batch_at(store, planned, found, sharding, sharding, step)
            assert_equal(alone, batch)
            assert alone.gen_tokens_BxT.sharding == sharding
        assert start + len(resumed) == steps


def test_host_rows_cover_this_process(devices):
    """Devices listed in another order than the rows would leave a shard without its data."""
    mesh = jax.sharding.Mesh(np.array(devices[:4])[::-1], ("data",))
    sharding = NamedSharding(mesh, P("data"))
    assert pipeline.host_rows(sharding, 8) == slice(0, 8)
    spans = {0: (slice(4, 6),), 1: (slice(2, 4),), 2: (slice(2, 4),)}
    one_of_two = SimpleNamespace(addressable_devices_indices_map=lambda _: spans)
    assert pipeline.host_rows(one_of_two, 8) == slice(2, 6)
    local = np.arange(16).reshape(8, 2)
    np.testing.assert_array_equal(pipeline.global_array(local, 8, 0, sharding), local)


def test_mask_evidence_reaches_the_batch(built):
    """A config switch that never arrives makes both arms of the paper's comparison the same."""
    store, planned, found = built
    found = dataclasses.replace(found, loss=LossConfig(mask_evidence=True))
    sharding = rows(make_mesh(MeshConfig()))
    (batch,) = pipeline.batches(store, planned, found, sharding, sharding, 0, 1)
    assert_equal(batch, host(built, 0, mask_evidence=True))
    assert batch.ntp_weights_BxT.sum() < host(built, 0).ntp_weights_BxT.sum()


def test_worker_processes_read_the_same(built):
    """Workers that interleave, or shuffle by themselves, change the order of the steps."""
    store, planned, found = built
    found = dataclasses.replace(found, data=dataclasses.replace(found.data, workers=2))
    sharding = rows(make_mesh(MeshConfig()))
    for step, batch in enumerate(pipeline.batches(store, planned, found, sharding, sharding, 1, 6)):
        assert_equal(batch, host(built, step + 1))


def test_errors_of_readers_surface(built, monkeypatch):
    """A reader that dies quietly leaves the run waiting for ever, or short of data."""

    def fail(*_):
        raise OSError("disk gone")

    monkeypatch.setattr(pipeline, "host_batch", fail)
    store, planned, found = built
    sharding = rows(make_mesh(MeshConfig()))
    with pytest.raises(OSError, match="disk gone"):
        list(pipeline.batches(store, planned, found, sharding, sharding, 0, 2))


def test_plan_is_looked_up_and_cached(built):
    """A plan rebuilt at each start, or one that survives a change of batch size."""
    store, planned, found = built
    first = planned.steps_per_epoch(0)
    assert planned.locate(0) == (0, 0) and planned.locate(first - 1) == (0, first - 1)
    assert planned.locate(first) == (1, 0)
    assert planned.total_steps(2) == first + planned.steps_per_epoch(1)
    cached = store.directory / f"plan-{planned.fingerprint[:16]}-0.npz"
    stamp = cached.stat().st_mtime_ns
    for again in (plan.Plan(store, found), pickle.loads(pickle.dumps(planned))):
        assert again.locate(first) == (1, 0) and cached.stat().st_mtime_ns == stamp
        for a, b in zip(again.block(0), planned.block(0), strict=True):
            np.testing.assert_array_equal(a, b)
    for change in ({"seed": 1}, {"batch_size": 4}, {"compat": "official"}):
        assert plan.Plan(store, dataclasses.replace(found, **change)).fingerprint != (
            planned.fingerprint
        )


def test_nothing_fits_is_the_users_to_mend(built):
    """An epoch without a step would make the search for step 0 run for ever."""
    store, _, found = built
    small = dataclasses.replace(found, data=dataclasses.replace(found.data, max_gen_tokens=4))
    with pytest.raises(UserError, match="none of 60 training examples fits a row"):
        plan.Plan(store, small).locate(0)


def test_passages_are_packed_once_each(built):
    """A corpus row skipped or encoded twice shifts every retrieval score after it."""
    store, planned, _ = built
    shape = dataclasses.replace(planned.shape, U=2)
    seen = []
    for packed in pipeline.pack_passages(store.ctx, shape):
        assert packed.ctx_tokens_UxL.shape == (shape.U, shape.L)
        for row, slot in zip(*np.nonzero(packed.passage_valid_UxP), strict=True):
            passage = packed.index_UxP[row, slot]
            inside = packed.ctx_segments_UxL[row] == slot + 1
            assert packed.ctx_tokens_UxL[row, inside].tolist() == store.ctx[passage].tolist()
            assert np.flatnonzero(inside)[-1] == packed.passage_ends_UxP[row, slot]
            seen.append(int(passage))
    assert sorted(seen) == list(range(store.num_passages))
    with pytest.raises(ValueError, match="do not fit L="):
        list(pipeline.pack_passages([np.zeros(200, np.int32)], shape))
    assert not list(pipeline.pack_passages([], shape))


def test_rows_of_a_corpus_are_full():
    """A row closed by the first passage that does not fit it: then a seventh of it is padding."""
    lengths = np.random.default_rng(0).integers(10, 200, 2000)
    shape = BatchShape(B=1, T=1, R=1, S=1, U=2, L=640, P=32)
    packed = list(pipeline.pack_passages([np.ones(n, np.int32) for n in lengths], shape))
    assert lengths.sum() / (len(packed) * shape.U * shape.L) > 0.97


@pytest.mark.parametrize("packing", [True, False])
def test_examples_are_packed_once_each(built, packing):
    """A held-out question scored twice, or against another question's passage."""
    store, planned, _ = built
    found, left_out = pipeline.pack_examples(store, planned.shape, packing)
    seen, examples = [], 0
    for packed in found:
        batch = packed.batch
        assert batch.ctx_tokens_UxL.shape[0] == 0
        examples += int(batch.gen_segments_BxT.max(1).sum())
        for row, slot in zip(*np.nonzero(batch.ret_valid_BxR), strict=True):
            index = packed.index_BxR[row, slot]
            identity = store.identities[store.ret_passages[index]]
            assert (batch.ret_positives_BxRxSx2[row, slot, 0] == identity).all()
            at = batch.ret_positions_BxR[row, slot]
            example = np.searchsorted(store.ret_offsets, index, "right") - 1
            assert batch.gen_positions_BxT[row, at] == store.ret_positions[index]
            start = at - batch.gen_positions_BxT[row, at]
            tokens_n = store.gen(example)[0]
            assert batch.gen_tokens_BxT[row, start : start + len(tokens_n)].tolist() == (
                tokens_n.tolist()
            )
            seen.append(int(index))
    assert sorted(seen) == list(range(len(store.ret_passages)))
    assert examples == store.num_examples and not len(left_out)
