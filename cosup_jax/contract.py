"""The embedding contract: what must agree for two vectors to be comparable.

Checkpoints, indexes and exports carry it; a mismatch is refused, never worked around.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from cosup_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class EmbeddingContract:
    """Everything a passage vector or a query vector depends on."""

    pooling: str  # how Ctx's states become one vector, as config.ctx.pooling
    prompt: str  # text before every passage
    normalize: bool  # vectors have length 1
    temperature: float  # scores are divided by it
    template: str  # version of the text around question and passage
    ret: int  # token ids
    cs: int
    ce: int
    emb: int
    pad: int
    eos: int
    max_ctx_tokens: int  # tokens of a passage that Ctx reads
    width: int  # features of a vector
    tokenizer: str  # fingerprint
    weights: str  # `weights_digest` of both towers

    def to_dict(self) -> dict[str, Any]:
        """As JSON stores it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any], what: str) -> "EmbeddingContract":
        """Reads what `to_dict` wrote. Raises UserError, naming `what`, for other fields."""
        names = {field.name for field in dataclasses.fields(cls)}
        for name in sorted(names ^ set(found)):
            problem = "lacks" if name in names else "has the unknown"
            raise UserError(f"{what}: its embedding contract {problem} field {name!r}; rebuild it")
        return cls(**found)


def check_match(expected: EmbeddingContract, found: EmbeddingContract, what: str) -> None:
    """Raises UserError that names the first field in which `what` differs."""
    for name, wanted in expected.to_dict().items():
        value = getattr(found, name)
        if value != wanted:
            raise UserError(
                f"{what} was made with {name}={value!r}, this model has {name}={wanted!r}; "
                "rebuild it with this model or use the model that it was made with"
            )


def weights_digest(params: Any) -> str:
    """SHA-256 over path, dtype, shape and checksum of every leaf, in order of path.

    The checksums are sums of integers over all elements, taken where the elements lie: no leaf is
    gathered, and neither the mesh nor the order of summation changes a bit. A leaf in which one
    element differs always has another checksum; one in which several differ has the same by chance
    once in 2^128. They are no defence against somebody who wants a collision. In a run of several
    processes all must call.
    """
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    names = sorted(leaves)
    sums = on_host(_checksums([_narrow(leaves[name]) for name in names]))
    digest = hashlib.sha256()
    for name, checksum in zip(names, sums, strict=True):
        leaf = leaves[name]
        digest.update(f"{name} {leaf.dtype} {leaf.shape} {checksum.tolist()}\n".encode())
    return digest.hexdigest()


_LANES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)  # odd, else arbitrary: one a checksum


@jax.jit
def _checksums(leaves: list[jax.Array]) -> jax.Array:
    """[leaves, 4] uint32: sums, modulo 2^32, of every element mixed with its position."""

    def checksum(words: jax.Array, lane: int) -> jax.Array:
        place = jnp.uint32(lane)
        for axis in range(words.ndim):
            along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
            place = _mixed(place + jnp.uint32(lane) * along)
        return jnp.sum(_mixed(words ^ place), dtype=jnp.uint32)

    return jnp.stack(
        [jnp.stack([checksum(x, lane) for lane in _LANES]) for x in map(_bits, leaves)]
    )


def _mixed(x: jax.Array) -> jax.Array:
    """A permutation of uint32 in which every bit depends on every bit (MurmurHash3's last step)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _bits(x: jax.Array) -> jax.Array:
    if x.dtype != bool:
        x = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}"))
    return x.astype(jnp.uint32)


def _narrow(leaf: Any) -> Any:
    """NumPy's 64-bit numbers as two of 32 bits, for jax would round them; others as they are."""
    if isinstance(leaf, np.ndarray) and leaf.dtype.itemsize > 4:
        return np.ascontiguousarray(leaf)[..., None].view(np.uint32)
    return leaf


def on_host(leaf: Any) -> np.ndarray:
    """The whole array; in a run of several processes all must call."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)
