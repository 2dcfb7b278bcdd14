"""What a trained model has to beat: BM25 for retrieval, a bigram model for next tokens."""

import logging
from collections.abc import Sequence

import bm25s
import numpy as np

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs every index it builds


class BM25:
    """An index of texts (bm25s, its defaults, no stop words), also of none and of wordless ones."""

    def __init__(self, texts: Sequence[str]):
        self._index, self._count = bm25s.BM25(), len(texts)
        words = bm25s.tokenize(list(texts), stopwords=None, show_progress=False)
        self._any = any(words.ids)  # bm25s can index no texts without a word
        if self._any:
            self._index.index(words, show_progress=False)

    def scores(self, query: str) -> np.ndarray:
        """[N] of every text; 0 where no word is shared."""
        (words,) = bm25s.tokenize([query], stopwords=None, return_ids=False, show_progress=False)
        known = words and self._any
        return self._index.get_scores(words) if known else np.zeros(self._count, np.float32)


def bm25_ranks(bm25: BM25, queries: Sequence[str], gold: np.ndarray) -> np.ndarray:
    """Rank, from 1, of each query's gold passage under BM25.

    Passages of equal score are ordered by row, as in `index.search`.
    """
    found = []
    for query, row in zip(queries, gold, strict=True):
        scores = bm25.scores(query)
        ahead = np.sum(scores > scores[row]) + np.sum(scores[:row] == scores[row])
        found.append(1 + int(ahead))
    return np.array(found)


class Bigram:
    """p(next | previous), smoothed towards add-one unigrams with the weight of one observation."""

    def __init__(self, vocab_size: int):
        self.unigram_V = np.ones(vocab_size)
        self.pairs: dict[int, int] = {}
        self.previous_V = np.zeros(vocab_size)

    def fit(self, previous: np.ndarray, following: np.ndarray) -> None:
        """Counts aligned token ids, each following[i] right after previous[i]."""
        self.unigram_V += np.bincount(following, minlength=len(self.unigram_V))
        self.previous_V += np.bincount(previous, minlength=len(self.previous_V))
        keys, counts = np.unique(self._key(previous, following), return_counts=True)
        for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
            self.pairs[key] = self.pairs.get(key, 0) + count

    def nats(self, previous: np.ndarray, following: np.ndarray) -> float:
        """Sum of -log p(following | previous)."""
        unigram_V = self.unigram_V / self.unigram_V.sum()
        keys = self._key(previous, following).tolist()
        together = np.array([self.pairs.get(key, 0) for key in keys])
        p = (together + unigram_V[following]) / (self.previous_V[previous] + 1.0)
        return float(-np.log(p).sum())

    def _key(self, previous: np.ndarray, following: np.ndarray) -> np.ndarray:
        return previous.astype(np.int64) * len(self.unigram_V) + following
