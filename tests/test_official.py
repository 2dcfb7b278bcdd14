"""compat="official": the official code's bugs, each pinned against a plain computation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import ARCH, VOCAB, assert_close, config, towers

from cosup_jax import config as config_lib
from cosup_jax import cosup, official
from cosup_jax import step as step_lib
from cosup_jax.data.batch import BatchShape, empty_batch
from cosup_jax.dotted import replace_dotted
from cosup_jax.errors import UserError
from cosup_jax.freeze import freeze
from cosup_jax.towers import Towers

PAD = VOCAB - 1


def _rows(seed: int, lengths, passage_lengths, R: int = 2):
    """Unpacked rows of given lengths, right-padded; passage_lengths[b] lists row b's evidence."""
    rng = np.random.default_rng(seed)
    B, T, L = len(lengths), max(lengths) + 2, 9
    batch = empty_batch(BatchShape(B, T, R, 1, B * R, L, 1), B, B * R)
    for b, n in enumerate(lengths):
        batch.gen_tokens_BxT[b, :n] = rng.integers(0, PAD, n)
        batch.gen_segments_BxT[b, :n] = 1
        batch.gen_positions_BxT[b, :n] = np.arange(n)
        batch.ntp_targets_BxT[b, : n - 1] = batch.gen_tokens_BxT[b, 1:n]
        batch.ntp_weights_BxT[b, 2 : n - 1] = 1
        for r, m in enumerate(passage_lengths[b]):
            u = b * R + r
            batch.ret_positions_BxR[b, r], batch.ret_valid_BxR[b, r] = 3 + 2 * r, True
            batch.ctx_tokens_UxL[u, :m] = rng.integers(0, PAD, m)
            batch.ctx_segments_UxL[u, :m] = 1
            batch.ctx_positions_UxL[u, :m] = np.arange(m)
            batch.passage_ends_UxP[u], batch.passage_valid_UxP[u] = m - 1, True
            batch.passage_ids_UxPx2[u] = batch.ret_positives_BxRxSx2[b, r, 0] = u + 1, 1
    return batch


def _by_rank(params, batch, t, W: int, weight: float):
    """The official computation rank by rank, on arrays cut to the rank's longest row."""
    B, R = batch.ret_valid_BxR.shape
    per_rank, vectors = B // W, []
    for w in range(W):
        u = [
            i for i in range(w * per_rank * R, (w + 1) * per_rank * R) if batch.passage_valid_UxP[i]
        ]
        if not u:
            vectors.append(None)
            continue
        longest = int((batch.ctx_segments_UxL[u] > 0).sum(1).max())
        real = batch.ctx_segments_UxL[u][:, :longest] > 0
        tokens = np.where(real, batch.ctx_tokens_UxL[u][:, :longest], PAD)
        positions = np.broadcast_to(np.arange(longest), tokens.shape)
        hidden = t.ctx.hidden(params["ctx"], tokens, np.where(real, 1, -1), positions)
        vectors.append(hidden[:, -1])
    total = 0.0
    for w in range(W):
        rows = slice(w * per_rank, (w + 1) * per_rank)
        longest = int((batch.gen_segments_BxT[rows] > 0).sum(1).max())
        real = batch.gen_segments_BxT[rows][:, :longest] > 0
        tokens = np.where(real, batch.gen_tokens_BxT[rows][:, :longest], PAD)
        labels = np.where(real, tokens, PAD)  # the collator pads labels with PAD, not -100
        labels[:, :3] = -100  # the prompt
        positions = np.broadcast_to(np.arange(longest), tokens.shape)
        hidden = t.gen.hidden(params["gen"], tokens, np.where(real, 1, -1), positions)
        log_p = jax.nn.log_softmax(t.gen.logits(params["gen"], hidden)[:, :-1])
        b, i = np.nonzero(labels[:, 1:] != -100)
        total -= jnp.mean(log_p[b, i, labels[:, 1:][b, i]]) / W
        valid = batch.ret_valid_BxR[rows]
        if valid.any():
            b, r = np.nonzero(valid)
            query = hidden[b, batch.ret_positions_BxR[rows][b, r]]
            others = [v for i, v in enumerate(vectors) if i != w and v is not None]
            columns = jnp.concatenate([vectors[w], *map(jax.lax.stop_gradient, others)])
            log_p = jax.nn.log_softmax(query @ columns.T, axis=1)
            total -= weight * jnp.mean(jnp.diagonal(log_p)) / W
    return total


@pytest.fixture(scope="module")
def setting():
    """Towers, their parameters, a batch of four ranks that is worth two, and our own objective."""
    lengths = [14, 9, 11, 7, 13, 8, 6, 10]
    evidence = [(4, 7), (5,), (9, 3), (6, 6), (), (), (5, 8), (2,)]
    t = towers(dataclasses.replace(ARCH, layers=1))
    c = freeze(config_lib.make({"num_steps": 1, "compat": "official", "batch_size": 8}, {}))
    c = replace_dotted(c, "loss.nsp_weight", 0.5)  # large enough to be seen
    batch = _rows(0, lengths, evidence)
    params = jax.jit(lambda key: step_lib.init_params(key, t, c))(jax.random.key(0))
    ours = dataclasses.replace(c, compat="")
    objective = lambda p: cosup.loss(p, batch, None, 0, t, ours)[0]
    return t, c, batch, params, jax.jit(jax.value_and_grad(objective))(params)


# One rank: test_golden.py.
@pytest.mark.parametrize("W", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_equals_the_rank_by_rank_computation(setting, W):
    """Bugs: PAD targets counted to the wrong length, pooling at the row's own end, gradient through
    other ranks, one mean over all ranks. One rank has no [Ret]."""
    t, c, batch, params, corrected = setting
    c = replace_dotted(c, "loss.compat_ranks", W)
    found = jax.jit(jax.value_and_grad(lambda p: official.loss(p, batch, t, PAD, c)[0]))(params)
    expected = jax.jit(jax.value_and_grad(lambda p: _by_rank(p, batch, t, W, 0.5)))(params)
    assert_close(found, expected)
    with pytest.raises(AssertionError):
        assert_close(corrected, expected, 1e-2)


class _Lookup:
    """A tower whose hidden state is the token's row of a table."""

    def hidden(self, params, tokens, segments, positions):
        return params[tokens]

    def logits(self, params, hidden):
        return hidden @ params.T


def _by_lookup(table, batch, c):
    """`official.loss` of two such towers; eager, every operation would be compiled by itself."""
    t, params = Towers(_Lookup(), _Lookup()), {"gen": table, "ctx": table}
    return jax.jit(lambda: official.loss(params, batch, t, 0, c))()


def test_two_padded_ranks_by_hand():
    """Bug: a quirk that the rank-by-rank test shares with the code. Every number worked out."""
    table = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # PAD = 0, a = 1, b = 2
    batch = empty_batch(BatchShape(2, 4, 1, 1, 2, 3, 1), 2, 2)
    batch.gen_tokens_BxT[:] = [[1, 2, 1, 2], [2, 1, 0, 0]]
    batch.gen_segments_BxT[:] = [[1, 1, 1, 1], [1, 1, 0, 0]]
    batch.ntp_targets_BxT[:] = [[2, 1, 2, 0], [1, 0, 0, 0]]
    batch.ntp_weights_BxT[:] = [[0, 1, 1, 0], [1, 0, 0, 0]]
    batch.ret_positions_BxR[:], batch.ret_valid_BxR[:] = [[0], [0]], True
    batch.ctx_tokens_UxL[:] = [[1, 2, 1], [2, 0, 0]]
    batch.ctx_segments_UxL[:] = [[1, 1, 1], [1, 0, 0]]
    batch.passage_valid_UxP[:] = True
    c = freeze(config_lib.make({"num_steps": 1, "compat": "official", "batch_size": 2}, {}))
    c = replace_dotted(c, "loss.compat_ranks", 2)
    _, aux = _by_lookup(table, batch, c)
    # A token's logit is 1 for itself and 0 for the two others; its log Z is log(e + 2).
    log_z = np.log(np.e + 2)
    # Rank 0 is as long as its row: b -> a and a -> b cost log Z each. Rank 1: b -> a costs log Z;
    # its row is its rank's longest, so no PAD is a target there.
    np.testing.assert_allclose(aux.metrics["ntp/nats_per_token"], log_z, rtol=1e-6)
    # Vectors: rank 0 pools a = (1, 0), rank 1 pools b = (0, 1), its own longest row, not column 2.
    # Query a scores (1, 0), query b scores (0, 1): each loses log(e + 1) - 1.
    np.testing.assert_allclose(aux.metrics["nsp/nats_per_ret"], np.log(np.e + 1) - 1, rtol=1e-6)
    # As one rank, row 1 is padded to 4: a -> PAD, PAD -> PAD count too, and passage b pools PAD.
    c = replace_dotted(c, "loss.compat_ranks", 1)
    _, aux = _by_lookup(table, batch, c)
    ntp = (3 * log_z + log_z + np.log(3)) / 5
    np.testing.assert_allclose(aux.metrics["ntp/nats_per_token"], ntp, rtol=1e-6)
    nsp = ((np.log(np.e + 1) - 1) + np.log(2)) / 2  # query b sees (0, 0)
    np.testing.assert_allclose(aux.metrics["nsp/nats_per_ret"], nsp, rtol=1e-6)


def test_rows_without_an_example_count_nothing():
    """Bug: the empty rows of an epoch's last step as PAD targets, or as ranks of loss zero."""
    c = config(compat="official", batch_size=2)
    table = jnp.eye(3, 2)
    one = _rows(0, [5], [(3,)])
    one = jax.tree.map(lambda x: np.minimum(x, 2) if x.dtype == np.int32 else x, one)
    two = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), one)
    alone = _by_lookup(table, one, c)[0]
    for ranks in (1, 2):
        c = replace_dotted(c, "loss.compat_ranks", ranks)
        padded = _by_lookup(table, two, c)[0]
        np.testing.assert_allclose(padded, alone, rtol=1e-6)


def test_a_contrary_key_is_refused():
    """Bug: compat silently overrules what the user asked for."""
    with pytest.raises(UserError, match=r"loss\.temperature"):
        config(compat="official", loss__temperature=0.2)
    plain = config_lib.make({"num_steps": 1, "compat": "official"}, {})
    assert freeze(plain).loss.nsp_weight == 0.01
    with pytest.raises(UserError, match=r"loss\.nsp_weight"):
        freeze(plain, frozenset({"loss.nsp_weight"}))  # given, though it is the default
