"""The embedding contract and the digest of the weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cosup_jax.contract import EmbeddingContract, check_match, weights_digest
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
    """Bug: a contract read back from JSON differs, or an older file's lacks a field unnoticed."""
    stored = json.loads(json.dumps(CONTRACT.to_dict()))
    assert EmbeddingContract.from_dict(stored, "the index") == CONTRACT
    for name in ("pooling", "emb"):
        older = {key: value for key, value in stored.items() if key != name}
        with pytest.raises(UserError, match=f"the index: its embedding contract lacks .*'{name}'"):
            EmbeddingContract.from_dict(older, "the index")


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
    for w in (changed, w_8x4.reshape(4, 8), w_8x4.astype(np.float64), w_8x4.T):
        digests.add(weights_digest({"gen": {"w": w, "t": jnp.float32(0)}}))
    digests.add(weights_digest({"ctx": {"w": w_8x4, "t": jnp.float32(0)}}))
    assert len(digests) == 6
