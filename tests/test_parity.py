"""Our transformer equals Hugging Face's LlamaForCausalLM on the same weights, in float32.

Imports nothing of torch at the top: the default run collects this module without it.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import assert_close
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import save_file

from cosup_jax import ntp
from cosup_jax.config import ArchConfig
from cosup_jax.hf import weights as hf
from cosup_jax.transformer import Transformer

pytestmark = pytest.mark.parity

N, V, T = 3, 300, 12  # layers; vocabulary, padded to 384; tokens of a row
SHAPE = {
    **{"num_hidden_layers": N, "vocab_size": V, "hidden_size": 32, "intermediate_size": 80},
    **{"num_attention_heads": 4, "head_dim": 12, "rms_norm_eps": 0.01},
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
TILE_BYTES = 5 * 4 * 384  # the logits of five tokens
CASES = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {"num_key_value_heads": 2},
    "tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
}


class Pair(NamedTuple):
    """One set of weights in both programs."""

    theirs: Any
    ours: Transformer
    params: dict
    directory: Path  # where Hugging Face saved it


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**SHAPE, **CASES[request.param]))
    for weight in theirs.parameters():  # larger than HF's, so that attention is far from uniform
        torch.nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.3)
    directory = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(directory)
    arch = hf.arch_from_hf(directory)
    ours = Transformer(vocab_size=arch.pop("vocab_size"), arch=ArchConfig(**arch))
    return Pair(theirs, ours, load(directory, ours), directory)


def load(directory, model: Transformer) -> dict:
    place = SingleDeviceSharding(jax.devices()[0])
    return hf.load_gen(
        directory,
        jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            jax.eval_shape(model.init, jax.random.key(0)),
        ),
    )


def theirs(pair: Pair, tokens, **more):
    """LlamaForCausalLM's output for NumPy arrays: final states, logits, loss and all."""
    import torch

    tensors = {name: torch.tensor(array) for name, array in more.items()}
    return pair.theirs(torch.tensor(tokens), output_hidden_states=True, **tensors)


def ours(model: Transformer, params: dict, tokens, segments, positions):
    """Final hidden states and the logits of the tokens that exist."""
    hidden = jax.jit(model.hidden)(params, tokens, jnp.int32(segments), jnp.int32(positions))
    return hidden, model.logits(params, hidden)[..., :V]


def random_tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, V, shape)


def test_every_layer_and_the_logits(pair):
    """Bugs: pairs rotated as neighbours, a rotary base or epsilon of our own, positions that are
    not looked at, query heads that read another kv head, layers or norms that change places, an
    output head that is not the file's."""
    tokens, ones = random_tokens(4, T), np.ones((4, T), int)
    positions = np.arange(T) * np.array([[1], [1], [2], [5]])  # attention only sees differences
    output = theirs(pair, tokens, attention_mask=ones, position_ids=positions)
    *inner, last = output.hidden_states[1:]  # the last is normed
    for n, state in enumerate([*map(pair.theirs.model.norm, inner), last], start=1):
        first = Transformer(dataclasses.replace(pair.ours.arch, layers=n), V)
        blocks = jax.tree.map(lambda leaf, n=n: leaf[:n], pair.params["blocks"])
        hidden, logits = ours(first, pair.params | {"blocks": blocks}, tokens, ones, positions)
        assert_close(hidden, state.detach().numpy())
    assert_close(logits, output.logits.detach().numpy())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows(pair, side):
    """Bugs: a real token that sees padding, or what comes after it."""
    lengths, at = np.array([[T], [7], [1], [9]]), np.arange(T)
    real = at < lengths if side == "right" else at >= T - lengths
    tokens, positions = random_tokens(4, T), np.maximum(real.cumsum(axis=1) - 1, 0)
    output = theirs(pair, tokens, attention_mask=real.astype(int), position_ids=positions)
    hidden, logits = ours(pair.ours, pair.params, tokens, real, positions)
    assert_close(hidden[real], output.hidden_states[-1].detach().numpy()[real])
    assert_close(logits[real], output.logits.detach().numpy()[real])


def test_packed_rows(pair):
    """Bug: attention across the examples of a row."""
    tokens = random_tokens(1, T)
    segments = np.array([[1] * 5 + [2] * 6 + [0]])
    hidden, logits = ours(pair.ours, pair.params, tokens, segments, [[*range(5), *range(6), 0]])
    for segment in (1, 2):
        inside = segments == segment
        alone = theirs(pair, tokens[inside][None])
        assert_close(hidden[inside], alone.hidden_states[-1].detach().numpy()[0])
        assert_close(logits[inside], alone.logits.detach().numpy()[0])


def test_loss_and_gradients(pair, tmp_path):
    """Bugs: a path that carries no gradient, a target counted that has no weight, a tied table
    that learns as input or as output alone, a padded vocabulary entry that learns."""
    tokens, answer = random_tokens(2, T), np.arange(T) >= np.array([[3], [6]])
    pair.theirs.zero_grad()
    output = theirs(pair, tokens, labels=np.where(answer, tokens, -100))
    output.loss.backward()
    # A gradient lies in its file as its weight does, so the same loader maps it.
    grads = {name: weight.grad.numpy() for name, weight in pair.theirs.named_parameters()}
    save_file(grads, tmp_path / "model.safetensors")
    shutil.copy(pair.directory / "config.json", tmp_path)

    def loss(params):
        ones, positions = jnp.ones((2, T), jnp.int32), jnp.arange(T)[None].repeat(2, axis=0)
        hidden = pair.ours.hidden(params, tokens, ones, positions)[:, :-1]
        targets, weights = jnp.array(tokens[:, 1:]), jnp.float32(answer[:, 1:])
        kernel = pair.ours.unembedding(params)
        nats, weight = ntp.linear_ntp_sums(hidden, kernel, targets, weights, V, TILE_BYTES)
        return nats / weight

    expected = output.loss.item(), without_new_rows(load(tmp_path, pair.ours))
    assert_close(jax.jit(jax.value_and_grad(loss))(pair.params), expected)


def without_new_rows(params: dict) -> dict:
    """Zeros for the entries that pad the vocabulary, where the loader puts noise."""
    changed = {"embed": {"table": params["embed"]["table"].at[V:].set(0)}}
    if "head" in params:
        changed["head"] = {"kernel": params["head"]["kernel"].at[:, V:].set(0)}
    return params | changed
