"""Our transformer equals Hugging Face's on the same weights, in float32, family by family.

Imports nothing of torch at the top: the default run collects this module without it.
"""

import copy
import dataclasses
from typing import Any, NamedTuple

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import assert_close
from families import V

from cosup_jax import ntp
from cosup_jax.hf import saving
from cosup_jax.model.transformer import Transformer

pytestmark = pytest.mark.parity

T = 12  # tokens of a row
TILE_BYTES = 5 * 4 * 384  # the logits of five tokens
FINAL_NORM = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}  # "norm" elsewhere


class Pair(NamedTuple):
    """One set of weights in both programs."""

    name: str
    theirs: Any
    ours: Transformer
    params: dict


@pytest.fixture(scope="module", params=families.CASES)
def pair(request, tmp_path_factory):
    from record_families import build

    name, directory = request.param, tmp_path_factory.mktemp(request.param)
    theirs, _ = build(name)
    theirs.save_pretrained(directory)  # config.json too is Hugging Face's own
    ours = families.model_of(directory, name)
    return Pair(name, theirs, ours, families.load(directory, ours))


def theirs(pair: Pair, tokens, **more):
    """Hugging Face's output for NumPy arrays: final states, logits, loss and all."""
    import torch

    tensors = {name: torch.tensor(array) for name, array in more.items()}
    return pair.theirs(torch.tensor(tokens), output_hidden_states=True, **tensors)


def states_and_logits(output) -> tuple[np.ndarray, ...]:
    from record_families import to_numpy

    return tuple(to_numpy(output))


def ours(pair: Pair, tokens, segments, positions) -> tuple:
    rows = tokens, jnp.int32(segments), jnp.int32(positions)
    return jax.jit(lambda *rows: families.outputs(pair.ours, *rows))(pair.params, *rows)


def random_tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, V, shape)


def test_every_layer_and_the_logits(pair):
    """Bugs: pairs rotated as neighbours, a rotary base or epsilon of our own, positions that are
    not looked at, query heads that read another kv head, layers or norms that change places, an
    output head that is not the file's."""
    tokens, ones = random_tokens(4, T), np.ones((4, T), int)
    positions = np.arange(T) * np.array([[1], [1], [2], [5]])  # rotary sees differences only
    output = theirs(pair, tokens, attention_mask=ones, position_ids=positions)
    assert_close(ours(pair, tokens, ones, positions), states_and_logits(output))
    body = pair.theirs.base_model
    kind = body.config.model_type
    norm = (lambda x: x) if kind == "bert" else getattr(body, FINAL_NORM.get(kind, "norm"))
    for n, state in enumerate(output.hidden_states[1:-1], start=1):  # the last was compared
        first = Transformer(dataclasses.replace(pair.ours.arch, layers=n), V, has_head=False)
        blocks = jax.tree.map(lambda leaf, n=n: leaf[:n], pair.params["blocks"])
        shallow = Pair(pair.name, None, first, pair.params | {"blocks": blocks})
        (hidden,) = ours(shallow, tokens, ones, positions)
        assert_close(hidden, norm(state).detach().numpy())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows(pair, side):
    """Bugs: a real token that sees padding, or what comes after it; a window or a position counted
    from the row's start."""
    lengths, at = np.array([[T], [7], [1], [9]]), np.arange(T)
    real = at < lengths if side == "right" else at >= T - lengths
    tokens, positions = random_tokens(4, T), np.maximum(real.cumsum(axis=1) - 1, 0)
    output = theirs(pair, tokens, attention_mask=real.astype(int), position_ids=positions)
    found = ours(pair, tokens, real, positions)
    assert_close([part[real] for part in found], [part[real] for part in states_and_logits(output)])


def test_hugging_face_reads_what_we_write(pair, tmp_path):
    """Bug: an exported config.json that our reader alone understands: a name or a place of the
    rotary settings, of the window or of an epsilon that Hugging Face does not look at."""
    arch, has_head = pair.ours.arch, pair.ours.has_head
    saving.save(tmp_path, pair.params, arch, V, has_head)
    body = type(pair.theirs)
    again = body.from_pretrained(tmp_path, attn_implementation="eager", dtype="float32").eval()
    tokens = random_tokens(2, T)
    found, expected = (theirs(pair._replace(theirs=m), tokens) for m in (again, pair.theirs))
    for ours, wanted in zip(*map(states_and_logits, (found, expected)), strict=True):
        assert_close(ours, wanted)


def test_packed_rows(pair):
    """Bug: attention across the examples of a row."""
    tokens = random_tokens(1, T)
    segments = np.array([[1] * 5 + [2] * 6 + [0]])
    found = ours(pair, tokens, segments, [[*range(5), *range(6), 0]])
    for segment in (1, 2):
        inside = segments == segment
        alone = states_and_logits(theirs(pair, tokens[inside][None]))
        assert_close([part[inside] for part in found], [part[0] for part in alone])


@pytest.mark.parametrize("pair", families.CAUSAL, indirect=True)
def test_loss_and_gradients(pair, tmp_path):
    """Bugs: a path that carries no gradient, a target counted that has no weight, a tied table
    that learns as input or as output alone, a padded vocabulary entry that learns."""
    tokens, answer = random_tokens(2, T), np.arange(T) >= np.array([[3], [6]])
    pair.theirs.zero_grad()
    output = theirs(pair, tokens, labels=np.where(answer, tokens, -100))
    output.loss.backward()
    # A gradient lies in its file as its weight does, so the same loader maps it.
    grads = copy.deepcopy(pair.theirs)
    for slot, weight in zip(grads.parameters(), pair.theirs.parameters(), strict=True):
        slot.data = weight.grad
    grads.save_pretrained(tmp_path)

    def loss(params):
        ones, positions = jnp.ones((2, T), jnp.int32), jnp.arange(T)[None].repeat(2, axis=0)
        hidden = pair.ours.hidden(params, tokens, ones, positions)[:, :-1]
        targets, weights = jnp.array(tokens[:, 1:]), jnp.float32(answer[:, 1:])
        kernel = pair.ours.unembedding(params)
        nats, weight = ntp.linear_ntp_sums(hidden, kernel, targets, weights, V, TILE_BYTES)
        return nats / weight

    found = jax.jit(jax.value_and_grad(loss))(pair.params)
    expected = output.loss.item(), without_new_rows(families.load(tmp_path, pair.ours))
    if pair.name == "gpt2":  # softmax ignores what all keys share: k_bias gets rounding errors only
        for _, grads in (found, expected):
            attn = grads["blocks"]["attn"]
            assert np.abs(attn.pop("k_bias")).max() < 1e-5 * np.abs(attn["q_bias"]).max()
    assert_close(found, expected)


def without_new_rows(params: dict) -> dict:
    """Zeros for the entries that pad the vocabulary, where the loader puts noise."""
    changed = {"embed": params["embed"] | {"table": params["embed"]["table"].at[V:].set(0)}}
    if "head" in params:
        changed["head"] = {"kernel": params["head"]["kernel"].at[:, V:].set(0)}
    return params | changed
