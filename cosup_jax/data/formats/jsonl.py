"""Our own format: DIR/x.jsonl with one example a line, DIR/x.passages.jsonl with its corpus."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from cosup_jax.data.problems import BadRow, Problems
from cosup_jax.data.rows import Row, existing, read_lines
from cosup_jax.data.schema import Example, Passage
from cosup_jax.errors import UserError

_FIELDS = {
    cls: tuple(field.name for field in dataclasses.fields(cls)) for cls in (Example, Passage)
}


def files(where: str) -> list[Path]:
    """The examples and, beside them, the corpus. Raises UserError if either is not there."""
    path = existing(where, "check the path")
    ending = ".jsonl.gz" if path.name.endswith(".jsonl.gz") else ".jsonl"
    stem = path.name.removesuffix(ending)
    for other in (ending, ".jsonl", ".jsonl.gz"):
        passages = path.with_name(f"{stem}.passages{other}")
        if passages.is_file():
            return [path, passages]
    raise UserError(f"{path.with_name(stem + '.passages.jsonl')}: No such file; {path} needs it")


def read(where: str, problems: Problems) -> Iterator[tuple[str, Passage | Example]]:
    """All passages, then all examples, each with its FILE:LINE. Raises UserError for files."""
    examples, passages = files(where)
    for source, make in ((passages, passage), (examples, _example)):
        for row in read_lines(source, problems):
            try:
                record = make(row)
            except BadRow as error:
                problems.add(error.kind, row.where, row.id, error.reason)
                continue
            _note_typing_errors(row, _FIELDS[type(record)], problems)
            yield row.where, record


def passage(row: Row) -> Passage:
    return Passage(row.text("id"), row.text("title", default="", empty=True), row.text("text"))


def _example(row: Row) -> Example:
    return Example(
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
        answer_groups=row.groups("answer_groups"),
    )


def _note_typing_errors(row: Row, known: tuple[str, ...], problems: Problems) -> None:
    for name, near in row.misspelt(known):
        reason = f"{name!r} is ignored; did you mean {near!r}?"
        problems.add("unknown_field", row.where, row.id, reason)
