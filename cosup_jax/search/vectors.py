"""Passage vectors on disk: shards that are whole or absent, and the manifest that names them.

    DIR/manifest.json           the embedding contract, dtype, width; every shard's rows and SHA-256
    DIR/KEY-00000/vectors       [rows, D] in the dtype, little-endian
    DIR/KEY-00000/scales        int8: [rows] float32; a vector is what is stored times its scale
    DIR/KEY-00000/ids, ids_offsets, about.json    passage ids, UTF-8; rows and SHA-256 of the shard

Rows are in the order of passage ids. KEY is of the embedding contract, the passages, the dtype,
that in which Ctx computes and the shards' size, so that shards of another model, corpus or dtype
are never taken for these.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cosup_jax.contract import EmbeddingContract, check_match
from cosup_jax.data.digests import file_digest
from cosup_jax.data.storage import (
    ArrayWriter,
    build_once,
    locate,
    map_array,
    replacing,
    span,
    write_array,
)
from cosup_jax.errors import UserError
from cosup_jax.runtime.workdir import write_atomic, writing
from cosup_jax.search.index import Stored

FORMAT = 2  # raise it whenever the files change
DTYPES = {"float32": np.dtype("<f4"), "bfloat16": np.dtype(jnp.bfloat16), "int8": np.dtype("i1")}
_AGAIN = "run --mode=encode again"


class Layout(NamedTuple):
    """What decides the bytes of an index."""

    contract: EmbeddingContract
    corpus: str  # fingerprint of the passages, in their order
    rows: int
    dtype: str  # of DTYPES
    shard_rows: int
    computed: str  # the dtype in which Ctx makes them

    @property
    def key(self) -> str:
        """16 hexadecimal digits of all of it."""
        decides = (FORMAT, sorted(self.contract.to_dict().items()), *self[1:])
        return hashlib.sha256(repr(decides).encode()).hexdigest()[:16]

    def shards(self) -> list[tuple[str, range]]:
        """Name and rows of each; the last may be shorter."""
        starts = range(0, self.rows, self.shard_rows)
        rows = (range(start, min(start + self.shard_rows, self.rows)) for start in starts)
        return [(f"{self.key}-{number:05}", part) for number, part in enumerate(rows)]


def missing(directory: Path, layout: Layout) -> list[int]:
    """Numbers of the shards that are not there; damaged ones are removed."""
    found = []
    for number, (name, _) in enumerate(layout.shards()):
        path = directory / name
        if path.is_dir():
            try:
                _check_files(path, _about(path), directory)
                continue
            except UserError:
                pass
            with writing(path):
                shutil.rmtree(path)
        found.append(number)
    return found


def write_shard(directory: Path, vector_NxD: np.ndarray, ids: Sequence[str], dtype: str) -> None:
    """Makes the directory of a shard, which appears whole, from float32 vectors.

    Raises UserError where the disk is full.
    """
    build_once(directory, lambda temporary: _fill(temporary, vector_NxD, ids, dtype))


def _fill(directory: Path, vector_NxD: np.ndarray, ids: Sequence[str], dtype: str) -> None:
    stored = quantized(vector_NxD, dtype)
    write_array(directory / "vectors", stored.vectors.view(np.uint8), "|u1")
    if stored.scales is not None:
        write_array(directory / "scales", stored.scales, "<f4")
    with ArrayWriter(directory, {"ids": "|u1", "ids_offsets": "<i8"}) as writer:
        end = 0
        for id in ids:
            writer.add("ids", id.encode())
            end += len(id.encode())
            writer.add("ids_offsets", [end])
    files = {path.name: _fact(path) for path in sorted(directory.iterdir())}
    about = {"rows": len(vector_NxD), "files": files}
    (directory / "about.json").write_text(json.dumps(about, indent=2) + "\n")


def quantized(vector_NxD: np.ndarray, dtype: str) -> Stored:
    """Float32 vectors as they are kept. int8: the largest entry of a vector becomes 127."""
    if dtype != "int8":
        return Stored(vector_NxD.astype(DTYPES[dtype]))
    scale_N = np.abs(vector_NxD).max(axis=1, initial=0).astype(np.float32) / np.float32(127)
    steps_NxD = vector_NxD / np.where(scale_N > 0, scale_N, 1)[:, None]
    return Stored(np.rint(steps_NxD).clip(-127, 127).astype(np.int8), scale_N)


def write_manifest(directory: Path, layout: Layout) -> None:
    """Names all shards, which must be there; then removes their locks, and of older indexes the
    shards, what is remembered of them, and index.faiss.

    Raises UserError where the disk is full.
    """
    shards = [{"name": name} | _about(directory / name) for name, _ in layout.shards()]
    manifest = {
        **{"format": FORMAT, "key": layout.key, "rows": layout.rows, "dtype": layout.dtype},
        **{"width": layout.contract.width, "corpus": layout.corpus},
        **{"contract": layout.contract.to_dict(), "shards": shards},
    }
    path = directory / "manifest.json"
    with writing(path):
        manifest["sha256"] = _json_digest(manifest)
        write_atomic(path, json.dumps(manifest, indent=2) + "\n")
        for old in directory.glob("*-[0-9][0-9][0-9][0-9][0-9]*"):
            if old.suffix == ".lock":
                old.unlink()
            elif not old.name.lstrip(".").startswith(layout.key):
                (directory / "index.faiss").unlink(missing_ok=True)
                shutil.rmtree(directory / "digests", ignore_errors=True)
                shutil.rmtree(old, ignore_errors=True)


class Vectors:
    """An index as `--mode=encode` wrote it, memory-mapped; `index.search` takes it as a corpus."""

    def __init__(self, directory: Path, manifest: dict[str, Any], shards: list["_Shard"]):
        self.directory, self._shards = directory, shards
        self.width, self.dtype = manifest["width"], manifest["dtype"]
        self.key: str = manifest["key"]  # changes with whatever the vectors depend on
        self.contract = EmbeddingContract.from_dict(manifest["contract"], str(directory))
        self._starts = list(itertools.accumulate((len(s) for s in shards), initial=0))
        self.ids: Sequence[str] = _Ids(self)

    @classmethod
    def open(cls, directory: str | Path, contract: EmbeddingContract | None = None) -> "Vectors":
        """Reads all files once, to see that they are what was written, and remembers that.

        Raises UserError, naming the file, if there is no index or a damaged one, or if it holds
        another model's vectors than `contract` says.
        """
        directory = Path(directory)
        manifest = _manifest(directory / "manifest.json")
        found = EmbeddingContract.from_dict(manifest["contract"], str(directory))
        if contract is not None:
            check_match(contract, found, f"the index {directory}")
        shards = []
        for about in manifest["shards"]:
            _check_files(directory / about["name"], about, directory)
            shards.append(_Shard(directory / about["name"], about["rows"], manifest))
        return cls(directory, manifest, shards)

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def files(self) -> list[Path]:
        """Those of all shards."""
        return [path for shard in self._shards for path in sorted(shard.directory.iterdir())]

    def chunks(self, rows: int) -> Iterator[Stored]:
        """All rows in order, at most `rows` at a time, as they are kept."""
        for shard in self._shards:
            for first in range(0, len(shard), rows):
                yield shard.cut(slice(first, first + rows))

    def take(self, rows: Sequence[int]) -> np.ndarray:
        """[n, D] float32 vectors of some rows."""
        found = np.zeros((len(rows), self.width), np.float32)
        for i, row in enumerate(rows):
            shard, inside = self._locate(int(row))
            found[i] = shard.cut(slice(inside, inside + 1)).floats()[0]
        return found

    def write_faiss(self, path: Path) -> None:
        """A file for `faiss.read_index`: an IndexFlatIP of float32 vectors in the order of rows.

        The layout is that of faiss/impl/index_write.cpp: header, count of floats, floats. Raises
        UserError where the disk is full.
        """
        header = b"IxFI" + np.array([self.width], "<i4").tobytes()
        header += np.array([len(self), 2**20, 2**20], "<i8").tobytes()  # the last two unused
        header += b"\1" + np.array([0], "<i4").tobytes()  # trained; inner product
        header += np.array([len(self) * self.width], "<u8").tobytes()
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(header)
            for stored in self.chunks(4096):
                file.write(stored.floats().astype("<f4"))

    def _locate(self, row: int) -> tuple["_Shard", int]:
        number, inside = locate(self._starts, row)
        return self._shards[number], inside

    def _id(self, row: int) -> str:
        shard, inside = self._locate(row)
        return shard.id(inside)


class _Shard:
    def __init__(self, directory: Path, rows: int, manifest: dict[str, Any]):
        self.directory = directory
        flat = map_array(directory / "vectors", DTYPES[manifest["dtype"]])
        if len(flat) != rows * manifest["width"]:
            raise UserError(f"{directory / 'vectors'}: {len(flat)} numbers, damaged; {_AGAIN}")
        self._vectors = flat.reshape(rows, manifest["width"])
        int8 = manifest["dtype"] == "int8"
        self._scales = map_array(directory / "scales", "<f4") if int8 else None
        self._ids = map_array(directory / "ids", "|u1")
        self._offsets = map_array(directory / "ids_offsets", "<i8")

    def __len__(self) -> int:
        return len(self._vectors)

    def cut(self, rows: slice) -> Stored:
        return Stored(self._vectors[rows], None if self._scales is None else self._scales[rows])

    def id(self, row: int) -> str:
        return self._ids[span(self._offsets, row)].tobytes().decode()


class _Ids(Sequence[str]):
    """Passage ids by row, read when asked for."""

    def __init__(self, vectors: Vectors):
        self._vectors = vectors

    def __len__(self) -> int:
        return len(self._vectors)

    def __getitem__(self, row: int) -> str:
        return self._vectors._id(int(row))


def _fact(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _manifest(path: Path) -> dict[str, Any]:
    found = _read_json(path)
    if found.get("format") != FORMAT:
        raise UserError(f"{path}: of another version of this program, or damaged; {_AGAIN}")
    if found.pop("sha256", None) != _json_digest(found):
        raise UserError(f"{path}: not what was written; {_AGAIN}")
    return found


def _json_digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _about(shard: Path) -> dict[str, Any]:
    found = _read_json(shard / "about.json")
    files = found.get("files")
    if type(found.get("rows")) is not int or not isinstance(files, dict):
        raise UserError(f"{shard / 'about.json'}: damaged; {_AGAIN}")
    if not all(isinstance(f, dict) and {"bytes", "sha256"} == set(f) for f in files.values()):
        raise UserError(f"{shard / 'about.json'}: damaged; {_AGAIN}")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no index here; run --mode=encode first") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {_AGAIN}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: damaged; {_AGAIN}")
    return found


def _check_files(shard: Path, about: dict[str, Any], memory: Path) -> None:
    for name, fact in about["files"].items():
        path = shard / name
        if not path.is_file() or path.stat().st_size != fact["bytes"]:
            raise UserError(f"{path}: missing or cut off; {_AGAIN}")
        # Where we may not write, nothing is remembered.
        known = os.access(memory, os.W_OK)
        if (file_digest(path, memory) if known else _fact(path)["sha256"]) != fact["sha256"]:
            raise UserError(f"{path}: not what was written; {_AGAIN}")
