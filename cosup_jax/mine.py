"""--mode=mine: hard negatives that the model itself finds, written into a copy of each source.

The passages that come up for a [Ret] are those that the model may take for the right one. Some are
right too, only nobody said so: what scores as high as the positive, or nearly, is left out, as in
NV-Retriever (arXiv 2407.15831).

WORKDIR/mined/NAME.jsonl, WORKDIR/mined/NAME.passages.jsonl    all of data set NAME
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from cosup_jax import assemble, sharding
from cosup_jax.assemble import Trained
from cosup_jax.config import Config, IndexConfig
from cosup_jax.data import tokens
from cosup_jax.data.batch import batch_shape
from cosup_jax.data.pipeline import PackedExamples, pack_examples
from cosup_jax.data.schema import Dataset, Example
from cosup_jax.data.sources import by_name
from cosup_jax.data.storage import replacing
from cosup_jax.encode import index as encoded
from cosup_jax.runtime import processes
from cosup_jax.runtime.workdir import Workdir
from cosup_jax.search import index
from cosup_jax.search.corpus import Corpus
from cosup_jax.search.encoder import to_mesh
from cosup_jax.search.vectors import Vectors
from cosup_jax.towers import gen_hidden, query_vectors

QUERIES = 4096  # searched for together: each time the whole index is read


def mine(config: Config, workdir: str) -> None:
    """Writes WORKDIR/mined, by the newest checkpoint; encodes first what is not encoded yet.

    Raises UserError without a checkpoint of this config, for bad data, or without room.
    """
    say = lambda text: print(text, flush=True) if jax.process_index() == 0 else None
    with Workdir(workdir, begun=True) as directory:
        directory.fetch("index")
        trained = assemble.trained(config, directory.path)
        for line in assemble.refuse_bad_rows(trained.data, config):
            say(line)
        for dataset in by_name(dataset for dataset, _ in trained.data.train):
            if "train" not in dataset.splits:  # a part of prepared:DIR that is only evaluated
                say(f"{dataset.name}: no row to train on, nothing mined")
                continue
            corpus, vectors = encoded(dataset, trained, directory.path)
            mined = search(dataset, corpus, vectors, trained, directory.path / "data")
            target = directory.path / "mined" / f"{dataset.name}.jsonl"
            if jax.process_index() == 0:
                write(target, dataset, mined, vectors)
            say(f"{dataset.name}: {_words(mined.counts, trained.config.index.mine_margin)}")
            say(f"name {target} in config.data.train")
        directory.publish("mined")
        processes.barrier("mined")


@dataclasses.dataclass
class Counts:
    """What became of the passages that came up."""

    questions: int = 0  # with a [Ret]
    rets: int = 0
    evidence: int = 0
    likely_false: int = 0
    kept: int = 0  # hard negatives
    too_long: int = 0  # questions that fit no row and are not asked


def _words(counts: Counts, margin: float) -> str:
    words = (
        f"{counts.kept:,} hard negatives for {counts.questions:,} questions with {counts.rets:,} "
        f"[Ret]; left out: {counts.likely_false:,} likely false, above the positive's score - "
        f"{margin:.0%}, and {counts.evidence:,} that are evidence"
    )
    return words + (f"; {counts.too_long:,} questions fit no row" if counts.too_long else "")


class Mined(NamedTuple):
    """Hard negatives of some examples."""

    rows: dict[int, list[int]]  # example in its data set -> rows of the index, best first
    counts: Counts


def search(
    dataset: Dataset, corpus: Corpus, vectors: Vectors, trained: Trained, directory: Path
) -> Mined:
    """The hard negatives of every training example that has a [Ret] and fits a row."""
    config = trained.config
    # Every example is asked with its evidence, whatever share a run trains without.
    data = dataclasses.replace(config.data, no_evidence_fraction=0.0, drop_without_ret=False)
    whole = dataclasses.replace(config, data=data)
    store = tokens.tokenize([(dataset, 1.0)], *trained.tokenizers, whole, directory)
    example_of_ret = np.repeat(np.arange(store.num_examples), np.diff(store.ret_offsets))
    packed, too_long = pack_examples(store, batch_shape(config), config.data.packing)
    mined = Mined({}, Counts(too_long=len(too_long)))
    for query_QxD, rets in _queries(packed, trained, len(store.ret_passages)):
        scores_QxK, rows_QxK = index.search(query_QxD, vectors, config.index.mine_top, trained.mesh)
        gold_Q = corpus.row_of[store.ret_passages[rets]]
        own_Q = np.einsum("qd,qd->q", query_QxD, vectors.take(gold_Q))
        examples, starts = np.unique(example_of_ret[rets], return_index=True)
        for example, start in zip(examples.tolist(), starts.tolist(), strict=True):
            here = slice(start, start + len(store.rets(example)[0]))
            found = list(zip(scores_QxK[here], rows_QxK[here], own_Q[here], strict=True))
            chosen = choose(found, set(gold_Q[here].tolist()), config.index, mined.counts)
            mined.rows[int(store.gen_rows[example])] = chosen
    return mined


def choose(
    found: Sequence[tuple[np.ndarray, np.ndarray, float]],
    evidence: set[int],
    config: IndexConfig,
    counts: Counts,
) -> list[int]:
    """Rows that are hard negatives of one example, at most index.mine_keep, best first.

    Its [Ret]s take turns. What may be right for one of them is a negative for none.

    Args:
      found: of each [Ret] the scores and rows that came up, best first, and its positive's score.
      evidence: rows of all its positives.
      counts: are added to.
    """
    right, turns = set(), []
    for scores, rows, own in found:
        real = rows >= 0
        high = scores > own - config.mine_margin * abs(own)
        right |= set(rows[real & high].tolist()) - evidence
        turns.append(rows[real].tolist())
    up = set().union(*turns)
    in_turn = (turn[i] for i in range(max(map(len, turns))) for turn in turns if i < len(turn))
    kept = [row for row in dict.fromkeys(in_turn) if row not in evidence | right]
    kept = kept[: config.mine_keep]
    counts.questions, counts.rets = counts.questions + 1, counts.rets + len(turns)
    counts.evidence += len(up & evidence)
    counts.likely_false += len(right)
    counts.kept += len(kept)
    return kept


def _queries(
    packed: Iterable[PackedExamples], trained: Trained, count: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Query vectors [Q, D] and which [Ret] of the store each is; those of an example together."""
    config, mesh = trained.config, trained.mesh

    def read(params, batch):
        return query_vectors(gen_hidden(params, batch, trained.towers), batch, config)

    read = jax.jit(read, out_shardings=sharding.replicated(mesh))
    shown = {"desc": "mining", "unit": " [Ret]", "delay": 2, "leave": False}
    queries, rets = [], []
    with tqdm(total=count, disable=None, **shown) as bar:
        for batch, index_BxR in packed:
            with jax.set_mesh(mesh):
                query_BxRxD = np.asarray(read(trained.params, to_mesh(batch, mesh)))
            queries.append(query_BxRxD[batch.ret_valid_BxR])
            rets.append(index_BxR[batch.ret_valid_BxR])
            if sum(map(len, rets)) >= QUERIES:
                yield np.concatenate(queries), np.concatenate(rets)
                bar.update(sum(map(len, rets)))
                queries, rets = [], []
        if sum(map(len, rets)):
            yield np.concatenate(queries), np.concatenate(rets)


def write(target: Path, dataset: Dataset, mined: Mined, vectors: Vectors) -> None:
    """The data set as JSONL, splits included; mined hard negatives replace what an example had.

    Raises UserError where the disk is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    passages = map(dataclasses.asdict, dataset.passages.values())
    _write_lines(target.with_name(f"{dataset.name}.passages.jsonl"), passages)
    split_of = {int(row): split for split, rows in dataset.splits.items() for row in rows}

    def example(row: int) -> Example:
        given = dataclasses.replace(dataset.examples[row], split=split_of[row])
        if row not in mined.rows:
            return given
        ids = tuple(vectors.ids[found] for found in mined.rows[row])
        return dataclasses.replace(given, hard_negatives=ids)

    rows = range(len(dataset.examples))
    _write_lines(target, (_filled(example(row)) for row in rows))


def _filled(example: Example) -> dict[str, Any]:
    """Its fields but for those that are empty and may be absent."""
    needed = ("id", "task", "question", "answers", "evidence")
    fields = dataclasses.asdict(example).items()
    return {name: value for name, value in fields if value or name in needed}


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
