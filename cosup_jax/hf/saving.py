"""Our parameter tree -> a directory of config.json and safetensors that transformers reads."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict

from cosup_jax.config import ArchConfig
from cosup_jax.contract import on_host
from cosup_jax.hf.configs import config_json
from cosup_jax.hf.names import LAYOUTS, Layout, Tensor, axes, layers_of, unfrozen

FILE_BYTES = 2 * 2**30  # of a file; one is in memory at a time


def save(
    directory: Path,
    params: Mapping,
    arch: ArchConfig,
    vocab_size: int,
    has_head: bool,
    dtype: str = "float32",
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json and safetensors that transformers' own classes load.

    In a run of several processes all must call; the first one writes.

    Args:
      directory: is there, and empty.
      params: one tower, adapters merged.
      vocab_size: rows that are written; the padding behind them is not.
      has_head: written as a causal LM; otherwise as the bare model.
      dtype: of the file: float32 | bfloat16 | float16.
      settings: more keys of config.json, such as token ids.
    """
    layout, kind = LAYOUTS[arch.family], jax.numpy.dtype(dtype)
    leaves = flatten_dict(dict(params), sep="/")
    prefix = layout.body if has_head else ""
    pieces = _pieces(layout, leaves)
    files = _split(list(pieces), pieces, kind.itemsize)
    where, total = {}, 0
    for number, names in enumerate(files, start=1):
        tensors = {}
        for name in names:
            array = _assemble(pieces[name], vocab_size).astype(kind)
            tensors[name if name == layout.head else prefix + name] = np.ascontiguousarray(array)
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        file = "model.safetensors" if len(files) == 1 else file
        where |= dict.fromkeys(tensors, file)
        total += sum(array.nbytes for array in tensors.values())
        if jax.process_index() == 0:
            safetensors.numpy.save_file(tensors, directory / file, metadata={"format": "pt"})
    if jax.process_index() != 0:
        return
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = config_json(arch, vocab_size, has_head) | {"dtype": dtype} | dict(settings or {})
    (directory / "config.json").write_text(json.dumps(config, indent=2))


class _Piece(NamedTuple):
    """What one of our leaves gives to a tensor of the file."""

    leaf: jax.Array
    layer: int | None  # of a stacked leaf
    tensor: Tensor


def _pieces(layout: Layout, leaves: Mapping[str, Any]) -> dict[str, list[_Piece]]:
    """For each tensor of the file the leaves it is made of, layer by layer."""
    found = {}
    for name, leaf in leaves.items():
        tensor, layers = layout.table[unfrozen(name)], layers_of(name, leaves)
        for i, layer in enumerate(layers or (0,)):
            stored = tensor.name.format(layer)
            piece = _Piece(leaf, i if layers else None, tensor)
            found.setdefault((layer if layers else -1, stored), []).append(piece)
    return {stored: found[layer, stored] for layer, stored in sorted(found)}


def _split(names: list[str], pieces: Mapping[str, list[_Piece]], itemsize: int) -> list[list[str]]:
    """Names for each file, FILE_BYTES at most unless one tensor is larger."""
    files, filled = [[]], 0
    for name in names:
        size = sum(math.prod(p.leaf.shape[p.layer is not None :]) * itemsize for p in pieces[name])
        if files[-1] and filled + size > FILE_BYTES:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return files


def _assemble(pieces: list[_Piece], vocab_size: int) -> np.ndarray:
    """One tensor of the file, in its own axes, the vocabulary without its padding."""
    arrays = {}
    for leaf, layer, tensor in pieces:
        ours = on_host(leaf if layer is None else leaf[layer])
        letters = tensor.theirs.replace(" ", "").replace("#", "")
        arrays[tensor.part] = ours.transpose(axes(tensor.ours, letters))
    groups = tensor.theirs.split()
    if "#" in tensor.theirs:
        axis = tensor.theirs.replace(" ", "").index("#")
        array = np.stack([arrays[part] for part in range(3)], axis=axis)
    else:
        array = arrays[tensor.part]
    ends = np.cumsum([len(group) for group in groups])
    shape = [math.prod(array.shape[e - len(g) : e]) for g, e in zip(groups, ends, strict=True)]
    array = array.reshape(shape)
    return array[:vocab_size] if groups[0] == "V" else array
