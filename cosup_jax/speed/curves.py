"""How the step's time grows with each of its sizes: a few sizes, a slope."""

import math
from collections.abc import Iterator

import jax
import numpy as np

from cosup_jax import assemble
from cosup_jax.config import Config
from cosup_jax.dotted import replace_dotted
from cosup_jax.errors import UserError
from cosup_jax.rehearsal import Rehearsal
from cosup_jax.speed.clock import Figure

STEPS = 3  # of which the fastest counts
_GROWS = {  # by 1, 2 and 4: the config keys, and what the first size is as a share of the config's
    "batch": (("batch_size", "data.ctx_rows"), 0.5),
    "sequence": (("data.max_gen_tokens", "data.ctx_row_tokens"), 0.5),
    "candidates": (("data.ctx_rows",), 1.0),
    "vocabulary": (("data.vocab_size",), 0.5),
    "bank": (("bank.size",), 1.0),
}
CURVES = (*_GROWS, "devices")


def curves(names: list[str], config: Config) -> Iterator[Figure]:
    """Of each name in turn, the exponent of the size that the step's time grows by: 1 is in
    proportion, 0 not at all. Random data."""
    for name in names:
        points = list(_devices(config) if name == "devices" else _sizes(name, config))
        if len(points) < 2:
            yield Figure(name, math.nan, "slope", "one size only: nothing to compare")
            continue
        sizes, seconds = np.log(points).T
        listed = ", ".join(f"{size:,}: {second:.3g} s" for size, second in points)
        yield Figure(name, float(np.polyfit(sizes, seconds, 1)[0]), "slope", listed)


def check(text: str) -> list[str]:
    """The names in a flag's text, or all. Raises UserError for what is none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        return list(CURVES)
    for name in names:
        if name not in CURVES:
            raise UserError(f"--curves={name} is none of {', '.join(CURVES)}, or all")
    return names


def _sizes(name: str, config: Config) -> Iterator[tuple[int, float]]:
    keys, first = _GROWS[name]
    if name == "bank" and config.bank.kind == "off":
        config = replace_dotted(config, "bank.kind", "passage")
    for factor in (first, 2 * first, 4 * first):
        grown = config
        for key in keys:
            grown = replace_dotted(grown, key, int(factor * _at(config, key)))
        yield _at(grown, keys[0]), _seconds(grown, jax.devices())


def _devices(config: Config) -> Iterator[tuple[int, float]]:
    count = 1
    while count <= jax.device_count():
        yield count, _seconds(config, jax.devices()[:count])
        count *= 2


def _seconds(config: Config, devices: list[jax.Device]) -> float:
    """Of a step. Raises UserError if it does not fit."""
    config = assemble.resolve(config, shape_only=True)
    job = Rehearsal(config, assemble.mesh_for(config, devices))
    compiled, problem = job.compile()
    if compiled is None:
        raise UserError(f"--curves: a step does not fit: {problem}; name fewer curves")
    return job.run(compiled, STEPS)["clock_s"]


def _at(config: Config, key: str) -> int:
    for name in key.split("."):
        config = getattr(config, name)
    return config
