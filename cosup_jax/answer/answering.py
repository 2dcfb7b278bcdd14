"""Questions of a held-out set, answered in one of the arms of an evaluation."""

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from cosup_jax.answer import cited, retrieve
from cosup_jax.answer.asked import Arm
from cosup_jax.answer.decode import Decoder, Found, Retriever
from cosup_jax.config import Config
from cosup_jax.data import markup
from cosup_jax.data.storage import Chosen
from cosup_jax.data.tokenizer import Tokenizer
from cosup_jax.evaluation.baselines import BM25
from cosup_jax.held_out import HeldOut
from cosup_jax.search import index
from cosup_jax.towers import Towers

RANKED = 10  # passages of each search that are kept for scores; what is shown may be fewer
Record = dict[str, Any]
RECORD = {  # how a record is built, as far as it is scored
    "id": "",
    "output": "",
    "text": "",
    "raw": "",
    "answer": "",
    "ranking": [""],
    "spans": [{"text": "", "number": 0, "passage": ""}],
    "sources": [{"number": 0, "id": "", "title": "", "text": ""}],
    "retrieved": [{"number": 0, "id": ""}],
}


class Answering:
    """Compiled once; parameters are arguments."""

    def __init__(
        self, mesh: Mesh, towers: Towers, config: Config, tokenizer: Tokenizer, most: int = 0
    ):
        """`most` questions at once instead of generate.batch_size; `tokenizer` is Gen's."""
        self._decoder = Decoder(mesh, towers, config, tokenizer, most)
        self._mesh, self._config, self._tokenizer = mesh, config, tokenizer

    def answers(
        self,
        params: dict,
        held_out: HeldOut,
        questions: Sequence[int],
        arm: Arm,
        vectors: np.ndarray | index.Corpus,
        bm25: BM25 | None = None,
        queries: Callable[[Sequence[np.ndarray]], np.ndarray] | None = None,
    ) -> Iterator[Record]:
        """A record for each question, in their order, as soon as it is there.

        `vectors` are those of the set's corpus, in memory or on disk; `bm25` has indexed it, for
        the arm of that name. Where another pair retrieves, the vectors are its own, and `queries`
        makes its [Q, D] of texts that end in [Ret], as token ids.

        Beside the fields of `cited.record`: `answer`, the short one that KILT's scores compare,
        and `ranking`, ids of passages in the order in which they were found.
        """
        if not questions:
            return
        ranked = self._retriever(held_out, questions, arm, vectors, bm25, queries)
        examples = [held_out.examples[question] for question in questions]
        prompts = [markup.prompt(example, self._tokenizer) for example in examples]
        passages = ranked.passages if ranked else held_out.corpus.passages
        longest = self._config.data.max_ctx_tokens
        written = self._decoder.answers(params, prompts, ranked)
        for number, (example, answer) in enumerate(zip(examples, written, strict=True)):
            rows = ranked.ranking(number) if ranked else []
            yield cited.record(example, answer, passages, self._tokenizer, longest) | {
                "answer": short_answer(cited.parts(answer, self._tokenizer)),
                "ranking": [passages[row].id for row in rows],
            }

    def _retriever(
        self,
        held_out: HeldOut,
        questions: Sequence[int],
        arm: Arm,
        vectors: Any,
        bm25: BM25 | None,
        queries: Callable | None = None,
    ) -> "_Ranked | None":
        """Of an arm, for some questions, numbered as they stand here."""
        passages = held_out.corpus.passages
        examples = [held_out.examples[question] for question in questions]
        evidence = [held_out.evidence(question) for question in questions]
        if arm.name == "none":
            return None
        if arm.name == "gold":
            return _Ranked(retrieve.Gold(passages, evidence))
        if arm.name == "wrong":
            return _Ranked(retrieve.Wrong(passages, examples, evidence))
        if arm.name == "bm25":
            words, each = [example.question for example in examples], self._config.generate.passages
            return _RankedByWords(retrieve.Lexical(passages, bm25, words, each), bm25, words)
        if arm.rows is not None:
            passages = Chosen(passages.__getitem__, arm.rows)
            in_memory = isinstance(vectors, np.ndarray)
            vectors = vectors[arm.rows] if in_memory else vectors.take(arm.rows)
        if arm.name == "candidates":
            rows = [held_out.rows(example.candidates) for example in examples]
            own = retrieve.Candidates(passages, vectors, rows)
        else:
            own = retrieve.Search(passages, vectors, self._mesh)
        return _Ranked(retrieve.Separate(queries, own) if queries else own, deeper=True)


def short_answer(parts: Sequence[cited.Part]) -> str:
    """What stands behind the last grounded span, or, where nothing does, that span.

    Training text ends so: with an answer that its evidence does not spell out, or with the span
    that is the answer.
    """
    said = [part for part in parts if part.text.strip()]
    return said[-1].text.strip() if said else ""


def bm25_rankings(held_out: HeldOut, facts: Sequence[Record], bm25: BM25) -> list[Record]:
    """`facts` of all questions with what BM25 finds by each as it stands, the first as shown."""
    passages, found = held_out.corpus.passages, []
    for fact in facts:
        ranked = [passages[row] for row in _best(bm25, fact["question"])]
        shown = [{"id": p.id, "title": p.title, "text": p.text} for p in ranked[:1]]
        ranking = {"ranking": [passage.id for passage in ranked], "answer": ""}
        found.append(fact | ranking | {"sources": shown})
    return found


class _Ranked:
    """A retriever that remembers what it found, deeper than it shows."""

    def __init__(self, retriever: Retriever, deeper: bool = False):
        """`deeper`: RANKED passages are sought, however few are shown."""
        self.passages, self.limit = retriever.passages, retriever.limit
        self._retriever, self._depth = retriever, RANKED if deeper else 1
        self._found: dict[int, list[list[int]]] = collections.defaultdict(list)

    def __call__(self, query_QxD, questions, turns, k: int, texts=()) -> list[list[Found]]:
        found = self._retriever(query_QxD, questions, turns, max(k, self._depth), texts)
        for question, ranked in zip(questions, found, strict=True):
            self._found[question].append([one.row for one in ranked])
        return [ranked[:k] for ranked in found]

    def ranking(self, question: int) -> list[int]:
        """Rows, each once: the first of each search, then the second of each, and so on."""
        by_rank = itertools.zip_longest(*self._found[question])
        return [row for row in dict.fromkeys(itertools.chain(*by_rank)) if row is not None]


class _RankedByWords(_Ranked):
    """BM25, which ranks by the question alone, so that one ranking serves all its searches."""

    def __init__(self, retriever: Retriever, bm25: BM25, questions: Sequence[str]):
        super().__init__(retriever)
        self._bm25, self._questions = bm25, questions

    def ranking(self, question: int) -> list[int]:
        """Rows, best first; none where nothing was sought."""
        return _best(self._bm25, self._questions[question]) if self._found[question] else []


def _best(bm25: BM25, question: str) -> list[int]:
    return np.argsort(-bm25.scores(question), kind="stable")[:RANKED].tolist()
