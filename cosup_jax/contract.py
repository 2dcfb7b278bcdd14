"""The embedding contract: what must agree for two vectors to be comparable.

Checkpoints, indexes and exports carry it; a mismatch is refused, never worked around.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
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
    """SHA-256 over path, dtype, shape and bytes of every leaf, in order of path.

    Does not depend on the mesh. One leaf at a time is gathered on the host; in a run of several
    processes all must call.
    """
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    digest = hashlib.sha256()
    for name in sorted(leaves):
        array = np.ascontiguousarray(on_host(leaves[name]))
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.view(np.uint8).data if array.ndim else array.tobytes())
    return digest.hexdigest()


def on_host(leaf: Any) -> np.ndarray:
    """The whole array; in a run of several processes all must call."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)
