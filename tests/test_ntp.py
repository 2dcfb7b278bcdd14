"""Next-token prediction against loops, and what its tiles cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import assert_close
from oracle import ntp as ntp_oracle

from cosup_jax import ntp

B, T, D, V, OWNED = 3, 11, 6, 32, 29


def _inputs(seed: int = 0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    kernel = rng.normal(size=(D, V)).astype(np.float32)
    weights = np.where(rng.random((B, T)) < 0.6, rng.choice([1.0, 0.5], (B, T)), 0)
    return hidden, kernel, rng.integers(0, OWNED, (B, T)), weights.astype(np.float32)


def _by_loops(hidden, kernel, targets, weights):
    """Sum, weight, and the sum's gradients with respect to hidden states and kernel."""
    logits = np.float64(hidden).reshape(-1, D) @ kernel[:, :OWNED]
    nats, weight, grad = ntp_oracle(logits, targets.ravel(), weights.ravel())
    grad_kernel = np.zeros(kernel.shape)
    grad_kernel[:, :OWNED] = np.float64(hidden).reshape(-1, D).T @ grad
    return nats, weight, (grad @ kernel[:, :OWNED].T).reshape(hidden.shape), grad_kernel


def test_ntp_counts_supervised_tokens_only():
    """Bug: padding or prompt tokens in the mean; a NaN on padding reaching loss or gradient."""
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(7, 11)).astype(np.float32), rng.integers(0, 11, 7)
    weights = np.array([0, 1, 1, 0, 1, 0, 1], np.float32)
    logits[3] = np.nan
    (nats, weight), grad = (
        ntp.ntp_sums(logits, targets, weights),
        jax.grad(lambda x: ntp.ntp_sums(x, targets, weights)[0])(logits),
    )
    expected, count, expected_grad = ntp_oracle(logits, targets, weights)
    np.testing.assert_allclose(nats, expected, rtol=1e-6)
    assert weight == count == 4
    assert_close(grad, expected_grad)


@pytest.mark.parametrize("tile", [0, 1, 4, 7, 100])
@pytest.mark.parametrize("outer", [1.0, 2.5])
def test_tiles_equal_the_loops(tile, outer):
    """Bugs: a tile left out or counted twice, padded vocabulary in the softmax, a hand-written
    gradient that forgets the factor in front of the loss."""
    hidden, kernel, targets, weights = _inputs()

    def loss(hidden, kernel):
        nats, _ = ntp.linear_ntp_sums(hidden, kernel, targets, weights, OWNED, tile * 4 * V)
        return outer * nats

    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, kernel)
    nats, _, *expected = _by_loops(hidden, kernel, targets, weights)
    np.testing.assert_allclose(value, outer * nats, rtol=1e-5)
    assert_close(grads, tuple(outer * grad for grad in expected))


def test_the_last_tile_may_be_short():
    """Bug: the rows that fill the last tile up counted as tokens. 33 tokens, tiles of 4."""
    hidden, kernel, targets, _ = _inputs()
    weights = np.ones_like(targets, np.float32)
    sums = lambda h, k: ntp.linear_ntp_sums(h, k, targets, weights, OWNED, 4 * 4 * V)[0]
    value, grads = jax.jit(jax.value_and_grad(sums, argnums=(0, 1)))(hidden, kernel)
    nats, _, *expected = _by_loops(hidden, kernel, targets, weights)
    np.testing.assert_allclose(value, nats, rtol=1e-5)
    assert_close(grads, tuple(expected))


@pytest.mark.parametrize("tile", [0, 4])
def test_padding_is_never_read(tile):
    """Bug: NaN at an unsupervised token in the loss, or in the kernel's gradient as 0 * NaN; a
    batch without a supervised token that divides by zero or reads uninitialised tiles."""
    hidden, kernel, targets, weights = _inputs()
    poisoned = np.where((weights > 0)[..., None], hidden, np.nan)
    sums = lambda h, k, w: ntp.linear_ntp_sums(h, k, targets, w, OWNED, tile * 4 * V)[0]
    grad = jax.jit(jax.value_and_grad(sums, argnums=(0, 1)))
    assert_close(grad(poisoned, kernel, weights), grad(hidden, kernel, weights), 0)
    value, grads = grad(hidden, kernel, np.zeros_like(weights))
    assert value == 0 and not any(np.any(x) for x in grads)


def test_bfloat16_rounds_the_products_only():
    """Bug: sums, or the kernel's gradient over the tiles, kept in bfloat16."""
    hidden, kernel, targets, weights = _inputs()
    rounded = [jnp.bfloat16(x) for x in (hidden, kernel)]
    sums = lambda h, k: ntp.linear_ntp_sums(h, k, targets, weights, OWNED, 4 * 4 * V)[0]
    grads = jax.jit(jax.grad(sums, argnums=(0, 1)))(rounded[0], jnp.float32(rounded[1]))
    assert grads[0].dtype == jnp.bfloat16 and grads[1].dtype == jnp.float32
    nats, _, *expected = _by_loops(*(np.float32(x) for x in rounded), targets, weights)
    np.testing.assert_allclose(jax.jit(sums)(*rounded), nats, rtol=1e-5)
    assert_close(jax.tree.map(np.float32, grads), tuple(expected), 2**-7)


def _temporary_bytes(loss, *shapes) -> int:
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_logits_are_never_whole():
    """Bug: logits kept for the backward pass. Llama 3's vocabulary, 8,192 tokens: at least four
    times less temporary memory than without tiles."""
    rows, tokens, width, vocab = 8, 1024, 256, 128_256
    shapes = (
        jax.ShapeDtypeStruct((rows, tokens, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((width, vocab), jnp.float32),
        jax.ShapeDtypeStruct((rows, tokens), jnp.int32),
        jax.ShapeDtypeStruct((rows, tokens), jnp.float32),
    )

    def untiled(hidden, kernel, targets, weights):
        logits = jnp.einsum("btd,dv->btv", hidden, kernel, preferred_element_type=jnp.float32)
        return ntp.ntp_sums(logits, targets, weights)[0]

    tiled = lambda *arrays: ntp.linear_ntp_sums(*arrays, vocab, 64 << 20)[0]
    whole, part = _temporary_bytes(untiled, *shapes), _temporary_bytes(tiled, *shapes)
    print(f"temporary MiB: untiled {whole >> 20:,}, 64 MiB tiles {part >> 20:,}")
    assert part * 4 <= whole
