"""Examples, passages and data sets, as every source delivers them."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from cosup_jax.data.storage import id_order


@dataclasses.dataclass(frozen=True)
class Passage:
    """One unit of retrieval; Ctx reads its title and text."""

    id: str
    title: str  # may be empty
    text: str


@dataclasses.dataclass(frozen=True)
class Example:
    """One question with its answers and the passages that ground them."""

    id: str
    task: str  # open_qa, slot_filling, fact_check, multi_hop, ...
    question: str
    answers: tuple[str, ...]  # any of them is right
    evidence: tuple[str, ...]  # passage ids in the order in which they are needed; may be empty
    split: str = "train"  # train, or the held-out set it belongs to
    long_answer: str = ""  # empty: the first answer says it all
    support: tuple[tuple[int, int] | None, ...] = ()  # per evidence: [start, end) in its text
    kind: str = ""  # span (an answer is a string of the evidence), label, ...
    hard_negatives: tuple[str, ...] = ()  # passage ids
    candidates: tuple[str, ...] = ()  # passage ids this question is ranked over
    output: str = ""  # what to generate, with [Ret:ID] where passage ID is inserted
    answer_groups: tuple[tuple[str, ...], ...] = ()  # one answer of each is wanted; for scores

    @classmethod
    def of(cls, fields: Sequence) -> "Example":
        """From its fields in order, lists where JSON has made lists of tuples."""
        tuples = lambda value: tuple(map(tuples, value)) if isinstance(value, list) else value
        return cls(*map(tuples, fields))


class Passages(Mapping[str, Passage]):
    """A corpus in its own order: by id, or by row."""

    def __init__(self, passages: Iterable[Passage]):
        self._passages = list(passages)
        self._rows = {passage.id: row for row, passage in enumerate(self._passages)}

    def row(self, id: str) -> int:
        """Raises KeyError if no passage has this id."""
        return self._rows[id]

    def at(self, row: int) -> Passage:
        return self._passages[row]

    def by_id(self) -> np.ndarray:
        """int64 [N]: the rows in the order of ids, by code points."""
        return id_order(self)

    def __getitem__(self, id: str) -> Passage:
        return self.at(self.row(id))

    def __contains__(self, id: object) -> bool:
        try:
            self.row(id)
        except KeyError:
            return False
        return True

    def __len__(self) -> int:
        return len(self._passages)

    def __iter__(self) -> Iterator[str]:
        return (passage.id for passage in self._passages)

    def values(self) -> Iterator[Passage]:
        """In the order of rows, one after the other."""
        return map(self.at, range(len(self)))


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A named set of examples together with its corpus."""

    name: str
    version: str  # changes whenever the content or the splits may
    examples: Sequence[Example]
    passages: Passages
    splits: Mapping[str, np.ndarray]  # rows in `examples`; "train", and what is held out

    @classmethod
    def of(
        cls, name: str, version: str, examples: Sequence[Example], passages: Iterable[Passage]
    ) -> "Dataset":
        """From rows in memory."""
        return cls(name, version, examples, Passages(passages), splits_of(examples))

    def rows(self, split: str) -> Iterator[Example]:
        """The examples of a split, one after the other."""
        return (self.examples[row] for row in self.splits.get(split, ()))


def splits_of(examples: Iterable[Example]) -> dict[str, np.ndarray]:
    """Rows of each split, in the order of first appearance."""
    rows: dict[str, list[int]] = {}
    for row, example in enumerate(examples):
        rows.setdefault(example.split, []).append(row)
    return {split: np.array(found, np.int64) for split, found in rows.items()}
