"""Where passages come from at [Ret]: the arms that an evaluation compares.

All but `Search` and `Candidates` ignore Gen's query, and so score what the trained retrieval adds.
`Separate` alone reads the text itself.
"""

import zlib
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from cosup_jax.answer.decode import Found, Retriever
from cosup_jax.data.markup import passage_text
from cosup_jax.data.schema import Example, Passage
from cosup_jax.evaluation.baselines import BM25
from cosup_jax.evaluation.text import answer_present
from cosup_jax.search import index

ALWAYS = 2**31 - 1  # a limit that no budget reaches


class Search:
    """The nearest of all passages."""

    def __init__(
        self,
        passages: Sequence[Passage],
        corpus: np.ndarray | index.Corpus,
        mesh: Mesh | None = None,
    ):
        """`corpus` is [N, D], or vectors on disk, row by row those of `passages`."""
        self.passages, self._mesh = passages, mesh
        in_memory = isinstance(corpus, np.ndarray)
        self._corpus = index.resident(corpus, mesh) if in_memory else corpus

    def limit(self, question: int) -> int:
        """As often as the budget allows."""
        return ALWAYS if len(self.passages) else 0

    def __call__(self, query_QxD, questions, turns, k: int, texts=()) -> list[list[Found]]:
        """By `index.search`."""
        scores, rows = index.search(query_QxD, self._corpus, k, self._mesh)
        return [_found(*pair) for pair in zip(rows, scores, strict=True)]


class Candidates:
    """The nearest of each question's own candidates, as KILT's and ALCE's top 100."""

    def __init__(
        self,
        passages: Sequence[Passage],
        corpus: np.ndarray | index.Corpus,
        candidates: Sequence[Sequence[int]],
    ):
        """`candidates` are rows of the corpus, for each question."""
        self.passages, self._corpus = passages, corpus
        self._candidates = [np.unique(np.array(rows, np.int64)) for rows in candidates]

    def limit(self, question: int) -> int:
        """None without candidates."""
        return ALWAYS if len(self._candidates[question]) else 0

    def __call__(self, query_QxD, questions, turns, k: int, texts=()) -> list[list[Found]]:
        """Best first, equal scores by row."""
        found = []
        for query_D, question in zip(query_QxD, questions, strict=True):
            rows = self._candidates[question]
            array = isinstance(self._corpus, np.ndarray)
            vector_nxD = self._corpus[rows] if array else self._corpus.take(rows)
            score_n = vector_nxD @ query_D
            best = np.argsort(-score_n, kind="stable")[:k]
            found.append(_found(rows[best], score_n[best]))
        return found


class Separate:
    """`Search` or `Candidates` by another Gen's queries, over vectors of its own Ctx."""

    def __init__(self, queries: Callable[[Sequence[np.ndarray]], np.ndarray], retriever: Retriever):
        """`queries` makes [Q, D] of texts; `retriever` holds the vectors that go with them."""
        self.passages, self.limit = retriever.passages, retriever.limit
        self._queries, self._retriever = queries, retriever

    def __call__(self, query_QxD, questions, turns, k: int, texts) -> list[list[Found]]:
        """As `retriever` ranks; Gen's own query counts for nothing."""
        return self._retriever(self._queries(texts), questions, turns, k, texts)


class Gold:
    """The evidence in the order in which it is needed, one passage at each [Ret]."""

    def __init__(self, passages: Sequence[Passage], evidence: Sequence[Sequence[int]]):
        """`evidence` are rows of the corpus, for each question."""
        self.passages, self._evidence = passages, evidence

    def limit(self, question: int) -> int:
        """Once for each passage."""
        return len(self._evidence[question])

    def __call__(self, query_QxD, questions, turns, k: int, texts=()) -> list[list[Found]]:
        """Unscored."""
        pairs = zip(questions, turns, strict=True)
        return [[Found(int(self._evidence[question][turn]), None)] for question, turn in pairs]


class Lexical:
    """BM25 over all passages by the words of the question, whatever has been written since.

    Each further [Ret] of a question gets the passages after those that it has had.
    """

    def __init__(
        self, passages: Sequence[Passage], bm25: BM25, questions: Sequence[str], each: int = 1
    ):
        """`bm25` has indexed these passages, of which a [Ret] gets `each`."""
        self.passages, self._bm25, self._questions = passages, bm25, questions
        self._each = each

    def limit(self, question: int) -> int:
        """As often as there is another passage."""
        return -(-len(self.passages) // self._each)

    def __call__(self, query_QxD, questions, turns, k: int, texts=()) -> list[list[Found]]:
        """Best first, equal scores by row."""
        found = []
        for question, turn in zip(questions, turns, strict=True):
            score_N = self._bm25.scores(self._questions[question])
            first = turn * self._each
            best = np.argsort(-score_N, kind="stable")[first : first + k]
            found.append(_found(best, score_N[best]))
        return found


class Wrong:
    """One passage of each question that is no evidence of it and holds none of its answers.

    Labels and letters of choices are no part of a passage: "no" is in "not", "A" in everything.
    """

    def __init__(
        self,
        passages: Sequence[Passage],
        examples: Sequence[Example],
        evidence: Sequence[Sequence[int]],
    ):
        """The same for the same corpus and question; `evidence` are rows, for each question."""
        self.passages = passages
        pairs = zip(examples, evidence, strict=True)
        self._rows = [self._wrong(example, set(rows)) for example, rows in pairs]

    def _wrong(self, example: Example, evidence: set[int]) -> int | None:
        first = zlib.crc32(example.question.encode())
        grouped = [answer for group in example.answer_groups for answer in group]
        answers = () if example.kind in ("label", "choice") else (*example.answers, *grouped)
        for row in ((first + n) % len(self.passages) for n in range(len(self.passages))):
            text = passage_text(self.passages[row])
            if row not in evidence and not answer_present(text, answers):
                return row
        return None

    def limit(self, question: int) -> int:
        """None where every passage is right."""
        return 0 if self._rows[question] is None else ALWAYS

    def __call__(self, query_QxD, questions, turns, k: int, texts=()) -> list[list[Found]]:
        """Unscored."""
        return [[Found(self._rows[question], None)] for question in questions]


def _found(rows: np.ndarray, scores: np.ndarray) -> list[Found]:
    return [Found(int(r), float(s)) for r, s in zip(rows, scores, strict=True) if r >= 0]
