"""The batch: what the data path hands to the step, and the letters that name its dimensions.

B  Gen rows of the global batch        U  Ctx rows of the global batch
T  tokens of a Gen row                 L  tokens of a Ctx row
R  [Ret] slots of a Gen row            P  passage slots of a Ctx row
S  positives of a [Ret] slot           D  features of a vector
Q = B * R  queries                     C = U * P  candidates
V  vocabulary                          K  slots of the memory bank
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from cosup_jax.config import Config


class Batch(NamedTuple):
    """One step's data, every shape static. Padding is all zeros.

    A segment number is 1, 2, ... within its row and 0 on padding; positions restart in each
    segment. A passage's identity is the first 64 bits of SHA-256 over the token ids Ctx reads, as
    two uint32; (0, 0) means none.
    """

    gen_tokens_BxT: Any  # int32
    gen_segments_BxT: Any  # int32, one segment an example
    gen_positions_BxT: Any  # int32
    ntp_targets_BxT: Any  # int32, the token that follows, within the segment
    ntp_weights_BxT: Any  # float32, 1 where the target is supervised
    ret_positions_BxR: Any  # int32, index of the [Ret] token in its row
    ret_valid_BxR: Any  # bool
    ret_positives_BxRxSx2: Any  # uint32; [:, :, 0] the slot's passage, then its example's others
    ctx_tokens_UxL: Any  # int32
    ctx_segments_UxL: Any  # int32, one segment a passage; slot p holds segment p + 1
    ctx_positions_UxL: Any  # int32
    passage_ends_UxP: Any  # int32, index of the passage's last token in its row
    passage_valid_UxP: Any  # bool
    passage_ids_UxPx2: Any  # uint32, identity


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The static bounds of a batch, by the letters above."""

    B: int
    T: int
    R: int
    S: int
    U: int
    L: int
    P: int


def batch_shape(config: Config) -> BatchShape:
    """Bounds from the config. Packing off: one example a Gen row, one passage a Ctx row.

    Under compat=official the passage of slot (b, r) lies in Ctx row b * R + r, as positives are
    then found by position.
    """
    data, B = config.data, config.batch_size
    T, R, S = data.max_gen_tokens, data.ret_slots, data.max_positives
    U = B * R if config.compat == "official" else data.ctx_rows
    if data.packing:
        return BatchShape(B, T, R, S, U, data.ctx_row_tokens, data.passage_slots)
    return BatchShape(B, T, R, S, U, data.max_ctx_tokens, 1)


def empty_batch(shape: BatchShape, gen_rows: int, ctx_rows: int) -> Batch:
    """All padding, in NumPy: a host's own `gen_rows` of B and `ctx_rows` of U."""
    B, T, R, S, U, L, P = gen_rows, shape.T, shape.R, shape.S, ctx_rows, shape.L, shape.P
    return Batch(
        gen_tokens_BxT=np.zeros((B, T), np.int32),
        gen_segments_BxT=np.zeros((B, T), np.int32),
        gen_positions_BxT=np.zeros((B, T), np.int32),
        ntp_targets_BxT=np.zeros((B, T), np.int32),
        ntp_weights_BxT=np.zeros((B, T), np.float32),
        ret_positions_BxR=np.zeros((B, R), np.int32),
        ret_valid_BxR=np.zeros((B, R), bool),
        ret_positives_BxRxSx2=np.zeros((B, R, S, 2), np.uint32),
        ctx_tokens_UxL=np.zeros((U, L), np.int32),
        ctx_segments_UxL=np.zeros((U, L), np.int32),
        ctx_positions_UxL=np.zeros((U, L), np.int32),
        passage_ends_UxP=np.zeros((U, P), np.int32),
        passage_valid_UxP=np.zeros((U, P), bool),
        passage_ids_UxPx2=np.zeros((U, P, 2), np.uint32),
    )
