"""KILT: questions in DIR/x.jsonl, their evidence among the pages of a knowledge source.

A passage is one paragraph of a page; its id is the page's and the paragraph's number. The knowledge
source (5.9 million pages, 35 GB) is read once, page by page; what stays in memory is which
paragraphs the pages have that some question points to.
"""

import contextlib
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
            example = _example(row, questions.name, pages, problems)
        except BadRow as error:
            problems.add(error.kind, row.where, _name(row), error.reason)
            continue
        if not example.evidence:
            problems.add("no_provenance", row.where, example.id, "no output has a provenance")
        yield row.where, example


def _page_ids(row: Row) -> Iterator[str]:
    """Of every provenance, as far as a row has any."""
    try:
        for entries in _provenances(row.rows("output")):
            for cited in entries:
                with contextlib.suppress(BadRow):
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


def _example(row: Row, name: str, pages: _Pages, problems: Problems) -> Example:
    if "output" not in row.fields:
        raise BadRow("missing_field", "'output' is missing; take a KILT file with answers")
    outputs = row.rows("output")
    answers = [output.text("answer", default="", empty=True).strip() for output in outputs]
    task = next((task for start, task in _TASKS.items() if name.startswith(start)), "open_qa")
    answers = tuple(answer for answer in dict.fromkeys(answers) if answer)
    split = _SPLIT.search(name)
    evidence, unusable = _evidence(outputs, pages)
    example = Example(
        id=row.key("id"),
        task=task,
        question=row.text("input").strip(),
        answers=answers,
        evidence=evidence,
        split=split[1] if split else "train",
        kind={"fact_check": "label", "long_form": "text", "dialog": "text"}.get(task, ""),
    )
    for error in unusable:
        problems.add("evidence_dropped", row.where, example.id, error.reason)
    return example


def _provenances(outputs: list[Row]) -> Iterator[list[Row]]:
    """Of each output that has one."""
    return (output.rows("provenance") for output in outputs if output.fields.get("provenance"))


def _evidence(outputs: list[Row], pages: _Pages) -> tuple[tuple[str, ...], list[BadRow]]:
    """Of the first output where any can be used, as outputs are alternatives; and what cannot be.

    Raises BadRow if there is a provenance, and none of it can be used.
    """
    unusable: list[BadRow] = []
    for entries in _provenances(outputs):
        found: list[str] = []
        for cited in entries:
            try:
                found += _passage_ids(cited, pages)
            except BadRow as error:
                unusable.append(error)
        if found:
            return tuple(dict.fromkeys(found)), unusable
    if unusable:
        raise unusable[0]
    return (), []


def _passage_ids(cited: Row, pages: _Pages) -> list[str]:
    """Of the paragraphs from start to end, without the title and headings among them.

    Where these are all there is, of the first paragraph below.
    """
    id = cited.key("wikipedia_id")
    start, end = _range(cited)
    if id not in pages:
        raise BadRow("missing_passage", f"page {id!r} is not in the knowledge source")
    kept = pages[id]
    if not start <= end < len(kept):
        raise BadRow("missing_passage", f"page {id!r} has no paragraphs {start} to {end}")
    numbers = [number for number in range(start, end + 1) if kept[number]]
    if not numbers:
        numbers = [kept.find(1, end)]
    if numbers == [-1]:
        raise BadRow("missing_passage", f"page {id!r} has no paragraph from {start} on")
    return [f"{id}-{number}" for number in numbers]


def _range(cited: Row) -> tuple[int, int]:
    """First and last paragraph; the title, 0, stands for a page of which no more is known."""
    names = ("start_paragraph_id", "end_paragraph_id")
    edges = [cited.fields.get(name) for name in names]
    if edges == [None, None]:  # entity linking cites pages
        return 0, 0
    for name, value in zip(names, edges, strict=True):
        if value is None:
            raise BadRow("missing_field", f"a provenance has no '{name}'")
        if type(value) is not int or value < -1:
            raise BadRow("wrong_type", f"'{name}' must be the number of a paragraph")
    return (0, 0) if -1 in edges else tuple(edges)  # KILT writes -1 for what it did not find


def _name(row: Row) -> str:
    """What a message calls the row."""
    value: Any = row.fields.get("id", row.fields.get("wikipedia_id", ""))
    return str(value) if isinstance(value, (str, int)) else ""
