"""The embedding contract and the digest of the weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cosup_jax import contract
from cosup_jax.contract import EmbeddingContract, check_match, weights_digest
from cosup_jax.costs import kernels
from cosup_jax.errors import UserError

CONTRACT = EmbeddingContract(
    *("eos", "", True, 0.05, "v1"),
    **{"ret": 7, "cs": 8, "ce": 9, "emb": 10, "pad": 0, "eos": 1},
    **{"max_ctx_tokens": 96, "width": 64, "tokenizer": "t", "weights": "w"},
)


def test_every_field_counts():
    """Bug: an index made with another pooling, template or model is searched all the same."""
    for field in dataclasses.fields(CONTRACT):
        value = getattr(CONTRACT, field.name)
        other = dataclasses.replace(CONTRACT, **{field.name: value + type(value)(1)})
        with pytest.raises(UserError, match=rf"^the index was made with {field.name}="):
            check_match(CONTRACT, other, "the index")
    check_match(CONTRACT, dataclasses.replace(CONTRACT), "the index")


def test_json_round_trip():
    """Bug: a contract read back from JSON differs, or another version's lacks a field, or has
    one more, unnoticed."""
    stored = json.loads(json.dumps(CONTRACT.to_dict()))
    assert EmbeddingContract.from_dict(stored, "the index") == CONTRACT
    for name in ("pooling", "emb"):
        older = {key: value for key, value in stored.items() if key != name}
        with pytest.raises(UserError, match=f"the index: its embedding contract lacks .*'{name}'"):
            EmbeddingContract.from_dict(older, "the index")
    with pytest.raises(UserError, match="has the unknown field 'newer'; rebuild it"):
        EmbeddingContract.from_dict(stored | {"newer": 1}, "the index")


def test_digest_ignores_the_mesh_and_nothing_else(devices):
    """Bug: the digest changes with the mesh, or does not with a weight, a name or a shape."""
    w_8x4 = np.arange(32, dtype=np.float32).reshape(8, 4)
    digests = set()
    for count in (1, 2, 8):
        mesh = jax.make_mesh((count,), ("x",), (AxisType.Auto,), devices=devices[:count])
        w = jax.device_put(w_8x4, NamedSharding(mesh, P("x")))
        digests.add(weights_digest({"gen": {"w": w, "t": jnp.float32(0)}}))
        digests.add(weights_digest({"gen": {"t": jnp.float32(0), "w": w_8x4}}))
    assert len(digests) == 1
    changed = w_8x4.copy()
    changed[7, 3] = np.nextafter(changed[7, 3], 0)
    double = w_8x4.astype(np.float64)
    for w in (changed, w_8x4.reshape(4, 8), double, np.nextafter(double, 99), w_8x4.T):
        digests.add(weights_digest({"gen": {"w": w, "t": jnp.float32(0)}}))
    digests.add(weights_digest({"ctx": {"w": w_8x4, "t": jnp.float32(0)}}))
    assert len(digests) == 7


def _single_changes(leaf):
    """`leaf` with one bit of one element turned, for some elements and bits."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        bits = leaf.copy()
        at = tuple(rng.integers(0, n) for n in leaf.shape)
        words = bits.view(f"uint{8 * leaf.dtype.itemsize}")
        words[at] ^= words.dtype.type(1) << words.dtype.type(rng.integers(8 * leaf.dtype.itemsize))
        yield bits


@pytest.mark.parametrize("dtype", ["float32", jnp.bfloat16, "int32"])
def test_digest_sees_single_bits_swaps_and_copies(dtype):
    """Bug: a checksum without positions, which two exchanged neurons leave as it was; or one that
    rounds to float32, or sums floats, in which a last bit drowns."""
    leaf = np.random.default_rng(1).normal(size=(6, 10, 4)).astype(dtype)
    others = list(_single_changes(leaf))
    for axis in range(3):
        others += [np.roll(leaf, 1, axis), np.flip(leaf, axis)]
    swapped = leaf.copy()
    swapped[0, 0, 0], swapped[5, 9, 3] = leaf[5, 9, 3], leaf[0, 0, 0]
    twice = leaf.copy()
    twice[3] = leaf[4]
    others += [swapped, twice, np.zeros_like(leaf)]
    distinct = {other.tobytes() for other in [leaf, *others]}
    digests = {weights_digest({"w": jnp.asarray(other)}) for other in [leaf, *others]}
    assert len(digests) == len(distinct) > 45


def test_checksum_is_the_sum_by_hand():
    """Bug: a lane that repeats another, or lacks the position along an axis: half the strength."""

    def mixed(x):
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    leaf_3x2 = np.array([[1.0, -2.0], [0.0, -0.0], [np.inf, 3e-40]], np.float32)
    wanted = []
    for lane in contract._LANES:
        total = 0
        for (row, column), word in np.ndenumerate(leaf_3x2.view(np.uint32)):
            place = mixed((mixed((lane + lane * row) % 2**32) + lane * column) % 2**32)
            total += mixed(int(word) ^ place)
        wanted.append(total % 2**32)
    found = np.asarray(contract._checksums([jnp.asarray(leaf_3x2)]))
    assert found.tolist() == [wanted] and len(set(wanted)) == 4


def test_digest_gathers_no_leaf(devices):
    """Bug: a save that brings every leaf whole onto each host, or onto each device."""
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,), devices=devices)
    like = jax.ShapeDtypeStruct((64, 512), np.float32, sharding=NamedSharding(mesh, P("x")))
    text = contract._checksums.lower([like]).compile().as_text()
    sent = kernels.read(text).collective_bytes()
    assert sent["all-reduce"] <= 2 * 4 * 4 and sum(sent.values()) == sent["all-reduce"]
