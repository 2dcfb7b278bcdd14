"""Pretrained weights, in a directory of safetensors, on the hub or in a GGUF file -> our tree."""

import collections
import fnmatch
import functools
import json
import math
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import tqdm
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import constants, snapshot_download

from cosup_jax.errors import UserError
from cosup_jax.hf import sentence
from cosup_jax.hf.configs import arch_fields
from cosup_jax.hf.gguf import GgufFile
from cosup_jax.hf.names import HEAD, LAYOUTS, TABLE, Layout, Tensor, axes, layers_of, unfrozen
from cosup_jax.runtime.paths import expanded, inside

CONNECT_S = 5  # seconds until the hub counts as out of reach
NEW_ROW_NOISE = 0.02  # noise of a new vocabulary row, in standard deviations of the old ones
FLOATS = ("F64", "F32", "F16", "BF16")  # types of safetensors that are weights as they stand
AT_ONCE_BYTES = 2**26  # of a shard that is placed whole; of a larger one a layer at a time
_CHUNK_ROWS = 8192  # rows of the embedding read at a time for its statistics


def resolve(source: str | Path, shape_only: bool = False) -> Path:
    """A directory or .gguf file as it is; a hub id downloaded, or from the cache if that is silent.

    `shape_only` downloads no weights. Raises UserError in seconds if there is neither.
    """
    path = expanded(source)
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return path
    if path.is_absolute() or path.suffix == ".gguf" or str(source).startswith((".", "~")):
        raise UserError(f"model {str(source)!r}: no such directory or file; check the path")
    offline = _offline()
    wanted = ["config.json", *sentence.FILES]
    if not shape_only:
        wanted += ["*.safetensors", "*.safetensors.index.json"]
    try:
        found = snapshot_download(
            str(source),
            allow_patterns=wanted,
            ignore_patterns="consolidated*",  # Mistral's own layout: the same weights once more
            local_files_only=offline,
        )
    except (OSError, ValueError) as error:
        where = f"{constants.ENDPOINT} is out of reach" if offline else _line(error)
        raise UserError(
            f"model {str(source)!r}: no such directory, and not to be had from the hub ({where}); "
            "give a directory or check name and network"
        ) from error
    return Path(found)


def arch_from_hf(path: str | Path) -> dict[str, Any]:
    """The ArchConfig fields that weights determine, and `vocab_size`.

    Raises UserError, naming the key, for what our transformer does not compute.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return arch_fields(GgufFile(path).config, path)
    return arch_fields(_read_json(path / "config.json"), path / "config.json")


def load_gen(
    path: str | Path, abstract: Mapping, old_vocab: int | None = None, seed: int = 0
) -> dict:
    """Gen's parameters, each tensor read straight onto its shards.

    Args:
      path: a directory with config.json and safetensors, in one file or in several with an index;
        or a .gguf file.
      abstract: our tree of jax.ShapeDtypeStruct with shardings; dtypes are cast to it. Adapters
        and a projection, which no file has, are left out of the result.
      old_vocab: rows that the pretrained tokenizer knew; later ones, which belong to added tokens
        and padding, start at the mean of the old ones plus small noise, whatever the file's own
        padding holds. Default: the file's rows.
      seed: of that noise.

    Raises:
      UserError: a tensor is missing, unknown to us, or of another shape; its name is given.
    """
    return _load(Path(path), abstract, old_vocab, seed, needs_head=True)


def load_ctx(
    path: str | Path, abstract: Mapping, old_vocab: int | None = None, seed: int = 0
) -> dict:
    """Ctx's parameters, as `load_gen`; an output head or a pooler in the file is left out."""
    return _load(Path(path), abstract, old_vocab, seed, needs_head=False)


def _load(path: Path, abstract: Mapping, old_vocab: int | None, seed: int, needs_head: bool):
    fields = arch_from_hf(path)
    layout, tied = LAYOUTS[fields["family"]], fields["tie_embeddings"]
    files = GgufFile(path) if path.suffix == ".gguf" else _Files(path, layout.body)
    leaves = {
        name: leaf
        for name, leaf in flatten_dict(dict(abstract), sep="/").items()
        if name != "projection" and "_lora_" not in name
    }
    if needs_head and not tied and HEAD not in leaves:
        raise UserError(
            f"{path} has an output head of its own, the model ties it to the embedding; set "
            "config.gen.arch.tie_embeddings=false"
        )
    table = {name: layout.table.get(unfrozen(name)) for name in leaves}
    foreign = [name for name, tensor in table.items() if tensor is None]
    if foreign:
        raise UserError(
            f"weights {path} are of a {fields['family']} model, which has no {foreign[0]}; take "
            "config.*.arch from these weights"
        )
    if tied and HEAD in leaves and layout.head not in files.names:
        table[HEAD] = table[HEAD]._replace(name=layout.table[TABLE].name)
    _check_names(path, files.names, table, leaves, layout)
    arrays = {}
    for name, leaf in tqdm.tqdm(leaves.items(), f"reading {path.name}", leave=False, disable=None):
        layers = layers_of(name, leaves)
        arrays[name] = _read_leaf(path, files, name, table[name], leaf, layers, old_vocab, seed)
    return unflatten_dict(arrays, sep="/")


class _Files:
    """The tensors of a directory by name, the body's prefix taken off; mapped, not read."""

    def __init__(self, directory: Path, body: str):
        self.directory = directory
        self._opened: dict[str, Any] = {}
        index = directory / "model.safetensors.index.json"
        if index.exists():
            stored = _weight_map(index)
        else:
            stored = dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")
        self._where = {name.removeprefix(body): (name, file) for name, file in stored.items()}
        self.names = frozenset(self._where)

    def tensor(self, name: str) -> Any:
        """A slice object: `[...]` reads that part alone."""
        stored, file = self._where[name]
        opened = self._open(file)
        if stored not in opened.keys():  # noqa: SIM118, a safetensors handle is no mapping
            raise UserError(
                f"{self.directory / file}: tensor {stored} is missing, the index has it"
            )
        found = opened.get_slice(stored)
        if (kind := found.get_dtype()) not in FLOATS:
            raise UserError(
                f"{self.directory / file}: tensor {stored} has values of type {kind}, not one of "
                f"{', '.join(FLOATS)}; take weights that are not quantised"
            )
        return found

    def _open(self, file: str) -> Any:
        if file not in self._opened:
            path = inside(self.directory, file)
            try:
                self._opened[file] = safetensors.safe_open(path, framework="np")
            except (OSError, safetensors.SafetensorError) as error:
                raise UserError(
                    f"weights {path} cannot be read ({_line(error)}); only safetensors are read, "
                    "and whole ones"
                ) from error
        return self._opened[file]


def _weight_map(index: Path) -> dict[str, str]:
    found = _read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise UserError(f"{index}: weight_map does not say where tensors lie; get the file anew")
    return found


def _check_names(path: Path, names, table: Mapping[str, Tensor], leaves, layout: Layout) -> None:
    expected = set()
    for name, tensor in table.items():
        expected |= {tensor.name.format(layer) for layer in layers_of(name, leaves) or (0,)}
    missing = sorted(expected - names)
    unknown = [
        name
        for name in sorted(names - expected)
        if name != layout.head
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in layout.ignored)
    ]
    for found, problem in ((missing, "is missing"), (unknown, "is unknown to this model")):
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise UserError(
                f"weights in {path}: tensor {found[0]} {problem}{more}; check that "
                "config.*.arch describes these weights"
            )


def _read_leaf(path, files, name: str, tensor: Tensor, leaf, layers, old_vocab, seed) -> jax.Array:
    stacked = layers is not None
    sizes = dict(zip(tensor.ours, leaf.shape[stacked:], strict=True)) | {"#": 3}
    named = [tensor.name.format(layer) for layer in layers or (0,)]
    found = [files.tensor(stored) for stored in named]
    for stored, there in zip(named, found, strict=True):
        _check_shape(path, stored, tensor, list(there.get_shape()), sizes, old_vocab)
    grown = _new_rows(found[0], sizes["V"], old_vocab, name, seed) if "V" in sizes else None

    def read(*ranges: range) -> np.ndarray:
        out = np.empty([len(r) for r in ranges], leaf.dtype)
        where = dict(zip(tensor.ours, ranges[stacked:], strict=True))
        for i, layer in enumerate(ranges[0] if stacked else range(1)):
            out[i if stacked else ...] = _read_part(found[layer], tensor, sizes, where, grown)
        return out

    holders = collections.defaultdict(list)  # devices with the same shard share one read
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        ranges = tuple(range(*s.indices(n)) for s, n in zip(index, leaf.shape, strict=True))
        holders[ranges].append(device)
    placed = []
    for ranges, devices in holders.items():  # one shard on the host at a time
        small = math.prod(map(len, ranges)) * leaf.dtype.itemsize <= AT_ONCE_BYTES
        place = _at_once if small or not stacked else _by_layer
        placed += place(read, ranges, devices)
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, placed)


def _at_once(read: Callable, ranges: tuple[range, ...], devices: list) -> list[jax.Array]:
    array = read(*ranges)
    return jax.block_until_ready([jax.device_put(array, device) for device in devices])


def _by_layer(read: Callable, ranges: tuple[range, ...], devices: list) -> list[jax.Array]:
    """A stacked shard with one layer of it on the host, where a GPU's runtime keeps a copy of all
    that is on its way."""
    layers, *rest = ranges
    for i, layer in enumerate(layers):
        one = read(range(layer, layer + 1), *rest)
        if i == 0:
            shape = (len(layers), *one.shape[1:])
            placed = [jnp.zeros(shape, one.dtype, device=device) for device in devices]
        each = zip(placed, devices, strict=True)
        placed = [_fill(array, jax.device_put(one, device), i) for array, device in each]
        jax.block_until_ready(placed)
    return placed


@functools.partial(jax.jit, donate_argnums=0)
def _fill(array: jax.Array, one: jax.Array, i: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array, one, i, axis=0)


def _read_part(found, tensor: Tensor, sizes, where: Mapping[str, range], grown=None) -> np.ndarray:
    """Part `where` of one tensor, letter by letter, in our axes; only that part is read."""
    if grown is not None and where["V"].stop > grown.known:
        return _grown_part(found, tensor, sizes, where, grown)
    where = {**where, "#": range(tensor.part, tensor.part + 1)}
    cut, shape, within = [], [], []
    for outer, *inner in tensor.theirs.split():
        step = math.prod(sizes[letter] for letter in inner)
        cut.append(slice(where[outer].start * step, where[outer].stop * step))
        shape += [len(where[outer]), *(sizes[letter] for letter in inner)]
        within += [slice(None), *(slice(where[i].start, where[i].stop) for i in inner)]
    part = found[tuple(cut)].reshape(shape)[tuple(within)]
    letters = tensor.theirs.replace(" ", "")
    if "#" not in letters:
        return part.transpose(axes(letters, tensor.ours))
    return part.transpose(axes(letters, "#" + tensor.ours))[0]


class _NewRows(NamedTuple):
    known: int  # rows taken from the file; rows_RxD stand for those after them
    rows_RxD: np.ndarray


def _new_rows(found, vocab: int, old_vocab: int | None, name: str, seed: int) -> _NewRows | None:
    """Rows for the entries that the pretrained tokenizer did not know."""
    rows, width = found.get_shape()
    known = _known_rows(rows, old_vocab)
    if known >= vocab:
        return None
    total_D, squares_D = np.zeros(width), np.zeros(width)
    for start in range(0, known, _CHUNK_ROWS):
        chunk = found[start : min(start + _CHUNK_ROWS, known)].astype(np.float64)
        total_D += chunk.sum(axis=0)
        squares_D += (chunk**2).sum(axis=0)
    mean_D = total_D / known
    spread_D = np.sqrt(np.maximum(squares_D / known - mean_D**2, 0.0))
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    noise_RxD = rng.standard_normal((vocab - known, width)) * (NEW_ROW_NOISE * spread_D)
    return _NewRows(known, (mean_D + noise_RxD).astype(np.float32))


def _known_rows(rows: int, old_vocab: int | None) -> int:
    """Of the file's rows those that are read; after them comes its padding, if it has any."""
    return min(rows, old_vocab or rows)


def _grown_part(found, tensor: Tensor, sizes, where, grown: _NewRows) -> np.ndarray:
    rows, columns, known = where["V"], where["D"], grown.known
    new = slice(max(rows.start, known) - known, rows.stop - known)
    part = grown.rows_RxD[new, columns.start : columns.stop]
    part = part.transpose(axes("VD", tensor.ours))
    if rows.start >= known:
        return part
    old = _read_part(found, tensor, sizes, {**where, "V": range(rows.start, known)})
    return np.concatenate((old.astype(part.dtype), part), axis=tensor.ours.index("V"))


def _check_shape(path: Path, name: str, tensor: Tensor, found, sizes, old_vocab) -> None:
    expected = [math.prod(sizes[letter] for letter in g) for g in tensor.theirs.split()]
    rows_fit = found[1:] == expected[1:] and "V" in sizes
    rows_fit = rows_fit and 0 < _known_rows(found[0], old_vocab) <= expected[0]
    if found != expected and not rows_fit:
        raise UserError(
            f"weights in {path}: tensor {name} is {list(found)}, the model expects "
            f"{expected}; take config.*.arch and the vocabulary from these weights"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({_line(error)}); give a model directory"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is no JSON object; give a model directory")
    return found


def _offline() -> bool:
    """Answers in seconds, where the hub client would retry for most of a minute."""
    if constants.HF_HUB_OFFLINE:
        return True
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=CONNECT_S).close()
    except urllib.error.HTTPError:
        return False  # an answer, whatever it says
    except OSError:
        return True
    return False


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
