"""The two language models and what the objective reads of them: hidden states and vectors."""

import dataclasses

import jax
import jax.numpy as jnp

from cosup_jax.config import Config
from cosup_jax.data.batch import Batch
from cosup_jax.model.transformer import Transformer
from cosup_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Towers:
    """Gen and Ctx. `params = {"gen", "ctx", "nsp"}`; tied towers have no "ctx".

    Where Ctx is of another width than Gen, its parameters also hold `projection` [its D, Gen's D];
    with ctx.rotate that is a rotation, which stays as it was drawn.
    """

    gen: Transformer
    ctx: Transformer
    tied: bool = False

    @property
    def projects(self) -> bool:
        """Whether Ctx's vectors are projected to Gen's width."""
        return not self.tied and self.gen.width != self.ctx.width

    def ctx_params(self, params: dict) -> dict:
        """Parameters of Ctx, which are Gen's if the towers are tied."""
        return params["gen"] if self.tied else params["ctx"]


def gen_hidden(params: dict, batch: Batch, towers: Towers) -> jax.Array:
    """Gen's hidden states [B, T, D]."""
    return towers.gen.hidden(
        params["gen"], batch.gen_tokens_BxT, batch.gen_segments_BxT, batch.gen_positions_BxT
    )


def query_vectors(hidden_BxTxD: jax.Array, batch: Batch, config: Config) -> jax.Array:
    """[B, R, D]: Gen's hidden state at each `[Ret]`."""
    return similarity_space(_take(hidden_BxTxD, batch.ret_positions_BxR), config)


def passage_vectors(ctx_params: dict, batch: Batch, towers: Towers, config: Config) -> jax.Array:
    """[U, P, D]: what Ctx makes of each passage, projected to Gen's width if its own is another,
    or rotated."""
    rows = (batch.ctx_tokens_UxL, batch.ctx_segments_UxL, batch.ctx_positions_UxL)
    pooled_UxPxD = _pool(towers.ctx.hidden(ctx_params, *rows), batch, config.ctx.pooling)
    if "projection" in ctx_params:
        wide_UxPxD, projection = pooled_UxPxD.astype(jnp.float32), ctx_params["projection"]
        pooled_UxPxD = jnp.matmul(wide_UxPxD, projection, precision="highest")  # as scores are
    return similarity_space(pooled_UxPxD, config)


def _pool(hidden_UxLxD: jax.Array, batch: Batch, pooling: str) -> jax.Array:
    """[U, P, D]: the mean of a passage's states, the first of them, or else the last."""
    ends_UxP = batch.passage_ends_UxP
    if pooling == "mean":
        slot_P = jnp.arange(1, ends_UxP.shape[1] + 1)
        own_UxPxL = (batch.ctx_segments_UxL[:, None] == slot_P[None, :, None]).astype(jnp.float32)
        sum_UxPxD = jnp.einsum("upl,uld->upd", own_UxPxL, hidden_UxLxD.astype(jnp.float32))
        return sum_UxPxD / jnp.maximum(jnp.sum(own_UxPxL, axis=-1, keepdims=True), 1)
    if pooling == "cls":
        ends_UxP = ends_UxP - jnp.take_along_axis(batch.ctx_positions_UxL, ends_UxP, axis=1)
    return _take(hidden_UxLxD, ends_UxP)


def similarity_space(vectors: jax.Array, config: Config) -> jax.Array:
    """Hidden states [..., D] -> float32 vectors that are compared by dot product."""
    vectors = vectors.astype(jnp.float32)
    if config.loss.normalize:
        vectors /= jnp.sqrt(jnp.sum(vectors**2, axis=-1, keepdims=True) + 1e-12)
    return vectors


def _take(hidden_BxTxD: jax.Array, positions_BxR: jax.Array) -> jax.Array:
    at_BxRxD = jnp.take_along_axis(hidden_BxTxD, positions_BxR[..., None], axis=1)
    return constrain(at_BxRxD, "batch", None, None)
