"""Nested settings by their dotted keys: `a.b` is `config.a.b`, or `config["a"]["b"]`."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def leaves(group: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of a nested dict, with their values."""
    for name, value in group.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def differing(was: Mapping, now: Mapping) -> dict[str, tuple[Any, Any]]:
    """The dotted keys that two nested dicts share, with both values where they are unlike."""
    before = dict(leaves(was))
    return {k: (before[k], value) for k, value in leaves(now) if before.get(k, value) != value}


def get_dotted(config: Any, dotted: str) -> Any:
    """`config.a.b` for dotted = "a.b"."""
    for name in dotted.split("."):
        config = getattr(config, name)
    return config


def replace_dotted(config: T, dotted: str, value: Any) -> T:
    """A copy of a frozen config with one dotted key changed."""
    head, _, rest = dotted.partition(".")
    if rest:
        value = replace_dotted(getattr(config, head), rest, value)
    return dataclasses.replace(config, **{head: value})
