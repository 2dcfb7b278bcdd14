"""From config to towers: whose shape counts, and which towers cannot be compared."""

import pytest
from batches import config

from cosup_jax import assemble
from cosup_jax.errors import UserError


def test_a_ctx_that_starts_as_gen_has_its_shape():
    """Bug: Ctx keeps the default shape, or loses its own numerics."""
    found = assemble.resolve(config(gen__arch__width=64, ctx__arch__dtype="bfloat16"))
    assert found.ctx.arch.width == 64 and found.ctx.arch.dtype == "bfloat16"


def test_unlike_widths_are_refused():
    """Bug: vectors that no dot product can compare, told by a shape error in the step."""
    keys = {"ctx__init": "scratch", "gen__arch__width": 64, "ctx__arch__width": 32}
    with pytest.raises(UserError, match=r"gen\.arch\.width=64 and config\.ctx\.arch\.width=32"):
        assemble.resolve(config(**keys))


def test_a_batch_that_does_not_split_is_refused():
    """Bug: an uneven batch, told by a sharding error after compilation."""
    with pytest.raises(UserError, match=r"ctx_rows=12 is no multiple of 8 .* try 16"):
        assemble.mesh_for(config(data__ctx_rows=12))
