"""Self-RAG's generator training data: JSON lines whose outputs hold paragraphs and judgements.

    [Retrieval]<paragraph>title\\ntext</paragraph>[Relevant]segment[Fully supported][Utility:5]

A segment that its paragraph supports becomes a grounded span, and the paragraph a passage. Every
other paragraph is dropped and counted, its segment stays as text; the judgements go.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from cosup_jax.data.formats import prompts
from cosup_jax.data.problems import BadRow, Problems
from cosup_jax.data.rows import Row, content_id, existing, read_lines
from cosup_jax.data.schema import Example, Passage

_RELEVANCE = r"\[Relevant\]|\[Irrelevant\]"
_SUPPORT = r"\[Fully supported\]|\[Partially supported\]|\[No support / Contradictory\]"
_PLAIN = re.compile(
    r"\[Retrieval\]|\[No Retrieval\]|\[Continue to Use Evidence\]|\[Utility:[1-5]\]|</?s>"
)
_JUDGING = re.compile(rf"{_RELEVANCE}|{_SUPPORT}|</?paragraph>")
_ANY = rf"{_PLAIN.pattern}|{_JUDGING.pattern}"
_GROUNDED = re.compile(
    rf"<paragraph>(?P<paragraph>.*?)</paragraph>\s*(?P<relevance>{_RELEVANCE})?"
    rf"(?P<segment>(?:[^\[<]|(?!{_ANY})[\[<])*)(?P<support>{_SUPPORT})?",
    re.DOTALL,
)
_GOOD = ("[Relevant][Fully supported]", "[Relevant][Partially supported]")
_TASKS = {"fever": "fact_check", "wow": "dialog", "asqa": "long_form"}  # by dataset_name


def files(where: str) -> list[Path]:
    """The one file. Raises UserError if it is not there."""
    return [existing(where, "name it as selfrag:DIR/train.jsonl")]


def read(where: str, problems: Problems) -> Iterator[tuple[str, Passage | Example]]:
    """Every example after the passages it is the first to insert, each with its FILE:LINE."""
    seen = set()
    for row in read_lines(*files(where), problems):
        try:
            example, passages, dropped = _example(row)
        except BadRow as error:
            problems.add(error.kind, row.where, row.id, error.reason)
            continue
        for judgement in dropped:
            problems.add("paragraph_dropped", row.where, example.id, judgement)
        for passage in passages:
            if passage.id not in seen:
                seen.add(passage.id)
                yield row.where, passage
        yield row.where, example


def _example(row: Row) -> tuple[Example, list[Passage], list[str]]:
    """With its passages, and with the judgement of every paragraph dropped."""
    prompt = row.text("instruction")
    if more := row.text("input", default="", empty=True).strip():
        prompt += f"\n\n{more}"
    task, question = prompts.split(prompt)
    if not question:
        raise BadRow("empty_text", "'instruction' holds no question")
    name = row.text("dataset_name", default="", empty=True)
    output, passages, dropped = _output(row.text("output"))
    example = Example(
        id=row.where.rpartition(":")[2],  # theirs stand twice: the files are samples put together
        task=_TASKS.get(name, task),
        question=question,
        answers=(),
        evidence=tuple(dict.fromkeys(passage.id for passage in passages)),
        output=output,
    )
    return example, passages, dropped


def _output(theirs: str) -> tuple[str, list[Passage], list[str]]:
    """In our markup, with its passages in order, and the judgements of what was dropped."""
    passages, dropped = [], []

    def ground(found: re.Match) -> str:
        judgement = (found["relevance"] or "") + (found["support"] or "")
        if re.search(_ANY, found["paragraph"]):
            raise BadRow("bad_judgement", "a paragraph holds a token of Self-RAG; is one unclosed?")
        if judgement not in _GOOD:
            dropped.append(judgement or "not judged")
            return f"[No Retrieval]{found['segment']}[No Retrieval]"  # parts it from its neighbours
        if not (span := found["segment"].strip()):
            raise BadRow("bad_judgement", f"{judgement} judges no text")
        passages.append(_passage(found["paragraph"]))
        return f"[Ret:{passages[-1].id}][Cs]{span}[Ce]"

    marked = _GROUNDED.sub(ground, theirs)
    if left := _JUDGING.search(marked):
        raise BadRow("bad_judgement", f"{left[0]} belongs to no paragraph")
    texts = [text.strip() for text in _PLAIN.split(marked)]
    output = " ".join(text for text in texts if text)
    output = output.replace(" [Ret:", "[Ret:").replace("[Ce] ", "[Ce]")
    if not output:
        raise BadRow("empty_text", "'output' holds nothing but tokens of Self-RAG")
    return output, passages, dropped


def _passage(paragraph: str) -> Passage:
    title, _, text = map(str.strip, paragraph.partition("\n"))
    title, text = (title, text) if text else ("", title)
    if not text:
        raise BadRow("empty_text", "a supporting paragraph is empty")
    return Passage(content_id(title, text), title, text)
