"""Near duplicates by MinHash over word n-grams, as web corpora are deduplicated (Broder 1997)."""

import collections
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

BANDS, ROWS = 16, 4  # finds 0.8-alike texts with probability 1 - (1 - 0.8^4)^16 = 0.9998
_WORD = re.compile(r"\w+")


class NearDuplicates:
    """Finds, for a text, one of those it was built from with almost the same words."""

    def __init__(self, texts: Iterable[str], words: int = 3, alike: float = 0.8):
        """`words` to an n-gram; `alike` is the least Jaccard similarity of the n-grams."""
        self._words, self._alike = words, alike
        self._seeds = np.arange(1, BANDS * ROWS + 1, dtype=np.uint64)[:, None]
        self._buckets: list[dict[bytes, list[int]]] = [
            collections.defaultdict(list) for _ in range(BANDS)
        ]
        self._texts: list[str] = []
        for text in texts:
            for bucket, key in zip(self._buckets, self._keys(text), strict=False):
                bucket[key].append(len(self._texts))
            self._texts.append(text)

    def find(self, text: str) -> tuple[str, float] | None:
        """The most similar text and its similarity, if alike enough; the same text counts."""
        near = {
            number
            for bucket, key in zip(self._buckets, self._keys(text), strict=False)
            for number in bucket.get(key, ())
        }
        own = shingles(text, self._words)
        best = max(
            ((similarity(own, shingles(self._texts[n], self._words)), -n) for n in near),
            default=(0.0, 0),
        )
        return (self._texts[-best[1]], best[0]) if best[0] >= self._alike else None

    def _keys(self, text: str) -> Iterator[bytes]:
        found = np.fromiter(map(_hash, shingles(text, self._words)), np.uint64)
        if not len(found):
            return
        signature = _mixed(found + self._seeds).min(axis=1).reshape(BANDS, ROWS)
        yield from map(np.ndarray.tobytes, signature)


def shingles(text: str, words: int) -> set[str]:
    """The word n-grams of a text, lower case, punctuation aside; a shorter text is one of them."""
    found: Sequence[str] = _WORD.findall(text.lower())
    if len(found) < words:
        return {" ".join(found)} if found else set()
    return {" ".join(found[i : i + words]) for i in range(len(found) - words + 1)}


def similarity(a: set[str], b: set[str]) -> float:
    """Jaccard: shared over all."""
    return len(a & b) / len(a | b) if a or b else 0.0


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """A permutation of the 64-bit numbers that looks random (the finaliser of splitmix64)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    return numbers ^ (numbers >> np.uint64(31))


def _hash(shingle: str) -> int:
    return int.from_bytes(hashlib.blake2b(shingle.encode(), digest_size=8).digest(), "little")
