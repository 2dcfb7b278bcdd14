"""ALCE: a JSON list of questions with the passages retrieved for each, to be ranked and cited.

ALCE holds no gold passages, in its oracle files neither: they only order what was retrieved. So
`candidates` is what an item brings, and `evidence` is empty. Everything is held out as "test".
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

from cosup_jax.data.problems import BadRow, Problems
from cosup_jax.data.rows import Row, content_id, existing, read_json
from cosup_jax.data.schema import Example, Passage
from cosup_jax.errors import UserError


def files(where: str) -> list[Path]:
    """The one file. Raises UserError if it is not there."""
    return [existing(where, "name it as alce:DIR/asqa_eval_gtr_top100.json")]


def read(where: str, problems: Problems) -> Iterator[tuple[str, Passage | Example]]:
    """Every item, as FILE[NUMBER], after the passages it is the first to bring.

    Raises UserError for files.
    """
    (path,) = files(where)
    items = read_json(path)
    if not isinstance(items, list) or not any(isinstance(item, dict) for item in items):
        raise UserError(f"{path}: not an ALCE file, a JSON list of objects with question and docs")
    texts: dict[str, str] = {}  # content of the passages so far, by id
    for number, item in enumerate(items):
        place = f"{path}[{number}]"
        try:
            row = Row(place, item)
            passages = [_passage(doc) for doc in row.rows("docs")]
            example = _example(row, number, passages)
        except BadRow as error:
            problems.add(error.kind, place, "", error.reason)
            continue
        for passage in passages:
            content = content_id(passage.title, passage.text)
            if passage.id not in texts:
                yield place, passage
            elif texts[passage.id] != content:
                reason = "another text under this id came before; the first counts"
                problems.add("duplicate_id", place, passage.id, reason)
            texts.setdefault(passage.id, content)
        yield place, example


def _passage(doc: Row) -> Passage:
    title = doc.text("title", default="", empty=True).strip()
    text = doc.text("text").strip()
    return Passage(doc.key("id", default=content_id(title, text)), title, text)


def _example(item: Row, number: int, passages: list[Passage]) -> Example:
    if not passages:
        raise BadRow("missing_field", "'docs' is empty")
    id = "sample_id" if item.fields.get("sample_id") is not None else "id"
    groups, long_answer = _groups(item), item.text("answer", default="", empty=True).strip()
    if not any(groups) and not long_answer:
        raise BadRow("missing_field", "neither 'answer' nor 'answers' nor 'qa_pairs' has an answer")
    is_list = item.fields.get("answers") is not None  # QAMPARI, whose `answer` is the list as text
    return Example(
        id=item.key(id, default=str(number)),
        task="open_qa" if is_list else "long_form",
        question=item.text("question").strip(),
        answers=tuple(dict.fromkeys(itertools.chain(*groups))),
        evidence=(),
        split="test",
        long_answer=long_answer,
        kind="text",
        candidates=tuple(dict.fromkeys(passage.id for passage in passages)),
        # ELI5 asks whether each claim is made.
        answer_groups=groups or tuple((claim,) for claim in item.texts("claims", default=())),
    )


def _groups(item: Row) -> tuple[tuple[str, ...], ...]:
    """Short answers of ASQA's sub-questions, QAMPARI's answers, each with its aliases."""
    pairs = item.rows("qa_pairs") if item.fields.get("qa_pairs") is not None else []
    return (*(pair.texts("short_answers") for pair in pairs), *item.groups("answers"))
