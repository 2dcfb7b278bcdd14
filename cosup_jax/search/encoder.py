"""Passages -> vectors, on the mesh, in the very layout that training uses."""

from collections.abc import Iterable
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from cosup_jax import sharding
from cosup_jax.config import Config
from cosup_jax.data.pipeline import PackedPassages
from cosup_jax.runtime.notices import safepoint
from cosup_jax.towers import Towers, passage_vectors

T = TypeVar("T")


def to_mesh(batch: T, mesh: Mesh) -> T:
    """A tree of arrays that every process holds whole, its rows split over the mesh."""
    place = sharding.rows(mesh)
    put = lambda x: jax.make_array_from_callback(x.shape, place, lambda index: x[index])
    return jax.tree.map(put, batch)


class Encoder:
    """Compiled once; parameters are arguments."""

    def __init__(self, mesh: Mesh, towers: Towers, config: Config):
        self._mesh, self._width = mesh, towers.gen.width
        self.dtype = towers.ctx.arch.dtype  # in which it computes
        self._vectors = jax.jit(
            lambda params, batch: passage_vectors(towers.ctx_params(params), batch, towers, config),
            out_shardings=sharding.replicated(mesh),
        )

    def corpus(self, params: dict, packed: Iterable[PackedPassages], count: int) -> np.ndarray:
        """[N, D] float32 vectors of all passages.

        Args:
          params: of the train state.
          packed: Ctx rows that hold every passage once.
          count: N.
        """
        vector_NxD = np.zeros((count, self._width), np.float32)
        for rows in packed:
            safepoint()
            with jax.set_mesh(self._mesh):
                vector_UxPxD = np.asarray(self._vectors(params, to_mesh(rows, self._mesh)))
            valid_UxP = rows.passage_valid_UxP
            vector_NxD[rows.index_UxP[valid_UxP]] = vector_UxPxD[valid_UxP]
        return vector_NxD
