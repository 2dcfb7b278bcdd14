"""Held-out evaluation: next-token nats, and retrieval over the whole corpus of a set."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from cosup_jax import cosup, index, sharding
from cosup_jax.config import Config
from cosup_jax.data import tokens
from cosup_jax.data.batch import Batch, batch_shape
from cosup_jax.data.blocks import canonical
from cosup_jax.data.markup import EVIDENCE, TARGET, passage_text
from cosup_jax.data.pipeline import PackedPassages, pack_examples, pack_passages
from cosup_jax.data.schema import Dataset, Passage
from cosup_jax.data.sources import eval_sets
from cosup_jax.data.tokens import TokenStore
from cosup_jax.encode import Encoder, to_mesh
from cosup_jax.errors import UserError
from cosup_jax.evaluation import retrieval
from cosup_jax.evaluation.baselines import Bigram, bm25_ranks
from cosup_jax.towers import Towers, gen_hidden, query_vectors

_log = logging.getLogger(__name__)


class HeldOut(NamedTuple):
    """One evaluation set, packed once."""

    name: str
    dataset: Dataset  # the questions asked, and the passages searched
    store: TokenStore
    questions: Sequence[Batch]  # Gen rows
    corpus: Sequence[PackedPassages]  # Ctx rows, every distinct passage once
    row_of: dict[tuple[int, int], int]  # passage identity -> corpus row
    passages: list[Passage]  # of each corpus row


def held_out_sets(
    datasets: Sequence[Dataset], tokenizers: Any, config: Config, directory: Path
) -> list[HeldOut]:
    """Every held-out split, at most eval.examples questions of each, drawn by the seed.

    Args:
      tokenizers: with `gen` and `ctx`.
      directory: of the token stores.

    Raises:
      UserError: a source holds nothing out, or two sets have one name.
    """
    found, shape = [], batch_shape(config)
    for dataset in datasets:
        sets = eval_sets(dataset)
        if not sets:
            raise UserError(
                f"evaluation source {dataset.name}: every row has split 'train'; give held-out "
                "rows another split, such as 'dev'"
            )
        for name, examples in sets.items():
            if name in {held_out.name for held_out in found}:
                raise UserError(
                    f"two evaluation sets are called {name}; rename one of the files in "
                    "config.data.eval"
                )
            order = np.random.default_rng(config.seed).permutation(len(examples))
            chosen = [examples[i] for i in sorted(order[: config.eval.examples])]
            store, packed, left_out = _asked(dataset, chosen, tokenizers, config, directory)
            if len(left_out):
                _log.warning("%s: %d questions fit no row and are left out", name, len(left_out))
                chosen = [example for i, example in enumerate(chosen) if i not in left_out]
                if not chosen:
                    continue
                store, packed, _ = _asked(dataset, chosen, tokenizers, config, directory)
            asked = dataclasses.replace(dataset, examples=chosen)
            rows = np.unique(canonical(store.identities))
            corpus = list(pack_passages([store.ctx[row] for row in rows], shape))
            row_of = {tuple(pair): i for i, pair in enumerate(store.identities[rows].tolist())}
            texts = list(dataset.passages.values())
            found.append(
                HeldOut(
                    *(name, asked, store, [item.batch for item in packed], corpus, row_of),
                    [texts[row] for row in rows],
                )
            )
    return found


def _asked(dataset: Dataset, examples: list, tokenizers: Any, config: Config, directory: Path):
    """Token store and packed rows of these questions, and which of them fit no row."""
    dataset = dataclasses.replace(dataset, examples=examples)
    split = examples[0].split
    store = tokens.tokenize([(dataset, 1.0)], *tokenizers, config, directory, split=split)
    data = config.data
    packed, left_out = pack_examples(
        store, batch_shape(config), data.packing, config.loss.mask_evidence
    )
    return store, list(packed), set(left_out.tolist())


def baselines(sets: Sequence[HeldOut], train: TokenStore, config: Config) -> dict[str, Any]:
    """{"BM25": {set: retrieval}, "bigram": {set: ntp_nats_per_token}} on the same questions."""
    vocab_size = 1 + max(int(store.gen_tokens.max()) for store in (train, *(s.store for s in sets)))
    bigram = Bigram(vocab_size)
    bigram.fit(*_supervised_pairs(train, config.loss.mask_evidence))
    found = {"BM25": {}, "bigram": {}}
    for held_out in sets:
        previous, following = _supervised_pairs(held_out.store, config.loss.mask_evidence)
        nats = bigram.nats(previous, following) / max(len(following), 1)
        found["bigram"][held_out.name] = {"ntp_nats_per_token": nats}
        store, examples = held_out.store, held_out.dataset.examples
        asked = np.repeat(np.arange(len(examples)), np.diff(store.ret_offsets))
        if len(asked):
            ids = store.identities[store.ret_passages].tolist()
            ranks = bm25_ranks(
                [examples[i].question for i in asked],
                [passage_text(passage) for passage in held_out.passages],
                np.array([held_out.row_of[tuple(pair)] for pair in ids]),
            )
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
        return self._encoder.corpus(params, held_out.corpus, len(held_out.passages))

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

    def _score(self, params: dict, held_out: HeldOut, corpus_NxD: np.ndarray) -> dict[str, float]:
        nats = weight = right = 0.0
        queries, gold = [], []
        for batch in held_out.questions:
            with jax.set_mesh(self._mesh):
                part = jax.device_get(self._read(params, to_mesh(batch, self._mesh)))
            nats, weight = nats + float(part[0]), weight + float(part[1])
            valid_BxR = batch.ret_valid_BxR
            ids = batch.ret_positives_BxRxSx2[:, :, 0][valid_BxR].tolist()
            rows = np.array([held_out.row_of[tuple(pair)] for pair in ids], np.int64)
            query_QxD = part[2][valid_BxR]
            queries.append(query_QxD)
            gold.append(rows)
            wanted, own = np.unique(rows, return_inverse=True)
            if len(rows):
                right += np.sum(np.argmax(query_QxD @ corpus_NxD[wanted].T, axis=1) == own)
        scores = {"ntp_nats_per_token": nats / max(weight, 1.0)}
        gold = np.concatenate(gold)
        if len(gold):
            ranks = index.ranks(np.concatenate(queries), corpus_NxD, gold)
            scores |= retrieval.summary(ranks) | {"top1_in_batch": float(right / len(gold))}
        return scores
