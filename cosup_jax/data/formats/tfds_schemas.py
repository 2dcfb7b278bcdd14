"""What the rows of question answering data sets mean, told by their features.

A function takes a row and returns the passages it brings and the fields of its example.
"""

import re
from collections.abc import Callable
from typing import Any

from cosup_jax.data.markup import find_answer
from cosup_jax.data.problems import BadRow
from cosup_jax.data.rows import Row, content_id
from cosup_jax.data.schema import Passage

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_UNKNOWN = "<unk>"  # what TriviaQA's test split answers
_Read = tuple[list[Passage], dict[str, Any]]
Convert = Callable[[Row], _Read]


def squad(row: Row) -> _Read:
    """One context, where it is known where the answers stand; SQuAD 2.0 has questions without."""
    title = row.text("title", default="", empty=True).replace("_", " ").strip()
    context = row.text("context")
    answers = [] if row.fields.get("is_impossible") else _pairs(row, "answers/text answer_start")
    passage = Passage(content_id(title, context), title, context)
    span = _sentence(context, *answers[0]) if answers else None
    fields = {
        **({"id": row.text("id")} if "id" in row.fields else {}),
        **{"task": "open_qa", "question": row.text("question").strip()},
        **{
            "answers": tuple(dict.fromkeys(text for text, _ in answers if text.strip())),
            "kind": "span",
        },
        **{"evidence": (passage.id,), "support": (span,)},
    }
    return [passage], fields


def _sentence(text: str, answer: str, start: int) -> tuple[int, int] | None:
    """[start, end) of the sentence that holds the answer; None where it does not stand there."""
    end = start + len(answer)
    if text[start:end] != answer or start < 0:
        return None
    gaps = [found.span() for found in _SENTENCE_END.finditer(text)]
    first = max((after for _, after in gaps if after <= start), default=0)
    last = min((before for before, _ in gaps if before >= end), default=len(text.rstrip()))
    return first, last


def hotpot(row: Row) -> _Read:
    """Pages to rank, some of whose sentences are facts; evidence is in the order of the facts."""
    sentences, passages = {}, {}
    for title, parts in _pairs(row, "context/title sentences"):
        if (text := "".join(parts)).strip():
            passages[title] = Passage(content_id(title, text), title, text)
            sentences[title] = parts
    facts: dict[str, list[int]] = {}
    for title, sentence in _pairs(row, "supporting_facts/title sent_id"):
        facts.setdefault(title, []).append(sentence)
    if lost := [title for title in facts if title not in passages]:
        raise BadRow("missing_passage", f"supporting page {lost[0]!r:.60} is not in the context")
    answer = row.text("answer", default="", empty=True).strip()
    return list(passages.values()), {
        **({"id": row.text("id")} if "id" in row.fields else {}),
        **{"task": "multi_hop", "question": row.text("question").strip()},
        **{"answers": (answer,) if answer else ()},
        **{"kind": "label" if answer in ("yes", "no") else "span"},
        "evidence": tuple(passages[title].id for title in facts),
        "support": tuple(_facts_span(sentences[title], facts[title]) for title in facts),
        "candidates": tuple(passage.id for passage in passages.values()),
    }


def _facts_span(sentences: list[str], facts: list[int]) -> tuple[int, int] | None:
    """From the first supporting sentence to the last; None where one does not exist."""
    if not 0 <= min(facts) <= max(facts) < len(sentences):
        return None
    start = len("".join(sentences[: min(facts)]))
    span = "".join(sentences[min(facts) : max(facts) + 1])
    return start + len(span) - len(span.lstrip()), start + len(span.rstrip())


def trivia(row: Row) -> _Read:
    """A document is cut into paragraphs; evidence is the first that holds an answer."""
    known = Row(row.where, row.fields["answer"])
    answers = [known.text("value", default="", empty=True), *known.fields.get("aliases", [])]
    answers = [answer for answer in dict.fromkeys(answers) if answer.strip() not in ("", _UNKNOWN)]
    passages: list[Passage] = []
    for pages in ("entity_pages/title wiki_context", "search_results/title search_context"):
        for title, document in _pairs(row, pages):
            parts = [part.strip() for part in document.splitlines() if part.strip()]
            passages += [Passage(content_id(title, part), title, part) for part in parts]
        if passages:
            break  # what a search found is noisier, and only wanted where there is no page
    holding = (p.id for p in passages if find_answer(answers, p.text))
    evidence = next(holding, None)
    return list(dict.fromkeys(passages)), {
        **{"id": row.text("question_id")},
        **{"task": "open_qa", "question": row.text("question").strip()},
        **{"answers": tuple(answers), "kind": "span"},
        "evidence": (evidence,) if evidence else (),
    }


def _pairs(row: Row, names: str) -> list[tuple[Any, Any]]:
    """Of "field/first second": the two columns side by side; none where the field is absent."""
    field, _, columns = names.partition("/")
    first, second = (row.fields.get(field, {}).get(name, []) for name in columns.split())
    if len(first) != len(second):
        raise BadRow("wrong_type", f"the lists of {field!r} differ in length")
    return list(zip(first, second, strict=True))


def nq_open(row: Row) -> _Read:
    """Question and answers without passages."""
    answers = tuple(dict.fromkeys(row.texts("answer")))
    question = row.text("question").strip()
    return [], {"task": "open_qa", "question": question, "answers": answers, "kind": "span"}


SCHEMAS: dict[str, Convert] = {  # by the features that a data set must have
    "context question answers/text answers/answer_start": squad,
    "question answer context/title context/sentences[] supporting_facts/title "
    "supporting_facts/sent_id": hotpot,
    "question question_id answer/value answer/aliases[]": trivia,
    "question answer[]": nq_open,
}
REVISIONS = {trivia: "r2-"}  # raise it whenever the same rows give other examples
