"""KILT: questions in DIR/x.jsonl, their evidence among the pages of a knowledge source.

A passage is one paragraph of a page; its id is the page's and the paragraph's number. The knowledge
source (5.9 million pages, 35 GB) is read once, page by page; what stays in memory is which
paragraphs the pages have that some question points to.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cosup_jax.data.problems import BadRow, Problems
from cosup_jax.data.rows import Row, existing, read_lines
from cosup_jax.data.schema import Example, Passage
from cosup_jax.errors import UserError

_TASKS = {  # by the beginning of the file's name
    "fever": "fact_check",
    "hotpotqa": "multi_hop",
    "structured_zeroshot": "slot_filling",
    "zsre": "slot_filling",
    "trex": "slot_filling",
    "eli5": "long_form",
    "wow": "dialog",
    "aidayago2": "entity_linking",
    "wned": "entity_linking",
    "cweb": "entity_linking",
    "blink": "entity_linking",
}
_SPLIT = re.compile(r"(?<![a-z])(train|dev|test)(?![a-z])")
_HEADING = "Section::::"
_Pages = dict[str, bytes]  # per page and paragraph: 1 where it is a passage


def files(where: str) -> list[Path]:
    """The questions and the knowledge source. Raises UserError if either is not there."""
    rows, separator, pages = where.partition("::")
    if not separator:
        raise UserError(
            f"kilt:{where} names no knowledge source; write "
            "kilt:DIR/nq-dev-kilt.jsonl::DIR/kilt_knowledgesource.json"
        )
    return [existing(path, "check the path") for path in (rows, pages)]


def read(where: str, problems: Problems) -> Iterator[tuple[str, Passage | Example]]:
    """All passages, then all examples, each with its FILE:LINE. Raises UserError for files."""
    questions, source = files(where)
    wanted = {id for row in read_lines(questions, Problems()) for id in _page_ids(row)}
    pages: _Pages = {}
    for row in read_lines(source, problems):
        try:
            id, title = row.key("wikipedia_id"), row.text("wikipedia_title").strip()
            kept = _paragraphs(row)
        except BadRow as error:
            problems.add(error.kind, row.where, _name(row), error.reason)
            continue
        if id in wanted:
            pages.setdefault(id, bytes(map(bool, kept)))
        for number, text in enumerate(kept):
            if text:
                yield row.where, Passage(f"{id}-{number}", title, text)
    for row in read_lines(questions, problems):
        try:
            example = _example(row, questions.name, pages)
        except BadRow as error:
            problems.add(error.kind, row.where, _name(row), error.reason)
            continue
        if not example.evidence:
            problems.add("no_provenance", row.where, example.id, "no output has a provenance")
        yield row.where, example


def _page_ids(row: Row) -> Iterator[str]:
    """Of the provenance, as far as a row has any."""
    try:
        for cited in _provenance(row.rows("output")):
            yield cited.key("wikipedia_id")
    except BadRow:
        return  # noted when the row is read for good


def _paragraphs(page: Row) -> list[str]:
    """Texts of a page, "" where no passage stands: the title comes first, headings between."""
    texts = page.fields.get("text")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRow("wrong_type", "'text' must be a list of paragraphs")
    for text in texts:
        Row(page.where, {"text": text}).text("text", empty=True)
    heading = [number == 0 or text.startswith(_HEADING) for number, text in enumerate(texts)]
    return ["" if skip else text.strip() for skip, text in zip(heading, texts, strict=True)]


def _example(row: Row, name: str, pages: _Pages) -> Example:
    if "output" not in row.fields:
        raise BadRow("missing_field", "'output' is missing; take a KILT file with answers")
    outputs = row.rows("output")
    answers = [output.text("answer", default="", empty=True).strip() for output in outputs]
    task = next((task for start, task in _TASKS.items() if name.startswith(start)), "open_qa")
    answers = tuple(answer for answer in dict.fromkeys(answers) if answer)
    split = _SPLIT.search(name)
    cited = [id for entry in _provenance(outputs) for id in _passage_ids(entry, pages)]
    return Example(
        id=row.key("id"),
        task=task,
        question=row.text("input").strip(),
        answers=answers,
        evidence=tuple(dict.fromkeys(cited)),
        split=split[1] if split else "train",
        kind={"fact_check": "label", "long_form": "text", "dialog": "text"}.get(task, ""),
    )


def _provenance(outputs: list[Row]) -> list[Row]:
    """Of the first output that has any: the outputs are alternatives."""
    found = (output for output in outputs if output.fields.get("provenance"))
    first = next(found, None)
    return first.rows("provenance") if first else []


def _passage_ids(cited: Row, pages: _Pages) -> list[str]:
    """Of the paragraphs from start to end; the title and headings among them are left out."""
    id = cited.key("wikipedia_id")
    start, end = (_paragraph(cited, f"{edge}_paragraph_id") for edge in ("start", "end"))
    if id not in pages:
        raise BadRow("missing_passage", f"page {id!r} is not in the knowledge source")
    kept = pages[id]
    if not start <= end < len(kept):
        raise BadRow("missing_passage", f"page {id!r} has no paragraphs {start} to {end}")
    found = [f"{id}-{number}" for number in range(start, end + 1) if kept[number]]
    if not found:
        raise BadRow("missing_passage", f"page {id!r} has but headings from {start} to {end}")
    return found


def _paragraph(cited: Row, name: str) -> int:
    value = cited.fields.get(name)
    if value is None:
        raise BadRow("missing_field", f"a provenance has no '{name}'")
    if type(value) is not int or value < 0:
        raise BadRow("wrong_type", f"'{name}' must be the number of a paragraph")
    return value


def _name(row: Row) -> str:
    """What a message calls the row."""
    value: Any = row.fields.get("id", row.fields.get("wikipedia_id", ""))
    return str(value) if isinstance(value, (str, int)) else ""
