"""Tokenised examples and passages as flat, memory-mapped files with offsets.

Item i of a ragged array `x` is `x[x_offsets[i] : x_offsets[i + 1]]`. A store's name carries the
fingerprint of everything that went into it, so one that exists is right and is used again. It is
put together from shards, each made once, by whichever process is free: any number of processes,
on all hosts that share the directory, tokenise one corpus together.
"""

import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cosup_jax.config import Config, DataConfig
from cosup_jax.data import markup
from cosup_jax.data.prepared import Encoded, is_prepared
from cosup_jax.data.schema import Dataset
from cosup_jax.data.storage import ArrayWriter, Ragged, build_once, map_array, share_of, span
from cosup_jax.data.tokenizer import Tokenizer
from cosup_jax.errors import UserError

FORMAT = 2  # raise it whenever the files below change
CHUNK = 2048  # examples or passages tokenised at a time
SHARD = 32_768  # examples or passages of a shard

_CTX = {
    "ctx_tokens": "<i4",
    "ctx_offsets": "<i8",
    "ctx_cut": "<i4",  # [passages], tokens that data.max_ctx_tokens cut off
    "identities": "<u4",  # [passages, 2], see `identity`
}
_GEN = {
    "gen_tokens": "<i4",
    "gen_roles": "|u1",  # markup.PROMPT, TARGET, EVIDENCE
    "gen_offsets": "<i8",
    "gen_rows": "<i8",  # [examples], row in the data set
    "ret_positions": "<i4",  # of each [Ret], counted from its example's first token
    "ret_passages": "<i4",  # passage row of each [Ret]
    "ret_offsets": "<i8",
    "negative_passages": "<i4",  # passage rows of the hard negatives
    "negative_offsets": "<i8",
}
_PER_SOURCE = {"weights": "<f4", "sources": "<i4"}  # [examples]: draws an epoch; which source


class TokenStore:
    """Read-only arrays of one tokenised split, memory-mapped; the names are those of `_CTX`, `_GEN`
    and `_PER_SOURCE`.

    Pickles as its path, so that worker processes map the same files.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        about = json.loads((self.directory / "about.json").read_text())
        self.fingerprint: str = about["fingerprint"]
        self.dropped: int = about["dropped"]  # examples left out by data.drop_without_ret
        for name, dtype in (_CTX | _GEN | _PER_SOURCE).items():
            setattr(self, name, map_array(self.directory / name, dtype))
        self.identities = self.identities.reshape(-1, 2)
        self.ctx = Ragged(self.ctx_tokens, self.ctx_offsets)  # int32 [n], by passage row
        self.num_examples = len(self.gen_offsets) - 1
        self.num_passages = len(self.ctx_offsets) - 1

    def __reduce__(self):
        return TokenStore, (self.directory,)

    def gen(self, example: int) -> tuple[np.ndarray, np.ndarray]:
        """Gen's tokens int32 [n] and their roles uint8 [n]."""
        here = span(self.gen_offsets, example)
        return self.gen_tokens[here], self.gen_roles[here]

    def rets(self, example: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions int32 [rets] of the example's [Ret] and the passage row of each."""
        here = span(self.ret_offsets, example)
        return self.ret_positions[here], self.ret_passages[here]

    def negatives(self, example: int) -> np.ndarray:
        """Passage rows of the example's hard negatives."""
        return self.negative_passages[span(self.negative_offsets, example)]


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
      UserError: no example.
    """
    if not any(len(dataset.splits.get(split, ())) for dataset, _ in sources):
        names = ", ".join(dataset.name for dataset, _ in sources)
        raise UserError(f"data source {names}: no example has split {split!r}")
    data, directory = config.data, Path(directory)
    ctx_settings = (FORMAT, SHARD, markup.VERSION, data.max_ctx_tokens, config.ctx.pooling)
    ctx_settings += (ctx_tokenizer.fingerprint,)
    train_only = (data.no_evidence_fraction, data.drop_without_ret) if split == "train" else ()
    settings = (*ctx_settings, gen_tokenizer.fingerprint, split, train_only)
    parts = [
        (dataset.name, dataset.version, _digest(dataset.splits.get(split, ())), weight)
        for dataset, weight in sources
    ]
    fingerprint = _fingerprint(settings, parts)
    target = directory / f"{split}-{fingerprint[:16]}"
    if not target.is_dir():
        gen_shards, ctx_shards = directory / f".{target.name}.shards", []
        jobs = []
        for number, (dataset, _) in enumerate(sources):
            key = _fingerprint(ctx_settings, dataset.version)
            ctx_shards.append(directory / f"passages-{dataset.name}-{key[:16]}")
            job = functools.partial(_passages, dataset, ctx_tokenizer, config)
            jobs += _jobs(ctx_shards[-1], job, len(dataset.passages))
            job = functools.partial(_examples, dataset, split, gen_tokenizer, data)
            jobs += _jobs(gen_shards / f"{number}", job, len(dataset.splits.get(split, ())))
        try:
            _build_together(jobs, target)
        except FileNotFoundError:  # another process has put them together and removed them
            if not target.is_dir():
                raise
        shards = [(ctx, gen_shards / f"{i}") for i, ctx in enumerate(ctx_shards)]
        weights = [weight for _, weight in sources]
        build_once(target, lambda temporary: _join(temporary, shards, weights, fingerprint))
        shutil.rmtree(gen_shards, ignore_errors=True)
    store = TokenStore(target)
    if not store.num_examples:
        raise UserError(
            f"config.data.drop_without_ret leaves nothing: none of {store.dropped} examples has a "
            "[Ret]; set it to False, or give examples evidence"
        )
    return store


Job = tuple[Path, Callable[[Path], None]]  # a directory, and what fills it


def _jobs(directory: Path, write: Callable[[range, Path], None], count: int) -> Iterator[Job]:
    for number, first in enumerate(range(0, count, SHARD)):
        rows = range(first, min(first + SHARD, count))
        yield directory / f"{number:05}", functools.partial(write, rows)


def _build_together(jobs: Sequence[Job], target: Path) -> None:
    """Has every directory made, by us or by others that do the same, unless `target` is there."""
    shown = {"desc": "tokenising", "unit": " shards", "delay": 2, "leave": False}
    with tqdm(total=len(jobs), disable=None, **shown) as bar:
        while jobs and not target.is_dir():
            waiting = []
            for job in jobs:
                if build_once(*job, wait=False):
                    bar.update()
                else:
                    waiting.append(job)
            if jobs := waiting:
                time.sleep(0.1)


def _passages(
    dataset: Dataset, tokenizer: Tokenizer, config: Config, rows: range, directory: Path
) -> None:
    """One shard of a corpus."""
    pooling, most = config.ctx.pooling, config.data.max_ctx_tokens
    with ArrayWriter(directory, _CTX) as writer:
        for chunk in _chunks(rows):
            if is_prepared(dataset):
                found = dataset.passages.encoded(chunk)
            else:
                passages = map(dataset.passages.at, chunk)
                found = markup.ctx_tokens(passages, tokenizer, pooling, most)
            for tokens, cut in found:
                writer.add_item("ctx", tokens=tokens)
                writer.add("ctx_cut", [cut])
                writer.add("identities", identity(tokens))


def _examples(
    dataset: Dataset,
    split: str,
    tokenizer: Tokenizer,
    data: DataConfig,
    rows: range,
    directory: Path,
) -> None:
    """One shard of a split; passages by their row in the data set's own corpus."""
    train, dropped = split == "train", 0
    with ArrayWriter(directory, _GEN) as writer:
        for chunk in _chunks(dataset.splits[split][rows.start : rows.stop].tolist()):
            if is_prepared(dataset):
                found = dataset.examples.encoded(chunk)
            else:
                found = _encode(dataset, chunk, tokenizer, data, train)
            for row, one in zip(chunk, found, strict=True):
                if train and data.drop_without_ret and not len(one.evidence):
                    dropped += 1
                    continue
                writer.add_item("gen", tokens=one.tokens, roles=one.roles)
                writer.add_item("ret", positions=one.ret_positions, passages=one.evidence)
                writer.add_item("negative", passages=one.negatives)
                writer.add("gen_rows", [row])
    (directory / "dropped").write_text(str(dropped))


def _encode(
    dataset: Dataset, rows: Sequence[int], tokenizer: Tokenizer, data: DataConfig, train: bool
) -> Iterator[Encoded]:
    passages, examples = dataset.passages, [dataset.examples[row] for row in rows]
    no_evidence = data.no_evidence_fraction if train else 0.0
    given = [share_of(example.id) >= no_evidence for example in examples]
    pieces = [
        markup.pieces(example, passages, with_evidence)
        for example, with_evidence in zip(examples, given, strict=True)
    ]
    encoded = markup.encode(pieces, tokenizer, data.max_ctx_tokens)
    for example, with_evidence, marked in zip(examples, given, encoded, strict=True):
        evidence = [passages.row(id) for id in marked.evidence]
        negatives = [passages.row(id) for id in example.hard_negatives] if with_evidence else []
        yield Encoded(marked.tokens, marked.roles, marked.ret_positions, evidence, negatives)


def _join(
    directory: Path,
    shards: Sequence[tuple[Path, Path]],
    weights: Sequence[float],
    fingerprint: str,
) -> None:
    """Lays the shards of every source end to end: (passages, examples) and weight of each."""
    dropped = first_passage = 0
    with ArrayWriter(directory, _CTX | _GEN | _PER_SOURCE) as writer:
        for source, (ctx, gen) in enumerate(shards):
            passages = 0
            for shard in sorted(ctx.iterdir()) if ctx.is_dir() else ():
                if shard.name.isdecimal():
                    writer.append(shard, _CTX)
                    passages += (shard / "ctx_cut").stat().st_size // 4
            for shard in sorted(gen.iterdir()) if gen.is_dir() else ():
                if shard.name.isdecimal():
                    moved = {"ret_passages": first_passage, "negative_passages": first_passage}
                    writer.append(shard, _GEN, moved)
                    examples = (shard / "gen_rows").stat().st_size // 8
                    writer.add("weights", [weights[source]] * examples)
                    writer.add("sources", [source] * examples)
                    dropped += int((shard / "dropped").read_text())
            first_passage += passages
    about = {"fingerprint": fingerprint, "dropped": dropped}
    (directory / "about.json").write_text(json.dumps(about))


def _fingerprint(*settings: Any) -> str:
    return hashlib.sha256(repr(settings).encode()).hexdigest()


def _digest(rows: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(rows, "<i8").tobytes()).hexdigest()


def _chunks(items: Sequence[int]) -> Iterator[Sequence[int]]:
    for first in range(0, len(items), CHUNK):
        yield items[first : first + CHUNK]
