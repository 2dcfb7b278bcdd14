"""From what --config names, and the overrides of its keys, to a frozen config."""

import json
import os
import runpy
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from cosup_jax.config import Config, make, set_dotted, to_dict, unknown_key
from cosup_jax.dotted import differing, leaves
from cosup_jax.errors import UserError
from cosup_jax.freeze import freeze


class File(NamedTuple):
    """A config file with variants, and the command line's overrides of each."""

    path_and_variant: str
    overrides: Mapping[str, str]

    @property
    def name(self) -> str:
        """That of the file and of its own variant: `core`, `core-small`."""
        path, _, variant = self.path_and_variant.partition(":")
        return "-".join(filter(None, [Path(path).stem, variant.replace("+", "-")]))

    def of(self, variant: str) -> str:
        """FILE.py:VARIANT, behind the file's own variant."""
        path, _, own = self.path_and_variant.partition(":")
        return f"{path}:{'+'.join(filter(None, [own, variant]))}"

    def variant(self, name: str) -> Config:
        """The config of a variant. Raises UserError."""
        return frozen(self.of(name), self.overrides)

    def settings(self, name: str) -> dict[str, Any]:
        """{"a.b": value} where a variant is not as the file itself, whatever the overrides."""
        base, own = (load(path).to_dict() for path in (self.path_and_variant, self.of(name)))
        return {key: value for key, (_, value) in differing(base, own).items()}


def frozen(path_and_variant: str, overrides: Mapping[str, str]) -> Config:
    """Loads, overrides and checks. Raises UserError."""
    return freeze(resolve(path_and_variant, overrides), frozenset(overrides))


def resolve(path_and_variant: str, overrides: Mapping[str, str]) -> ml_collections.ConfigDict:
    """Loads the file and sets dotted keys to what their texts say. Raises UserError."""
    config = load(path_and_variant)
    defaults = dict(leaves(to_dict(Config())))
    for key, text in overrides.items():
        if key not in defaults:
            raise unknown_key(key)
        set_dotted(config, key, _parse(key, text, type(defaults[key])))
    return config


def load(path_and_variant: str) -> ml_collections.ConfigDict:
    """`FILE.py[:VARIANT]` -> what its `get_config(VARIANT)` returns; or a run's config.json.

    Raises UserError, naming file and line, for whatever goes wrong inside the file too.
    """
    path, _, variant = path_and_variant.partition(":")
    if "://" in path_and_variant:
        raise UserError(f"--config={path_and_variant} must be a local file: copy it here")
    if not os.path.isfile(path):
        raise UserError(f"config file {path!r} does not exist (from {os.getcwd()})")
    try:
        if path.endswith(".json"):
            return _of_a_run(Path(path).read_bytes(), variant)
        module = runpy.run_path(path)
        if "get_config" not in module:
            raise UserError("defines no get_config(variant='')")
        config = module["get_config"](variant) if variant else module["get_config"]()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (Exception, SystemExit) as error:  # the file is the user's: it may raise anything
        frames = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else (frames or [1])[-1]
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"{path}: get_config() must return what cosup_jax.config.make builds")
    return config


def _of_a_run(text: bytes, variant: str) -> ml_collections.ConfigDict:
    """What `to_dict` gave; keys that were unknown when it was written have their defaults."""
    if variant:
        raise UserError(f"has no variants, {variant!r} neither")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"is no JSON ({error}); restore it, or give the run's FILE.py") from error
    if not isinstance(found, dict):
        raise UserError("must hold an object, as the config.json of a workdir does")
    return make(dict(leaves(found)), {})


def _parse(key: str, text: str, kind: type) -> Any:
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise UserError(f"--config.{key}={text} must be {wanted}") from None
