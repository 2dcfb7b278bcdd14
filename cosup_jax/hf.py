"""Llama-family weights between Hugging Face directories and our parameter tree, without torch.

Letters: N layers, D width, H query heads, G kv heads, E head_dim, F mlp width, V vocabulary.
"""

import json
import urllib.error
import urllib.request
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
from huggingface_hub import constants, snapshot_download

from cosup_jax.errors import UserError

CONNECT_S = 5  # seconds until the hub counts as out of reach
NEW_ROW_NOISE = 0.02  # noise of a new vocabulary row, in standard deviations of the old ones
_CHUNK_ROWS = 8192  # rows of the embedding read at a time for its statistics


class Tensor(NamedTuple):
    """Where one of our leaves lies in a file. Groups of letters are the axes of the file."""

    name: str  # without the "model." prefix; {} is the layer
    ours: str  # our axes, the layer axis aside
    theirs: str  # the file's axes: "HE D" is a matrix [H * E, D]


# Our leaf -> the file's tensor: the one table, read in either direction.
TABLE = {
    "embed/table": Tensor("embed_tokens.weight", "VD", "V D"),
    "blocks/attn_norm/scale": Tensor("layers.{}.input_layernorm.weight", "D", "D"),
    "blocks/attn/q": Tensor("layers.{}.self_attn.q_proj.weight", "DHE", "HE D"),
    "blocks/attn/k": Tensor("layers.{}.self_attn.k_proj.weight", "DGE", "GE D"),
    "blocks/attn/v": Tensor("layers.{}.self_attn.v_proj.weight", "DGE", "GE D"),
    "blocks/attn/o": Tensor("layers.{}.self_attn.o_proj.weight", "HED", "D HE"),
    "blocks/mlp_norm/scale": Tensor("layers.{}.post_attention_layernorm.weight", "D", "D"),
    "blocks/mlp/gate": Tensor("layers.{}.mlp.gate_proj.weight", "DF", "F D"),
    "blocks/mlp/up": Tensor("layers.{}.mlp.up_proj.weight", "DF", "F D"),
    "blocks/mlp/down": Tensor("layers.{}.mlp.down_proj.weight", "FD", "D F"),
    "final_norm/scale": Tensor("norm.weight", "D", "D"),
    "head/kernel": Tensor("lm_head.weight", "DV", "V D"),
}
_HEAD, _EMBED = TABLE["head/kernel"].name, TABLE["embed/table"].name


def resolve(source: str | Path) -> Path:
    """A directory as it is; a hub id downloaded, or from the local cache where the hub is silent.

    Raises UserError in seconds if there is neither.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or str(source).startswith((".", "~")):
        raise UserError(f"model {str(source)!r}: no such directory; check the path")
    offline = _offline()
    wanted = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        found = snapshot_download(str(source), allow_patterns=wanted, local_files_only=offline)
    except (OSError, ValueError) as error:
        where = f"{constants.ENDPOINT} is out of reach" if offline else _line(error)
        raise UserError(
            f"model {str(source)!r}: no such directory, and not to be had from the hub ({where}); "
            "give a directory or check name and network"
        ) from error
    return Path(found)


def arch_from_hf(directory: str | Path) -> dict[str, Any]:
    """The ArchConfig fields that weights determine, and `vocab_size`, from config.json.

    Raises UserError, naming the key, for what our transformer does not compute.
    """
    path = Path(directory) / "config.json"
    config = _read_json(path)
    _check_supported(path, config)
    try:
        width, heads = config["hidden_size"], config["num_attention_heads"]
        return {
            "layers": config["num_hidden_layers"],
            "width": width,
            "heads": heads,
            "kv_heads": config.get("num_key_value_heads") or heads,
            "head_dim": config.get("head_dim") or width // heads,
            "mlp_width": config["intermediate_size"],
            "rope_theta": float(_rope(config).get("rope_theta", 10000.0)),
            "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
            "tie_embeddings": config.get("tie_word_embeddings", False),
            "vocab_size": config["vocab_size"],
        }
    except KeyError as error:
        raise UserError(f"{path}: key {error} is missing; is this a Llama-family model?") from None


def load_gen(
    directory: str | Path, abstract: Mapping, old_vocab: int | None = None, seed: int = 0
) -> dict:
    """Gen's parameters, each tensor read straight onto its shards.

    Args:
      directory: with config.json and safetensors, in one file or in several with an index.
      abstract: our tree of jax.ShapeDtypeStruct with shardings; dtypes are cast to it.
      old_vocab: rows that the pretrained tokenizer knew; later ones, which belong to added tokens
        and padding, start at the mean of the old ones plus small noise, whatever the file's own
        padding holds. Default: the file's rows.
      seed: of that noise.

    Raises:
      UserError: a tensor is missing, unknown to us, or of another shape; its name is given.
    """
    return _load(Path(directory), abstract, old_vocab, seed, needs_head=True)


def load_ctx(
    directory: str | Path, abstract: Mapping, old_vocab: int | None = None, seed: int = 0
) -> dict:
    """Ctx's parameters, as `load_gen`; an output head in the file is left out."""
    return _load(Path(directory), abstract, old_vocab, seed, needs_head=False)


def _load(directory: Path, abstract: Mapping, old_vocab: int | None, seed: int, needs_head: bool):
    files = _Files(directory)
    tied = _read_json(directory / "config.json").get("tie_word_embeddings", False)
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    }
    if needs_head and not tied and "head/kernel" not in leaves:
        raise UserError(
            f"{directory} has an output head of its own, the model ties it to the embedding; set "
            "config.gen.arch.tie_embeddings=false"
        )
    table = {name: TABLE[name] for name in leaves}
    if tied and _HEAD not in files.names and "head/kernel" in leaves:
        table["head/kernel"] = table["head/kernel"]._replace(name=_EMBED)
    _check_names(files, table, leaves)
    arrays = [
        _read_leaf(files, name, table[name], leaf, old_vocab, seed) for name, leaf in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract), arrays)


class _Files:
    """The tensors of a directory by name, the "model." prefix taken off; mapped, not read."""

    def __init__(self, directory: Path):
        self.directory = directory
        index = directory / "model.safetensors.index.json"
        self._opened: dict[str, Any] = {}
        if index.exists():
            stored = _read_json(index).get("weight_map", {})
        else:
            stored = dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")
        self._where = {name.removeprefix("model."): (name, file) for name, file in stored.items()}
        self.names = frozenset(self._where)

    def tensor(self, name: str) -> Any:
        """A slice object: `[...]` reads that part alone."""
        stored, file = self._where[name]
        opened = self._open(file)
        if stored not in opened.keys():  # noqa: SIM118, a safetensors handle is no mapping
            raise UserError(
                f"{self.directory / file}: tensor {stored} is missing, the index has it"
            )
        return opened.get_slice(stored)

    def _open(self, file: str) -> Any:
        if file not in self._opened:
            path = self.directory / file
            try:
                self._opened[file] = safetensors.safe_open(path, framework="np")
            except (OSError, safetensors.SafetensorError) as error:
                raise UserError(
                    f"weights {path} cannot be read ({_line(error)}); only safetensors are read, "
                    "and whole ones"
                ) from error
        return self._opened[file]


def _check_names(files: _Files, table: Mapping[str, Tensor], leaves: Mapping[str, Any]) -> None:
    expected = set()
    for name, tensor in table.items():
        layers = leaves[name].shape[0] if "{}" in tensor.name else 1
        expected |= {tensor.name.format(layer) for layer in range(layers)}
    missing, unknown = sorted(expected - files.names), sorted(files.names - expected)
    unknown = [n for n in unknown if n != _HEAD and not n.endswith("rotary_emb.inv_freq")]
    for names, problem in ((missing, "is missing"), (unknown, "is unknown to this model")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(
                f"weights in {files.directory}: tensor {names[0]} {problem}{more}; check that "
                "config.*.arch describes these weights"
            )


def _read_leaf(files: _Files, name: str, tensor: Tensor, leaf, old_vocab, seed) -> jax.Array:
    stacked = "{}" in tensor.name
    sizes = dict(zip(tensor.ours, leaf.shape[stacked:], strict=True))
    layers = [
        files.tensor(tensor.name.format(layer)) for layer in range(leaf.shape[0] if stacked else 1)
    ]
    for layer, found in enumerate(layers):
        _check_shape(files, tensor.name.format(layer), tensor, found.get_shape(), sizes, old_vocab)
    grown = _new_rows(layers[0], sizes["V"], old_vocab, name, seed) if "V" in sizes else None
    parts: dict[tuple[range, ...], np.ndarray] = {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
        ranges = tuple(range(*s.indices(n)) for s, n in zip(index, leaf.shape, strict=True))
        if ranges not in parts:  # devices that hold the same shard share one read
            out = np.empty([len(r) for r in ranges], leaf.dtype)
            where = dict(zip(tensor.ours, ranges[stacked:], strict=True))
            for i, layer in enumerate(ranges[0] if stacked else range(1)):
                out[i if stacked else ...] = _read_part(layers[layer], tensor, sizes, where, grown)
            parts[ranges] = out
        return parts[ranges]

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)


def _read_part(found, tensor: Tensor, sizes, where: Mapping[str, range], grown=None) -> np.ndarray:
    """Part `where` of one tensor, letter by letter, in our axes; only that part is read."""
    if grown is not None and where["V"].stop > grown.known:
        return _grown_part(found, tensor, sizes, where, grown)
    cut, shape, within = [], [], []
    for outer, *inner in tensor.theirs.split():
        step = sizes[inner[0]] if inner else 1
        cut.append(slice(where[outer].start * step, where[outer].stop * step))
        shape.append(len(where[outer]))
        within.append(slice(None))
        for letter in inner:
            shape.append(step)
            within.append(slice(where[letter].start, where[letter].stop))
    part = found[tuple(cut)].reshape(shape)[tuple(within)]
    return part.transpose(_axes(tensor.theirs.replace(" ", ""), tensor.ours))


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
    part = part.transpose(_axes("VD", tensor.ours))
    if rows.start >= known:
        return part
    old = _read_part(found, tensor, sizes, {**where, "V": range(rows.start, known)})
    return np.concatenate((old.astype(part.dtype), part), axis=tensor.ours.index("V"))


def _axes(source: str, target: str) -> list[int]:
    return [source.index(letter) for letter in target]


def _check_shape(files: _Files, name: str, tensor: Tensor, found, sizes, old_vocab) -> None:
    expected = [int(np.prod([sizes[letter] for letter in g])) for g in tensor.theirs.split()]
    rows_fit = "V" in sizes and _known_rows(found[0], old_vocab) <= expected[0]
    if found != expected and not (rows_fit and found[1:] == expected[1:]):
        raise UserError(
            f"weights in {files.directory}: tensor {name} is {list(found)}, the model expects "
            f"{expected}; take config.*.arch and the vocabulary from these weights"
        )


def _check_supported(path: Path, config: Mapping[str, Any]) -> None:
    """Refuses what would load and then compute something else."""
    scaling = _rope(config)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    for key, value, fine in (
        ("model_type", config.get("model_type", "llama"), ("llama", "mistral")),
        ("hidden_act", config.get("hidden_act", "silu"), ("silu", "swish")),
        ("attention_bias", config.get("attention_bias", False), (False, None)),
        ("mlp_bias", config.get("mlp_bias", False), (False, None)),
        ("sliding_window", config.get("sliding_window"), (None,)),
        ("rope scaling", kind, ("default",)),
        ("partial_rotary_factor", scaling.get("partial_rotary_factor", 1.0), (1.0, None)),
    ):
        if value not in fine:
            raise UserError(f"{path}: {key} {value!r} is not supported, only {fine[0]!r}")


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings: `rope_parameters` in new files, `rope_theta` and `rope_scaling` in old."""
    old = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    return {**old, **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}


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
