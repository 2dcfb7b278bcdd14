"""Gen read piece by piece through its cache computes what it computes at once."""

import dataclasses
import json
from pathlib import Path

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import ARCH, VOCAB, assert_close

from cosup_jax.config import LoraConfig
from cosup_jax.model.transformer import Transformer

SHAPES = json.loads(str(np.load(Path(__file__).parent / "goldens" / "families.npz")["about"]))[
    "shapes"
]
CHUNKS = (1, 4)  # compiled shapes
SOME = ("mistral", "gpt2", "gpt_neox")  # a window; learned positions; part of a head turned
FAMILIES = [
    name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in families.CAUSAL
]


def read_in_pieces(model, params, tokens_BxT, lengths, slots: int, seed: int = 0):
    """States [B, T, D] by `extend`: rows ahead of and behind each other, some of them waiting,
    behind their tokens whatever, and now and then tokens that are taken back."""
    rng = np.random.default_rng(seed)
    B, T = tokens_BxT.shape
    extend = jax.jit(model.extend)
    cache = jax.jit(lambda: model.cache(B, slots))()
    found, at = np.zeros((B, T, model.width), np.float32), np.zeros(B, np.int32)
    while (at < lengths).any():
        chunk = int(rng.choice(CHUNKS))
        count = np.minimum(rng.integers(0, chunk + 1, B), lengths - at)
        piece = rng.integers(0, model.vocab_size, (B, chunk))  # what no row may see later
        taken_back = rng.random(B) < 0.2
        for b in range(B):
            if not taken_back[b]:
                piece[b, : count[b]] = tokens_BxT[b, at[b] : at[b] + count[b]]
        hidden, cache = extend(params, cache, piece, jnp.asarray(at))
        for b in np.flatnonzero(~taken_back):
            found[b, at[b] : at[b] + count[b]] = hidden[b, : count[b]]
            at[b] += count[b]
    return found


def compare(model, params, slots: int = 16):
    """Three rows, one of which fills the cache to its last slot."""
    lengths = np.array([slots, slots - 5, 7])
    rows = np.random.default_rng(1).integers(0, model.vocab_size, (3, slots))
    real = (np.arange(slots) < lengths[:, None]).astype(np.int32)
    positions = np.arange(slots)[None].repeat(3, axis=0)
    whole = np.asarray(jax.jit(model.hidden)(params, rows, real, positions))
    pieces = read_in_pieces(model, params, rows, lengths, slots)
    assert_close(pieces[real > 0], whole[real > 0])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name, tmp_path):
    """Bugs: a token at the position of its chunk, not of its row; keys kept before the norm of
    heads or unturned; a window that ends one token early or late; a layer that reads another's
    keys; padding, or what was taken back, that is seen later."""
    families.write(tmp_path, name, SHAPES[name])
    model = families.model_of(tmp_path, name)
    compare(model, families.load(tmp_path, model))


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_every_kind_of_layer(remat):
    """Bugs: frozen layers share a cache with the others, or are read after them; adapters that the
    cache does not see; unrolled layers that all write to the first."""
    options = {"family": "qwen3", "layers": 4, "frozen_layers": 1, "window": 3, "scan_unroll": 2}
    arch = dataclasses.replace(ARCH, lora=LoraConfig(rank=2), remat=remat, **options)
    model = Transformer(arch, VOCAB)
    rng, shapes = np.random.default_rng(0), jax.eval_shape(model.init, jax.random.key(0))
    compare(model, jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes))


def test_an_encoder_has_no_cache():
    """Bug: a BERT, whose tokens see later ones, is read piece by piece all the same."""
    bert = dataclasses.replace(ARCH, family="bert", kv_heads=ARCH.heads)
    with pytest.raises(ValueError, match="bert"):
        Transformer(bert, VOCAB).cache(1, 4)
