"""The transformer by itself: what a token may see, and that memory options change no number."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import ARCH, VOCAB, assert_close
from flax.traverse_util import flatten_dict

from cosup_jax.model import attention
from cosup_jax.model.transformer import Transformer, padded_vocab

MODEL = Transformer(ARCH, VOCAB)
HIDDEN = jax.jit(MODEL.hidden)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def _rows(B: int = 2, T: int = 12):
    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, VOCAB)
    return tokens, jnp.ones((B, T), jnp.int32), jnp.broadcast_to(jnp.arange(T), (B, T))


def test_causality_by_gradient(params):
    """Bug: a token that sees its future, or not its whole past."""
    tokens, segments, positions = _rows(1)
    at = 5

    def state(table):
        changed = params | {"embed": {"table": table}}
        return jnp.sum(HIDDEN(changed, tokens, segments, positions)[0, at] ** 3)

    tokens = jnp.arange(12)[None]  # each position owns a row of the table
    reached = jnp.abs(jax.jit(jax.grad(state))(params["embed"]["table"])).max(axis=1)[:12] > 0
    np.testing.assert_array_equal(reached, np.arange(12) <= at)


def test_packed_equals_alone(params):
    """Bug: attention across packed examples, or positions that run on."""
    tokens, _, _ = _rows(2, 7)
    alone = HIDDEN(params, tokens, jnp.ones((2, 7), jnp.int32), jnp.arange(7)[None].repeat(2, 0))
    packed = jnp.concatenate([tokens[0], tokens[1], jnp.zeros(2, jnp.int32)])[None]
    segments = jnp.array([[1] * 7 + [2] * 7 + [0] * 2])
    positions = jnp.array([[*range(7), *range(7), 0, 0]])
    together = HIDDEN(params, packed, segments, positions)[0, :14].reshape(2, 7, -1)
    assert_close(together, alone)


def test_negative_segments_see_and_are_not_seen(params):
    """Bug: padding under compat=official that other tokens, or other padding, can see."""
    tokens, _, positions = _rows(1, 6)
    segments = jnp.array([[1, 1, 1, 1, -1, -1]])
    hidden = HIDDEN(params, tokens, segments, positions)
    other = HIDDEN(params, tokens.at[0, 4].set(7), segments, positions)
    assert_close(other[:, [0, 1, 2, 3, 5]], hidden[:, [0, 1, 2, 3, 5]], 0)
    past = HIDDEN(params, tokens.at[0, 0].set(7), segments, positions)
    assert float(jnp.abs(past[:, 5] - hidden[:, 5]).max()) > 1e-3


@functools.cache
def _gradient(model):
    loss = lambda params, rows: jnp.mean(model.logits(params, model.hidden(params, *rows)) ** 2)
    return jax.jit(jax.grad(loss))


@pytest.mark.parametrize("option", [{"remat": "dots"}, {"remat": "full"}, {"scan_unroll": 2}])
def test_memory_options_change_no_number(params, option):
    """Bug: remat or unrolling that changes the function."""
    other = Transformer(dataclasses.replace(ARCH, **option), VOCAB)
    assert other.arch != MODEL.arch
    rows = _rows()
    assert_close(_gradient(other)(params, rows), _gradient(MODEL)(params, rows))
    if "remat" in option:
        lowered = lambda m: str(
            jax.make_jaxpr(jax.grad(lambda p: m.hidden(p, *rows).sum()))(params)
        )
        assert lowered(other).count("remat") > lowered(MODEL).count("remat")


@pytest.mark.parametrize("window", [0, 4])
def test_attention_in_chunks_equals_the_whole(window):
    """Bugs: a chunk that misses keys of its own or of earlier ones; query heads beside another
    group's keys; padding or a lone token that gives NaN; a gradient that stops at a chunk."""
    segments = jnp.array([[1] * 5 + [2] * 4 + [-2, 0], [0, 1, *[2] * 9]])  # 11: the last is shorter
    mask = attention.mask(segments, True, window)
    normal = lambda seed, heads: jax.random.normal(jax.random.key(seed), (2, 11, heads, 8))
    q, k, v, back = normal(0, 4), normal(1, 2), normal(2, 2), normal(3, 4)
    seen = (segments != 0)[..., None, None]  # what stands at segment 0 is meaningless
    kinds = (
        lambda *parts: attention.attend(*parts, mask, "xla") * seen,
        lambda *parts: jax.nn.dot_product_attention(*parts, mask=mask) * seen,
    )
    (ours, our_vjp), (whole, vjp) = (jax.vjp(kind, q, k, v) for kind in kinds)
    for one, other in zip((ours, *our_vjp(back)), (whole, *vjp(back)), strict=True):
        assert_close(one, other)


def test_neither_scores_nor_activations_are_kept(params):
    """Bug: memory of a step that grows by a row's length squared, or by three more [B, T, F]."""
    T, F = 96, ARCH.mlp_width
    keep = lambda params: jax.vjp(lambda p: MODEL.hidden(p, *_rows(1, T)), params)[1]
    kept = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(keep, params))]
    layers = ARCH.layers
    assert kept.count((layers, 1, T, F)) == 2  # gate and up
    assert not [shape for shape in kept if shape.count(T) > 1 and shape[0] == layers]


def test_padded_vocabulary_never_wins(params):
    """Bug: rows that no token owns take part in the softmax."""
    rows = _rows()
    assert padded_vocab(VOCAB) == 384 and params["embed"]["table"].shape[0] == 384
    logits = MODEL.logits(params, HIDDEN(params, *rows))
    share = jax.nn.softmax(logits)[..., VOCAB:].sum()
    assert share == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_bfloat16_sums_no_gradient_in_bfloat16(family):
    """Bug: the row of a frequent token, or a bias, gets half its gradient, as a sum in bfloat16
    stops growing once a term is less than half a unit in its last place."""
    arch = dataclasses.replace(ARCH, family=family, layers=1, kv_heads=ARCH.heads, max_positions=32)
    often = jax.random.bernoulli(jax.random.key(2), 0.9, (128, 32))  # of 4,096 tokens
    rows = jnp.where(often, 3, _rows(128, 32)[0]), *_rows(128, 32)[1:]
    exact, half = (
        Transformer(dataclasses.replace(arch, dtype=dtype), VOCAB, has_head=False)
        for dtype in ("float32", "bfloat16")
    )
    params = jax.jit(exact.init)(jax.random.key(0))
    pull_D = jax.random.normal(jax.random.key(3), (arch.width,))
    gradient = lambda model: jax.jit(
        jax.grad(lambda p: jnp.sum(jnp.einsum("btd,d->", model.hidden(p, *rows), pull_D)))
    )(params)
    wanted = flatten_dict(gradient(exact), sep="/")
    for name, found in flatten_dict(gradient(half), sep="/").items():
        length = jnp.linalg.norm(wanted[name])
        off = jnp.linalg.norm(found - wanted[name])
        assert off < 0.04 * length or length < 1, f"{name}: off by {off / length:.0%}"


def test_bfloat16_computes_in_bfloat16_and_scores_in_float32(params):
    """Bug: parameters cast for good, or logits left in bfloat16."""
    half = Transformer(dataclasses.replace(ARCH, dtype="bfloat16"), VOCAB)
    hidden = jax.jit(half.hidden)(params, *_rows())
    assert hidden.dtype == jnp.bfloat16 and half.logits(params, hidden).dtype == jnp.float32
    exact = HIDDEN(params, *_rows())
    assert float(jnp.abs(hidden.astype(jnp.float32) - exact).max()) < 0.1
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
