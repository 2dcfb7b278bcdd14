"""Tokenised examples and passages as flat, memory-mapped files with offsets.

Item i of a ragged array `x` is `x[x_offsets[i] : x_offsets[i + 1]]`. A store's name carries the
fingerprint of everything that went into it, so one that exists is right and is used again. It is
put together from shards, each made once, by whichever process is free: any number of processes,
on all hosts that share the directory, tokenise one corpus together.
"""

import functools
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from cosup_jax.config import Config, DataConfig
from cosup_jax.data import markup
from cosup_jax.data.prepared import Encoded, is_prepared
from cosup_jax.data.schema import Dataset
from cosup_jax.data.storage import (
    ArrayWriter,
    Ragged,
    build_once,
    check_lengths,
    intact,
    map_array,
    share_of,
    span,
)
from cosup_jax.data.tokenizer import Tokenizer
from cosup_jax.errors import UserError

FORMAT = 3  # raise it whenever the files below change
CHUNK = 2048  # examples or passages tokenised at a time
SHARD = 32_768  # examples or passages of a shard

_CTX = {  # of a corpus
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


class PassageStore:
    """Read-only arrays of a tokenised corpus, memory-mapped; the names are those of `_CTX`."""

    def __init__(self, directory: str | Path):
        with intact(Path(directory)):
            self._map_passages(Path(directory))

    def _map_passages(self, directory: Path) -> None:
        for name, dtype in _CTX.items():
            setattr(self, name, map_array(directory / name, dtype))
        self.identities = self.identities.reshape(-1, 2)
        check_lengths("ctx_offsets", int(self.ctx_offsets[-1]), self.ctx_tokens)
        self.num_passages = len(self.ctx_offsets) - 1
        check_lengths("ctx_offsets", self.num_passages, self.ctx_cut, self.identities)
        self.ctx = Ragged(self.ctx_tokens, self.ctx_offsets)  # int32 [n], by passage row


class TokenStore(PassageStore):
    """Read-only arrays of one tokenised split, memory-mapped; the names are those of `_CTX`, `_GEN`
    and `_PER_SOURCE`.

    Pickles as its path, so that worker processes map the same files.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        with intact(self.directory):
            about = json.loads((self.directory / "about.json").read_text())
            self.fingerprint: str = about["fingerprint"]
            self.dropped: int = about["dropped"]  # examples left out by data.drop_without_ret
            for name, dtype in (_GEN | _PER_SOURCE).items():
                setattr(self, name, map_array(self.directory / name, dtype))
            # Stores of the same sources share a corpus.
            self._map_passages(self.directory / about["corpus"])
            self._check_lengths()
        self.num_examples = len(self.gen_offsets) - 1

    def _check_lengths(self) -> None:
        for name, *flat in (
            ("gen_offsets", self.gen_tokens, self.gen_roles),
            ("ret_offsets", self.ret_positions, self.ret_passages),
            ("negative_offsets", self.negative_passages),
        ):
            check_lengths(name, int(getattr(self, name)[-1]), *flat)
        items = (self.ret_offsets[1:], self.negative_offsets[1:], self.gen_rows)
        check_lengths("gen_offsets", len(self.gen_offsets) - 1, *items, self.weights, self.sources)

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


def as_keys(identities: np.ndarray) -> np.ndarray:
    """uint64 [M] from uint32 [M, 2]: identities as something to compare and to sort."""
    return identities[:, 0].astype(np.uint64) << np.uint64(32) | identities[:, 1]


def seen_in(store: TokenStore, train: TokenStore, left_out: np.ndarray) -> np.ndarray:
    """bool, of each [Ret] of `store`: whether training reads its passage as evidence too.

    Args:
      left_out: rows of `train` that fit no row of the plan and are never read.
    """
    reads = np.ones(train.num_examples, bool)
    reads[left_out] = False
    passages = train.ret_passages[np.repeat(reads, np.diff(train.ret_offsets))]
    read = train.identities[np.unique(passages)]
    return np.isin(as_keys(store.identities[store.ret_passages]), as_keys(read))


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
    datasets, weights = zip(*sources, strict=True)
    ctx_settings, settings = _settings(gen_tokenizer, ctx_tokenizer, config, split)
    rows = [dataset.splits.get(split, ()) for dataset in datasets]
    versions = [(dataset.name, dataset.version) for dataset in datasets]
    fingerprint = _fingerprint(settings, versions, list(map(_digest, rows)), weights)
    target = directory / f"{split}-{fingerprint[:16]}"
    if not target.is_dir():
        corpus = _corpus(datasets, ctx_tokenizer, ctx_settings, config, directory)
        shards = directory / f".{target.name}.shards-of-{SHARD}"
        examples = [
            _Part(
                shards / f"{source}",
                len(rows[source]),
                functools.partial(_examples, dataset, split, gen_tokenizer, data),
            )
            for source, dataset in enumerate(datasets)
        ]
        about = {"fingerprint": fingerprint, "corpus": f"../{corpus.name}"}
        sizes = [len(dataset.passages) for dataset in datasets]
        _build(target, examples, functools.partial(_join_examples, sizes, weights, about))
        shutil.rmtree(shards, ignore_errors=True)
    store = TokenStore(target)
    if not store.num_examples:
        raise UserError(
            f"config.data.drop_without_ret leaves nothing: none of {store.dropped} examples has a "
            "[Ret]; set it to False, or give examples evidence"
        )
    return store


def tokenize_passages(
    dataset: Dataset, ctx_tokenizer: Tokenizer, config: Config, directory: str | Path
) -> PassageStore:
    """All passages of a data set, tokenised under `directory`, where `tokenize` finds them too."""
    settings = _ctx_settings(ctx_tokenizer, config)
    return PassageStore(_corpus([dataset], ctx_tokenizer, settings, config, Path(directory)))


def _corpus(
    datasets: Sequence[Dataset], tokenizer: Tokenizer, settings: tuple, config: Config, under: Path
) -> Path:
    """The directory of the passages of all data sets, end to end."""
    parts = [
        _Part(
            under / f"passages-{d.name}-{_fingerprint(SHARD, settings, (d.name, d.version))}",
            len(d.passages),
            functools.partial(_passages, d, tokenizer, config),
        )
        for d in datasets
    ]
    versions = [(dataset.name, dataset.version) for dataset in datasets]
    target = under / f"corpus-{_fingerprint(settings, versions)}"
    _build(target, parts, _join_corpus)
    return target


def _ctx_settings(tokenizer: Tokenizer, config: Config) -> tuple:
    """What the tokens of a corpus depend on besides the data."""
    ctx = (FORMAT, markup.VERSION, config.data.max_ctx_tokens, config.ctx.pooling)
    return (*ctx, config.ctx.prompt, tokenizer.fingerprint)


def _settings(
    gen_tokenizer: Tokenizer, ctx_tokenizer: Tokenizer, config: Config, split: str
) -> tuple[tuple, tuple]:
    """What the tokens of a corpus, and those of a split, depend on besides the data."""
    data, ctx = config.data, _ctx_settings(ctx_tokenizer, config)
    train_only = (data.no_evidence_fraction, data.drop_without_ret) if split == "train" else ()
    return ctx, (*ctx, gen_tokenizer.fingerprint, split, train_only)


class _Part(NamedTuple):
    """What one source contributes, tokenised in shards."""

    directory: Path  # of the shards
    count: int  # rows
    write: Callable[[range, Path], None]  # fills the shard of some rows

    def jobs(self) -> Iterator[tuple[Path, Callable[[Path], None]]]:
        """Each shard, and what fills it."""
        for number, first in enumerate(range(0, self.count, SHARD)):
            rows = range(first, min(first + SHARD, self.count))
            yield self.directory / f"{number:05}", functools.partial(self.write, rows)

    def shards(self) -> list[Path]:
        return [directory for directory, _ in self.jobs()]


def _build(
    target: Path, parts: Sequence[_Part], join: Callable[[Sequence[_Part], Path], None]
) -> None:
    """Makes `target` of shards, each made by us or by another process that does the same."""
    jobs = [job for part in parts for job in part.jobs()]
    try:
        _build_together(jobs, target)
        build_once(target, functools.partial(join, parts))
    except FileNotFoundError:  # another process has joined the shards and removed them
        if not target.is_dir():
            raise


def _build_together(jobs: Sequence[tuple[Path, Callable]], target: Path) -> None:
    """Has every shard made, until all are or `target` is there."""
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
    pooling, most, prompt = config.ctx.pooling, config.data.max_ctx_tokens, config.ctx.prompt
    with ArrayWriter(directory, _CTX) as writer:
        for chunk in _chunks(rows):
            if is_prepared(dataset):
                found = dataset.passages.encoded(chunk)
            else:
                passages = map(dataset.passages.at, chunk)
                found = markup.ctx_tokens(passages, tokenizer, pooling, most, prompt)
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


def _join_corpus(parts: Sequence[_Part], directory: Path) -> None:
    """Lays the passages of every source end to end."""
    with ArrayWriter(directory, _CTX) as writer:
        for part in parts:
            for shard in part.shards():
                writer.append(shard, _CTX)


def _join_examples(
    passages: Sequence[int],
    weights: Sequence[float],
    about: dict[str, Any],
    parts: Sequence[_Part],
    directory: Path,
) -> None:
    """Lays the examples of every source end to end; `passages` and `weights` are the sources'."""
    dropped, first_rows = 0, itertools.accumulate(passages, initial=0)
    with ArrayWriter(directory, _GEN | _PER_SOURCE) as writer:
        for source, (part, first_row) in enumerate(zip(parts, first_rows, strict=False)):
            moved = {"ret_passages": first_row, "negative_passages": first_row}
            for shard in part.shards():
                writer.append(shard, _GEN, moved)
                examples = len(map_array(shard / "gen_rows", _GEN["gen_rows"]))
                writer.add("weights", [weights[source]] * examples)
                writer.add("sources", [source] * examples)
                dropped += int((shard / "dropped").read_text())
    (directory / "about.json").write_text(json.dumps(about | {"dropped": dropped}))


def _fingerprint(*settings: Any) -> str:
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:32]


def _digest(rows: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(rows, "<i8").tobytes()).hexdigest()


def _chunks(items: Sequence[int]) -> Iterator[Sequence[int]]:
    for first in range(0, len(items), CHUNK):
        yield items[first : first + CHUNK]
