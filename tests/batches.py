"""Small random towers and batches for the tests of the step."""

import jax
import numpy as np

from cosup_jax import config as config_lib
from cosup_jax.config import ArchConfig
from cosup_jax.data.batch import Batch, BatchShape, empty_batch
from cosup_jax.freeze import freeze
from cosup_jax.model.transformer import Transformer, padded_vocab
from cosup_jax.towers import Towers

VOCAB = 300
ARCH = ArchConfig(
    layers=2, width=32, heads=8, kv_heads=2, head_dim=8, mlp_width=128, tie_embeddings=False
)


def towers(arch: ArchConfig = ARCH, tied: bool = False) -> Towers:
    return Towers(Transformer(arch, VOCAB), Transformer(arch, VOCAB, has_head=False), tied)


def config(**keys):
    """Config with `a__b=value` for a.b; shapes fit `shape()`."""
    small = {
        "num_steps": 10,
        "batch_size": 16,
        "data.max_gen_tokens": 24,
        "data.ret_slots": 3,
        "data.max_positives": 2,
        "data.ctx_rows": 16,
        "data.ctx_row_tokens": 20,
        "data.max_ctx_tokens": 10,
        "data.passage_slots": 2,
    }
    keys = {name.replace("__", "."): value for name, value in keys.items()}
    return freeze(config_lib.make(small | keys, {}))


def random_batch(
    seed: int,
    shape: BatchShape,
    empty_rows: tuple[int, ...] = (),
    packing: bool = True,
    hard_negatives: bool = True,
    vocab: int = VOCAB,
) -> Batch:
    """Some slots empty, every [Ret]'s passage somewhere in the batch, siblings and one copied
    passage among them.

    Args:
      empty_rows: Gen rows without an example.
      packing: two examples a Gen row and P passages a Ctx row, or one.
      hard_negatives: passages that no [Ret] asks for remain in the batch.
    """
    rng = np.random.default_rng(seed)
    batch = empty_batch(shape, shape.B, shape.U)
    P, half = shape.P if packing else 1, shape.L // shape.P
    ids = rng.integers(1, 2**32, (shape.U, P, 2), dtype=np.uint32)
    ids[-1, -1] = ids[0, 0]
    lengths = rng.integers(2, half + 1, (shape.U, P))
    lengths[-1, -1] = lengths[0, 0]
    used = rng.random((shape.U, P)) < 0.8
    used[0, 0] = used[-1, -1] = True
    for u, p in np.argwhere(used):
        n, start = lengths[u, p], p * half
        batch.ctx_tokens_UxL[u, start : start + n] = rng.integers(0, vocab, n)
        batch.ctx_segments_UxL[u, start : start + n] = p + 1
        batch.ctx_positions_UxL[u, start : start + n] = np.arange(n)
        batch.passage_ends_UxP[u, p] = start + n - 1
        batch.passage_valid_UxP[u, p] = True
        batch.passage_ids_UxPx2[u, p] = ids[u, p]
    last, n = (P - 1) * half, lengths[0, 0]
    batch.ctx_tokens_UxL[-1, last : last + n] = batch.ctx_tokens_UxL[0, :n]
    live, wanted = np.argwhere(used), set()
    for b in range(shape.B):
        if b in empty_rows:
            continue
        cut = int(rng.integers(8, shape.T - 6)) if packing else shape.T - 2
        stretches = [(0, cut), (cut, shape.T - 2)] if packing else [(0, cut)]
        for segment, (start, stop) in enumerate(stretches, start=1):
            n = stop - start
            batch.gen_tokens_BxT[b, start:stop] = rng.integers(0, vocab, n)
            batch.gen_segments_BxT[b, start:stop] = segment
            batch.gen_positions_BxT[b, start:stop] = np.arange(n)
            batch.ntp_targets_BxT[b, start : stop - 1] = batch.gen_tokens_BxT[b, start + 1 : stop]
            batch.ntp_weights_BxT[b, start + 2 : stop - 1] = rng.random(n - 3) < 0.7
        positions = rng.choice(np.arange(1, shape.T - 2), shape.R, replace=False)
        for r in range(int(rng.integers(1, shape.R + 1))):
            own, other = map(tuple, live[rng.choice(len(live), 2, replace=False)])
            batch.ret_positions_BxR[b, r] = positions[r]
            batch.ret_valid_BxR[b, r] = True
            batch.ret_positives_BxRxSx2[b, r, 0] = ids[own]
            wanted.add(tuple(ids[own]))
            if r == 0 and shape.S > 1 and tuple(ids[own]) != tuple(ids[other]):
                batch.ret_positives_BxRxSx2[b, r, 1] = ids[other]
                wanted.add(tuple(ids[other]))
    if not hard_negatives:
        for u, p in np.argwhere(used):
            batch.passage_valid_UxP[u, p] = tuple(ids[u, p]) in wanted
    return batch


class Lookup:
    """A tower whose hidden state is its token's row of a table: the objective on bare vectors."""

    def __init__(self, vocab_size: int, width: int = 8, has_head: bool = True):
        self.vocab_size, self.width, self.has_head = vocab_size, width, has_head

    def init(self, key):
        key_table, key_kernel = jax.random.split(key)
        table = jax.random.normal(key_table, (self.vocab_size, self.width))
        kernel = jax.random.normal(key_kernel, (self.width, padded_vocab(self.vocab_size)))
        return {"embed": {"table": table}} | ({"head": {"kernel": kernel}} if self.has_head else {})

    def logical_axes(self):
        head = {"head": {"kernel": ("embed", "vocab")}} if self.has_head else {}
        return {"embed": {"table": ("vocab", "embed")}} | head

    def hidden(self, params, tokens, segments, positions):
        return params["embed"]["table"][tokens]

    def unembedding(self, params):
        return params["head"]["kernel"]


def lookups(tied: bool = False) -> Towers:
    return Towers(Lookup(VOCAB), Lookup(VOCAB, has_head=False), tied)


def assert_close(found, expected, tolerance: float = 1e-5) -> None:
    """max|a - b| <= tolerance * max|b| per leaf."""
    for (path, b), a in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True
    ):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all(), jax.tree_util.keystr(path)
        error, scale = np.abs(a - b).max(initial=0), np.abs(b).max(initial=0)
        assert error <= tolerance * scale, (
            f"{jax.tree_util.keystr(path)}: {error:.3g} > {tolerance} x {scale:.3g}"
        )
