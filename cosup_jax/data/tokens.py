"""Tokenised examples and passages as flat, memory-mapped files with offsets.

Item i of a ragged array `x` is `x[x_offsets[i] : x_offsets[i + 1]]`. A directory is written under
a temporary name and renamed when complete; its name carries the fingerprint of everything that
went into it, so one that exists is right and is used again.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from cosup_jax.config import Config, DataConfig
from cosup_jax.data import markup
from cosup_jax.data.schema import Dataset, Example
from cosup_jax.data.tokenizer import Tokenizer
from cosup_jax.errors import UserError

FORMAT = 1  # raise it whenever the files below change
CHUNK = 2048  # examples or passages tokenised at a time

_ARRAYS = {
    "gen_tokens": "<i4",
    "gen_roles": "|u1",  # markup.PROMPT, TARGET, EVIDENCE
    "gen_offsets": "<i8",
    "ret_positions": "<i4",  # of each [Ret], counted from its example's first token
    "ret_passages": "<i4",  # passage row of each [Ret]
    "ret_offsets": "<i8",
    "negative_passages": "<i4",  # passage rows of the hard negatives
    "negative_offsets": "<i8",
    "weights": "<f4",  # how often an epoch draws the example
    "ctx_tokens": "<i4",
    "ctx_offsets": "<i8",
    "identities": "<u4",  # [passages, 2], see `identity`
}


class TokenStore:
    """Read-only arrays of one tokenised split, memory-mapped; the names are those of `_ARRAYS`.

    Pickles as its path, so that worker processes map the same files.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        about = json.loads((self.directory / "about.json").read_text())
        self.fingerprint: str = about["fingerprint"]
        self.dropped: int = about["dropped"]  # examples left out by data.drop_without_ret
        for name, dtype in _ARRAYS.items():
            setattr(self, name, _map(self.directory / name, np.dtype(dtype)))
        self.identities = self.identities.reshape(-1, 2)
        self.ctx = Ragged(self.ctx_tokens, self.ctx_offsets)  # int32 [n], by passage row
        self.num_examples = len(self.gen_offsets) - 1
        self.num_passages = len(self.ctx_offsets) - 1

    def __reduce__(self):
        return TokenStore, (self.directory,)

    @functools.cached_property
    def example_ids(self) -> list[str]:
        """The id of each example row."""
        return json.loads((self.directory / "example_ids.json").read_text())

    @functools.cached_property
    def passage_ids(self) -> list[str]:
        """The id of each passage row; of passages with equal tokens every one has its row."""
        return json.loads((self.directory / "passage_ids.json").read_text())

    def gen(self, example: int) -> tuple[np.ndarray, np.ndarray]:
        """Gen's tokens int32 [n] and their roles uint8 [n]."""
        span = _span(self.gen_offsets, example)
        return self.gen_tokens[span], self.gen_roles[span]

    def rets(self, example: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions int32 [rets] of the example's [Ret] and the passage row of each."""
        span = _span(self.ret_offsets, example)
        return self.ret_positions[span], self.ret_passages[span]


class Ragged(Sequence):
    """Items of a flat array, cut out when asked for."""

    def __init__(self, flat: np.ndarray, offsets: np.ndarray):
        self._flat, self._offsets = flat, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, item: int) -> np.ndarray:
        return self._flat[_span(self._offsets, item)]


def identity(ctx_tokens: np.ndarray) -> np.ndarray:
    """uint32 [2]: the first 64 bits of SHA-256 over the token ids as little-endian int32."""
    digest = hashlib.sha256(np.ascontiguousarray(ctx_tokens, "<i4").tobytes()).digest()
    return np.frombuffer(digest[:8], "<u4")


def tokenize(
    sources: Sequence[tuple[Dataset, float]],
    gen_tokenizer: Tokenizer,
    ctx_tokenizer: Tokenizer,
    config: Config,
    directory: str | Path,
    split: str = "train",
) -> TokenStore:
    """The examples of `split` and all passages of the sources, tokenised under `directory`.

    Args:
      sources: data sets, each with how often an epoch draws its examples.
      split: examples of that split. On "train" alone, data.no_evidence_fraction of the examples,
        chosen by a hash of their id, lose their evidence, and data.drop_without_ret drops those
        without any.

    Raises:
      UserError: no example, or one that cannot be written as training text.
    """
    train = split == "train"
    parts = [
        _Part(dataset, weight, [example for example in dataset.examples if example.split == split])
        for dataset, weight in sources
    ]
    if not any(part.examples for part in parts):
        names = ", ".join(dataset.name for dataset, _ in sources)
        raise UserError(f"data source {names}: no example has split {split!r}")
    fingerprint = _fingerprint(parts, gen_tokenizer, ctx_tokenizer, config, split)
    target = Path(directory) / f"{split}-{fingerprint[:16]}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            with _Writer(temporary) as writer:
                for part in parts:
                    first_row = len(writer.passage_ids)
                    _write_passages(writer, part, ctx_tokenizer, config)
                    _write_examples(writer, part, first_row, gen_tokenizer, config.data, train)
                writer.finish(fingerprint)
            _rename(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return TokenStore(target)


class _Part(NamedTuple):
    """The examples that one source contributes."""

    dataset: Dataset
    weight: float
    examples: list[Example]


def _write_passages(writer: "_Writer", part: _Part, tokenizer: Tokenizer, config: Config) -> None:
    for chunk in _chunks(part.dataset.passages.values()):
        cut = config.data.max_ctx_tokens
        for passage, tokens in zip(
            chunk, markup.ctx_tokens(chunk, tokenizer, config.ctx.pooling, cut), strict=True
        ):
            writer.add_item("ctx", tokens=tokens)
            writer.add("identities", identity(tokens))
            writer.passage_ids.append(passage.id)


def _write_examples(
    writer: "_Writer",
    part: _Part,
    first_row: int,
    tokenizer: Tokenizer,
    data: DataConfig,
    train: bool,
) -> None:
    passages = part.dataset.passages
    rows = {id: first_row + i for i, id in enumerate(passages)}
    no_evidence = data.no_evidence_fraction if train else 0.0
    for chunk in _chunks(part.examples):
        with_evidence = [_share(example.id) >= no_evidence for example in chunk]
        pieces = [
            markup.pieces(example, passages, with_)
            for example, with_ in zip(chunk, with_evidence, strict=True)
        ]
        encoded = markup.encode(pieces, tokenizer, data.max_ctx_tokens)
        for example, with_, marked in zip(chunk, with_evidence, encoded, strict=True):
            if train and data.drop_without_ret and not marked.evidence:
                writer.dropped += 1
                continue
            evidence = [rows[id] for id in marked.evidence]
            negatives = [rows[id] for id in example.hard_negatives] if with_ else []
            writer.add_item("gen", tokens=marked.tokens, roles=marked.roles)
            writer.add_item("ret", positions=marked.ret_positions, passages=evidence)
            writer.add_item("negative", passages=negatives)
            writer.add("weights", [part.weight])
            writer.example_ids.append(example.id)


def _share(id: str) -> float:
    """A number in [0, 1) that depends on the id alone, hence the same for every seed."""
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:8]) / 2**64


def _fingerprint(
    parts: Sequence[_Part],
    gen_tokenizer: Tokenizer,
    ctx_tokenizer: Tokenizer,
    config: Config,
    split: str,
) -> str:
    """SHA-256 of all that decides the files: content, tokenizers, template and settings."""
    data = config.data
    train_only = (data.no_evidence_fraction, data.drop_without_ret) if split == "train" else ()
    settings = (FORMAT, markup.VERSION, split, data.max_ctx_tokens, config.ctx.pooling, train_only)
    digest = hashlib.sha256(repr(settings).encode())
    digest.update(repr((gen_tokenizer.fingerprint, ctx_tokenizer.fingerprint)).encode())
    for dataset, weight, examples in parts:
        digest.update(repr((dataset.name, dataset.version, weight)).encode())
        digest.update(repr([example.id for example in examples]).encode())
    return digest.hexdigest()


class _Writer:
    """Appends to the flat files of a store as the tokens come, so that memory stays small."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.dropped = 0
        self.example_ids: list[str] = []
        self.passage_ids: list[str] = []
        self._stack = contextlib.ExitStack()
        self._ends = {"gen": 0, "ret": 0, "negative": 0, "ctx": 0}

    def __enter__(self) -> "_Writer":
        self._files = {name: self._open(name) for name in _ARRAYS}
        for group in self._ends:
            self.add(f"{group}_offsets", [0])
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def _open(self, name: str) -> BinaryIO:
        return self._stack.enter_context(open(self.directory / name, "wb"))

    def add(self, name: str, values: Any) -> None:
        self._files[name].write(np.asarray(values, _ARRAYS[name]).tobytes())

    def add_item(self, group: str, **parts: Any) -> None:
        """Appends one item to each ragged array GROUP_PART; the parts are equally long."""
        for part, values in parts.items():
            self.add(f"{group}_{part}", values)
        self._ends[group] += len(values)
        self.add(f"{group}_offsets", [self._ends[group]])

    def finish(self, fingerprint: str) -> None:
        """Writes the small files and forces everything to disk, before the rename."""
        about = {"fingerprint": fingerprint, "dropped": self.dropped}
        for name, value in (
            ("example_ids", self.example_ids),
            ("passage_ids", self.passage_ids),
            ("about", about),
        ):
            self._files[name] = self._open(f"{name}.json")
            self._files[name].write(json.dumps(value).encode())
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())


def _rename(temporary: Path, target: Path) -> None:
    temporary.chmod(0o755)
    try:
        os.rename(temporary, target)
    except OSError:
        if not target.is_dir():  # otherwise another process wrote the same store first
            raise


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r").view(np.ndarray)


def _span(offsets: np.ndarray, item: int) -> slice:
    return slice(int(offsets[item]), int(offsets[item + 1]))


def _chunks(items: Iterable) -> Iterator[list]:
    items = iter(items)
    while chunk := list(itertools.islice(items, CHUNK)):
        yield chunk
