"""A step in slices, one after the other, so that activations of one slice exist at a time.

Vectors of all slices meet in one contrastive loss afterwards, so every negative is kept and the
gradient is that of the whole batch: GradCache's effect (arXiv 2101.06983) by scan and checkpoint.
"""

from collections.abc import Callable
from typing import Any

import jax

from cosup_jax.data.batch import Batch
from cosup_jax.sharding import constrain


def in_parts(part: Callable[[Batch], Any], batch: Batch, micro_batches: int) -> Any:
    """`part` over row slices of the batch, recomputed in the backward pass.

    Scalars of `part` come back as one value a slice, rows in their old order. Rows are dealt out
    so that every slice takes an equal share of every device's rows.
    """
    if micro_batches == 1:
        return part(batch)
    deal = lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1)
    collect = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]) if x.ndim > 1 else x

    def body(_, rows):
        rows = jax.tree.map(lambda x: constrain(x, "batch", *[None] * (x.ndim - 1)), rows)
        return None, jax.checkpoint(part)(rows)

    _, outputs = jax.lax.scan(body, None, jax.tree.map(deal, batch))
    return jax.tree.map(collect, outputs)
