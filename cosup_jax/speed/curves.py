"""How the step's time grows with each of its sizes: a few sizes, a slope; what banks and
micro-batches add to it."""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from cosup_jax import assemble, bank
from cosup_jax.config import Config
from cosup_jax.data.batch import batch_shape
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
_DUAL = {"bank.kind": "dual", "bank.queries": 4096}
_ADDED = {
    "added: passage bank of 65,536": {"bank.kind": "passage", "bank.size": 65_536},
    "added: dual bank, 4,096 x 4,096": _DUAL | {"bank.size": 4096},
    "added: dual bank, 4,096 x 65,536": _DUAL | {"bank.size": 65_536},
    "added: 2 micro-batches": {"micro_batches": 2},
    "added: 4 micro-batches": {"micro_batches": 4},
}
CURVES = (*_GROWS, "devices", "added")


class _Point(NamedTuple):
    size: int
    config: Config
    devices: list[jax.Device]


def curves(names: list[str], config: Config) -> Iterator[Figure]:
    """Of each name in turn, the exponent of the size that the step's time grows by: 1 is in
    proportion, 0 not at all; of "added", what comes to the time. Random data."""
    for name in names:
        if name == "added":
            yield from _added(config)
            continue
        points = [(point.size, _seconds(point, "clock_s")) for point in _points(name, config)]
        if len(points) < 2:
            yield Figure(name, math.nan, "slope", "one size only: nothing to compare")
            continue
        sizes, seconds = np.log(points).T
        listed = ", ".join(f"{size:,}: {second:.3g} s" for size, second in points)
        yield Figure(name, float(np.polyfit(sizes, seconds, 1)[0]), "slope", listed)


def check(text: str, config: Config) -> list[str]:
    """The names in a flag's text, or all. Raises UserError for what is none, and for a size that
    the mesh does not split or that has no room for a step."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    names = list(CURVES) if names == ["all"] else names
    for name in names:
        if name not in CURVES:
            raise UserError(f"--curves={name} is none of {', '.join(CURVES)}, or all")
        for size, grown, devices in _points(name, config):
            try:
                assemble.mesh_for(grown, devices)
                jax.eval_shape(lambda c=grown: bank.init(c.bank, batch_shape(c), 1))
            except UserError as error:
                raise UserError(f"--curves: {name} at {size:,}: {error}") from error
    return names


def _points(name: str, config: Config) -> Iterator[_Point]:
    """What is measured under a name."""
    devices = jax.devices()
    if name == "devices":
        counts = (2**n for n in range(len(devices).bit_length()))
        yield from (_Point(count, config, devices[:count]) for count in counts)
    elif name == "added":
        for number, keys in enumerate(({}, *_ADDED.values())):
            yield _Point(number, _replaced(_plain(config), keys), devices)
    else:
        keys, first = _GROWS[name]
        if name == "bank" and config.bank.kind == "off":
            config = replace_dotted(config, "bank.kind", "passage")
        for factor in (first, 2 * first, 4 * first):
            grown = _replaced(config, {key: int(factor * _at(config, key)) for key in keys})
            yield _Point(_at(grown, keys[0]), grown, devices)


def _added(config: Config) -> Iterator[Figure]:
    """Beside a step without a bank, in one piece. On a CPU in seconds of its cores."""
    plain, *others = _points("added", config)
    plain_s = _seconds(plain, "step_s")
    for what, point in zip(_ADDED, others, strict=True):
        taken_s = _seconds(point, "step_s")
        more = f"{taken_s:.3g} s for {plain_s:.3g}"
        yield Figure(what, 100 * (taken_s / plain_s - 1), "% of a step", more)


def _plain(config: Config) -> Config:
    off = dataclasses.replace(config.bank, kind="off")
    return dataclasses.replace(config, bank=off, micro_batches=1)


def _seconds(point: _Point, which: str) -> float:
    """Of a step. Raises UserError if it does not fit."""
    config = assemble.resolve(point.config, shape_only=True)
    job = Rehearsal(config, assemble.mesh_for(config, point.devices))
    compiled, problem = job.compile()
    if compiled is None:
        raise UserError(f"--curves: a step does not fit: {problem}; name fewer curves")
    return job.run(compiled, STEPS)[which]


def _replaced(config: Config, keys: dict) -> Config:
    for key, value in keys.items():
        config = replace_dotted(config, key, value)
    return config


def _at(config: Config, key: str) -> int:
    for name in key.split("."):
        config = getattr(config, name)
    return config
