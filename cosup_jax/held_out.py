"""Held-out evaluation: next-token nats, and retrieval over the whole corpus of a set."""

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from cosup_jax import cosup, sharding
from cosup_jax.config import Config
from cosup_jax.data import tokens
from cosup_jax.data.batch import batch_shape
from cosup_jax.data.markup import EVIDENCE, TARGET, passage_text
from cosup_jax.data.pipeline import PackedExamples, pack_examples
from cosup_jax.data.schema import Dataset, Example
from cosup_jax.data.sources import eval_sets
from cosup_jax.data.storage import span
from cosup_jax.data.tokens import TokenStore
from cosup_jax.evaluation import retrieval
from cosup_jax.evaluation.baselines import BM25, Bigram, bm25_ranks
from cosup_jax.runtime.notices import safepoint
from cosup_jax.search import index
from cosup_jax.search.corpus import Corpus
from cosup_jax.search.encoder import Encoder, to_mesh
from cosup_jax.towers import Towers, gen_hidden, query_vectors

_log = logging.getLogger(__name__)


class HeldOut(NamedTuple):
    """One evaluation set, packed once."""

    name: str
    dataset: Dataset  # where the passages searched come from
    examples: list[Example]  # the questions asked
    store: TokenStore
    questions: Sequence[PackedExamples]  # Gen rows
    corpus: Corpus
    seen: np.ndarray  # bool, of each [Ret]: training reads its passage as evidence too

    def split_sample(self, most: int = 1000) -> list[Example]:
        """Examples of the whole split that questions are drawn from, at even distances."""
        rows = self.dataset.splits[self.name.removeprefix(f"{self.dataset.name}.")]
        return [self.dataset.examples[row] for row in rows[:: -(-len(rows) // most)]]

    def evidence(self, question: int) -> list[int]:
        """Rows of the corpus that a question's evidence is, each once, in the order needed."""
        return self.rows(self.examples[question].evidence)

    def rows(self, ids: Iterable[str]) -> list[int]:
        """Rows of the corpus that passages are, each once."""
        rows = (self.corpus.row_of[self.dataset.passages.row(id)] for id in ids)
        return list(dict.fromkeys(map(int, rows)))

    def evidence_seen(self, question: int) -> bool | None:
        """Whether training reads all of it as evidence too; None of a question without [Ret]."""
        seen = self.seen[span(self.store.ret_offsets, question)]
        return bool(seen.all()) if len(seen) else None


def held_out_sets(
    datasets: Sequence[Dataset],
    tokenizers: Any,
    config: Config,
    directory: Path,
    train: TokenStore,
    left_out: np.ndarray,
) -> list[HeldOut]:
    """Every held-out split, at most eval.examples questions of each, drawn by eval.seed.

    Args:
      tokenizers: with `gen` and `ctx`.
      directory: of the token stores.
      train: what training reads, but for the rows `left_out` by its plan.

    Raises:
      UserError: a source holds nothing out, or two sets have one name.
    """
    found = []
    for name, (dataset, split) in eval_sets(datasets).items():
        asked = _ask(name, dataset, split, tokenizers, config, directory)
        if asked is None:
            continue
        rows, store, packed = asked
        examples = [dataset.examples[row] for row in rows]
        corpus = Corpus(dataset, store, batch_shape(config))
        seen = tokens.seen_in(store, train, left_out)
        found.append(HeldOut(name, dataset, examples, store, packed, corpus, seen))
    return found


def asked_sets(
    datasets: Sequence[Dataset],
    tokenizers: Any,
    config: Config,
    directory: Path,
    train: TokenStore,
    left_out: np.ndarray,
) -> list[HeldOut]:
    """Every held-out split, to be answered: eval.questions of each, in the order in which eval.seed
    draws them, however long. Not packed, as nothing of their answers is read.

    Args and errors as those of `held_out_sets`.
    """
    found = []
    for name, (dataset, split) in eval_sets(datasets).items():
        rows = dataset.splits[split]
        order = np.random.default_rng(config.eval.seed).permutation(len(rows))
        chosen = rows[order[: config.eval.questions or None]]
        part = dataclasses.replace(dataset, splits={split: chosen})
        store = tokens.tokenize([(part, 1.0)], *tokenizers, config, directory, split=split)
        examples = [dataset.examples[row] for row in chosen]
        corpus = Corpus(dataset, store, batch_shape(config))
        seen = tokens.seen_in(store, train, left_out)
        found.append(HeldOut(name, dataset, examples, store, (), corpus, seen))
    return found


def _ask(
    name: str, dataset: Dataset, split: str, tokenizers: Any, config: Config, directory: Path
) -> tuple[np.ndarray, TokenStore, list[PackedExamples]] | None:
    """eval.examples questions of a split that fit a row: their rows, tokens, and packed.

    None if there is no such question.
    """
    rows, wanted = dataset.splits[split], config.eval.examples
    order = rows[np.random.default_rng(config.eval.seed).permutation(len(rows))]
    unfit = np.zeros(0, rows.dtype)
    while True:
        chosen = np.sort(order[~np.isin(order, unfit)][:wanted])
        if not len(chosen):
            return None
        part = dataclasses.replace(dataset, splits={split: chosen})
        store = tokens.tokenize([(part, 1.0)], *tokenizers, config, directory, split=split)
        packed, too_long = pack_examples(
            store, batch_shape(config), config.data.packing, config.loss.mask_evidence
        )
        if not len(too_long):
            return chosen, store, list(packed)
        unfit = np.append(unfit, chosen[too_long])
        _log.warning("%s: %d questions drawn fit no row, others stand in", name, len(too_long))


def baselines(sets: Sequence[HeldOut], train: TokenStore, config: Config) -> dict[str, Any]:
    """{"BM25": {set: retrieval}, "bigram": {set: ntp_nats_per_token}} on the same questions."""
    vocab_size = 1 + max(int(store.gen_tokens.max()) for store in (train, *(s.store for s in sets)))
    bigram = Bigram(vocab_size)
    bigram.fit(*_supervised_pairs(train, config.loss.mask_evidence))
    indexes: dict[str, BM25] = {}  # by source, whose sets share a corpus
    found = {"BM25": {}, "bigram": {}}
    for held_out in sets:
        previous, following = _supervised_pairs(held_out.store, config.loss.mask_evidence)
        nats = bigram.nats(previous, following) / max(len(following), 1)
        found["bigram"][held_out.name] = {"ntp_nats_per_token": nats}
        store, examples, corpus = held_out.store, held_out.examples, held_out.corpus
        asked = np.repeat(np.arange(len(examples)), np.diff(store.ret_offsets))
        if len(asked):
            source = held_out.dataset.version
            if source not in indexes:
                indexes[source] = BM25([passage_text(passage) for passage in corpus.passages])
            questions = [examples[i].question for i in asked]
            ranks = bm25_ranks(indexes[source], questions, corpus.row_of[store.ret_passages])
            found["BM25"][held_out.name] = retrieval.summary(ranks)
    return found


def _supervised_pairs(store: TokenStore, mask_evidence: bool) -> tuple[np.ndarray, np.ndarray]:
    """Every supervised token of a store and the token before it."""
    roles = store.gen_roles[1:]
    wanted = (roles == TARGET) | ((roles == EVIDENCE) & (not mask_evidence))
    wanted[store.gen_offsets[1:-1] - 1] = False  # the first token of an example follows nothing
    return store.gen_tokens[:-1][wanted], store.gen_tokens[1:][wanted]


class Evaluator:
    """Compiled once; parameters are arguments."""

    def __init__(self, mesh: Mesh, towers: Towers, config: Config):
        self._mesh = mesh
        self._encoder = Encoder(mesh, towers, config)

        def read(params, batch):
            hidden_BxTxD = gen_hidden(params, batch, towers)
            nats, weight = cosup.next_token(params, hidden_BxTxD, batch, towers, config)
            return nats, weight, query_vectors(hidden_BxTxD, batch, config)

        self._read = jax.jit(read, out_shardings=sharding.replicated(mesh))

    def vectors(self, params: dict, held_out: HeldOut) -> np.ndarray:
        """[N, D] vectors of the set's corpus."""
        return self._encoder.corpus(params, held_out.corpus, len(held_out.corpus))

    def scores(self, params: dict, sets: Sequence[HeldOut]) -> dict[str, float]:
        """`eval/<name>/<metric>` of every set; means over supervised tokens and over [Ret]s.

        top1_in_batch ranks a query against the passages wanted in its own packed batch.
        """
        found, corpora = {}, {}
        for held_out in sets:
            source = held_out.dataset.version  # sets of one source share its corpus
            if source not in corpora:
                corpora[source] = self.vectors(params, held_out)
            scores = self._score(params, held_out, corpora[source])
            found |= {f"eval/{held_out.name}/{key}": value for key, value in scores.items()}
        return found

    def queries(self, params: dict, held_out: HeldOut) -> tuple[np.ndarray, np.ndarray]:
        """[Q, D] the query at every [Ret] of a set, and [Q] which row of `store.ret_passages` each
        asks for."""
        parts = [(query_QxD, rets_Q) for *_, query_QxD, rets_Q in self._parts(params, held_out)]
        query_QxD, rets_Q = map(np.concatenate, zip(*parts, strict=True))
        return query_QxD, rets_Q

    def _parts(self, params: dict, held_out: HeldOut) -> Iterator[tuple]:
        """Of each packed batch: summed nats, supervised tokens, and its part of `queries`."""
        for batch, index_BxR in held_out.questions:
            safepoint()
            with jax.set_mesh(self._mesh):
                part = jax.device_get(self._read(params, to_mesh(batch, self._mesh)))
            asked = batch.ret_valid_BxR
            yield float(part[0]), float(part[1]), part[2][asked], index_BxR[asked]

    def _score(self, params: dict, held_out: HeldOut, corpus_NxD: np.ndarray) -> dict[str, float]:
        nats = weight = right = 0.0
        queries, rets = [], []
        for part_nats, part_weight, query_QxD, asked in self._parts(params, held_out):
            nats, weight = nats + part_nats, weight + part_weight
            queries.append(query_QxD)
            rets.append(asked)
            rows = held_out.corpus.row_of[held_out.store.ret_passages[asked]]
            wanted, own = np.unique(rows, return_inverse=True)
            if len(rows):
                right += np.sum(np.argmax(query_QxD @ corpus_NxD[wanted].T, axis=1) == own)
        scores, rets = {"ntp_nats_per_token": nats / max(weight, 1.0)}, np.concatenate(rets)
        if len(rets):
            gold = held_out.corpus.row_of[held_out.store.ret_passages[rets]]
            ranks = index.ranks(np.concatenate(queries), corpus_NxD, gold)
            scores |= retrieval.summary(ranks) | {"top1_in_batch": float(right / len(gold))}
            seen = held_out.seen[rets]
            if seen.any() and not seen.all():
                for name, part in (("seen", ranks[seen]), ("unseen", ranks[~seen])):
                    summary = retrieval.summary(part).items()
                    scores |= {f"{metric}_{name}": value for metric, value in summary}
        return scores
