"""Examples, passages and data sets as every source delivers them, and the JSONL reader."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cosup_jax.errors import UserError

_INSERTED_PASSAGE = re.compile(r"\[Ret:([^\]]*)\]")
_SURROGATE = re.compile("[\ud800-\udfff]")


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


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A named set of examples together with its corpus."""

    name: str
    version: str  # changes whenever the content may
    examples: list[Example]
    passages: dict[str, Passage]


def passages_path(path: str | Path) -> Path:
    """DIR/x.jsonl -> DIR/x.passages.jsonl."""
    path = Path(path)
    return path.with_name(path.stem + ".passages.jsonl")


def read_jsonl(path: str | Path) -> Dataset:
    """Reads DIR/x.jsonl and the corpus beside it, DIR/x.passages.jsonl.

    Fields beyond the schema are ignored; null stands for an absent optional field.

    Raises:
      UserError: a missing or empty file, or the first bad line, as `file:line: id: reason`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"data source {str(path)!r} does not exist; check the path")
    digest = hashlib.sha256()
    passages: dict[str, Passage] = {}
    for row in _rows(passages_path(path), digest):
        passage = Passage(row.text("id"), row.text("title", empty=True), row.text("text"))
        row.refuse_if(passage.id in passages, "this id is taken by an earlier line")
        passages[passage.id] = passage
    examples: dict[str, Example] = {}
    for row in _rows(path, digest):
        example = _example(row, passages)
        row.refuse_if(example.id in examples, "this id is taken by an earlier line")
        examples[example.id] = example
    version = digest.hexdigest()[:12]
    return Dataset(path.stem, version, list(examples.values()), passages)


def _example(row: "_Row", passages: dict[str, Passage]) -> Example:
    example = Example(
        id=row.text("id"),
        task=row.text("task"),
        question=row.text("question"),
        answers=row.texts("answers"),
        evidence=row.texts("evidence"),
        split=row.text("split", default="train"),
        long_answer=row.text("long_answer", default="", empty=True),
        support=row.spans("support"),
        kind=row.text("kind", default="", empty=True),
        hard_negatives=row.texts("hard_negatives", default=()),
        candidates=row.texts("candidates", default=()),
        output=row.text("output", default="", empty=True),
    )
    row.refuse_if(not example.answers and not example.output, "'answers' is empty")
    inserted = _INSERTED_PASSAGE.findall(example.output)
    for field in ("evidence", "hard_negatives", "candidates"):
        for passage_id in getattr(example, field):
            row.refuse_if(passage_id not in passages, f"{field} {passage_id!r} has no passage")
    for passage_id in inserted:
        row.refuse_if(passage_id not in passages, f"output's [Ret:{passage_id}] has no passage")
    if example.support:
        count, expected = len(example.support), len(example.evidence)
        row.refuse_if(count != expected, f"'support' has {count} spans for {expected} evidence ids")
        for passage_id, span in zip(example.evidence, example.support, strict=True):
            length = len(passages[passage_id].text)
            bad = span is not None and not 0 <= span[0] < span[1] <= length
            row.refuse_if(bad, f"support {span} lies outside passage {passage_id!r} of {length}")
    return example


class _Row:
    """One JSON object with the place it came from; getters check presence and type."""

    def __init__(self, path: Path, number: int, fields: Any):
        self._where = f"{path}:{number}"
        self.refuse_if(not isinstance(fields, dict), "the line is not a JSON object")
        self._fields = fields
        if isinstance(fields.get("id"), str) and fields["id"]:
            self._where += f": {fields['id']}"

    def refuse_if(self, bad: bool, reason: str) -> None:
        if bad:
            raise UserError(f"{self._where}: {reason}")

    def text(self, name: str, default: str | None = None, empty: bool = False) -> str:
        value = self._value(name, default)
        self._check_text(name, value)
        self.refuse_if(not empty and not value.strip(), f"'{name}' is empty")
        return value

    def texts(self, name: str, default: tuple | None = None) -> tuple[str, ...]:
        values = self._value(name, default)
        self.refuse_if(not isinstance(values, (list, tuple)), f"'{name}' must be a list of strings")
        for value in values:
            self._check_text(name, value)
            self.refuse_if(not value.strip(), f"'{name}' holds an empty string")
        return tuple(values)

    def spans(self, name: str) -> tuple[tuple[int, int] | None, ...]:
        values = self._value(name, ())
        wanted = f"'{name}' must be a list of [start, end] or null"
        self.refuse_if(not isinstance(values, (list, tuple)), wanted)
        for span in values:
            pair = isinstance(span, list) and [type(offset) for offset in span] == [int, int]
            self.refuse_if(span is not None and not pair, wanted)
        return tuple(None if span is None else tuple(span) for span in values)

    def _value(self, name: str, default: Any) -> Any:
        value = self._fields.get(name)
        if value is None:
            self.refuse_if(default is None, f"'{name}' is missing")
            return default
        return value

    def _check_text(self, name: str, value: Any) -> None:
        self.refuse_if(not isinstance(value, str), f"'{name}' must be text, not {value!r:.60}")
        # JSON's \ud800 passes json.loads and breaks the tokenizer much later.
        self.refuse_if(
            _SURROGATE.search(value) is not None, f"'{name}' holds half a surrogate pair"
        )


def _rows(path: Path, digest) -> Iterator[_Row]:
    """The file's objects, blank lines skipped; its bytes are added to the digest."""
    found = False
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                digest.update(line)
                if line.strip():
                    found = True
                    yield _Row(path, number, _parse(path, number, line))
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise UserError(f"{path}: {reason}; DIR/x.jsonl needs DIR/x.passages.jsonl") from None
    if not found:
        raise UserError(f"{path}: the file is empty; it needs one JSON object a line")


def _parse(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: byte {error.start + 1} is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "a number too long or nesting too deep")
        raise UserError(f"{path}:{number}: not JSON ({reason})") from None
