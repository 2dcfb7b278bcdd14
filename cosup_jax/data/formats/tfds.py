"""Question answering data sets that TFDS has prepared as ArrayRecord, read without TensorFlow.

What a row means is told by its features, not by the name of the data set:

    squad     context, question, answers/text, answers/answer_start, perhaps is_impossible
    hotpot    context/title, context/sentences, supporting_facts/title, supporting_facts/sent_id,
              question, answer
    trivia    question, answer/value, answer/aliases, entity_pages/..., search_results/...
    nq_open   question, answer (a list)
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from cosup_jax.data.problems import BadRow, Problems
from cosup_jax.data.rows import Row, content_id, digest
from cosup_jax.data.schema import Example, Passage
from cosup_jax.errors import UserError

_SPLITS = {"validation": "dev"}
_BATCH = 1024  # rows read at once; one at a time is slow
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_NAME = re.compile(r"(?P<name>\w+)(?:/(?P<config>[^/:]+))?(?::(?P<version>[\d.]+))?")
_UNKNOWN = "<unk>"  # what TriviaQA's test split answers
_Read = tuple[list[Passage], dict[str, Any]]  # passages, and the fields of the example


def version(where: str, data_dir: str) -> str:
    """Of the content. Raises UserError if it is not prepared, or is another kind of data."""
    builder = _builder(where, data_dir)
    files = sorted(path for path in Path(builder.data_dir).rglob("*") if path.is_file())
    return f"{builder.info.full_name}+{digest(files)}"


def read(where: str, data_dir: str, problems: Problems) -> Iterator[tuple[str, Passage | Example]]:
    """Every example, as NAME/SPLIT[NUMBER], after the passages it is the first to name.

    Raises UserError as `version`.
    """
    builder = _builder(where, data_dir)
    convert, seen = _converter(builder.info), set()
    for split, source in sorted(builder.as_data_source().items()):
        for number, features in enumerate(_rows(source)):
            place = f"{builder.info.full_name}/{split}[{number}]"
            id = f"{split}-{number}"
            try:
                passages, fields = convert(Row(place, _plain(features)))
                fields = {"id": id, "evidence": ()} | fields
                example = Example(split=_SPLITS.get(split, split), **fields)
            except BadRow as error:
                problems.add(error.kind, place, id, error.reason)
                continue
            for passage in passages:
                if passage.id not in seen:
                    seen.add(passage.id)
                    yield place, passage
            if not example.answers:
                problems.add("no_answer", place, example.id, "the data set gives none")
                continue
            if not example.evidence:
                problems.add("no_provenance", place, example.id, "no passage is known to hold it")
            yield place, example


def _builder(where: str, data_dir: str) -> Any:
    found = _NAME.fullmatch(where)
    if not found:
        raise UserError(f"tfds:{where}: not a data set's name; write tfds:NAME[/CONFIG][:VERSION]")
    if "://" in data_dir:
        raise UserError(f"data.tfds_dir={data_dir}: give a local directory")
    place = str(Path(data_dir or tfds.core.constants.DATA_DIR).expanduser())
    try:
        # A function, not a name in the registry: a data set without code is as good as any.
        builder = tfds.core.read_only_builder.builder_from_files(
            **found.groupdict(), data_dir=place
        )
    except tfds.core.registered.DatasetNotFoundError:
        builder = None
    if builder is None or "array_record" not in {
        file_format.value for file_format in builder.info.available_file_formats()
    }:
        raise UserError(
            f"tfds:{where} is not prepared as ArrayRecord in {place}; where TensorFlow is "
            f"installed, run: tfds build {where} --file_format=array_record --data_dir={place}"
        )
    return builder


def _rows(source: Any) -> Iterator[dict[str, Any]]:
    for start in range(0, len(source), _BATCH):
        yield from source.__getitems__(range(start, min(start + _BATCH, len(source))))


def _plain(value: Any) -> Any:
    """Features as JSON would have them: text, numbers, lists, dicts."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise BadRow("not_utf8", f"byte {error.start + 1} is not UTF-8") from None
    if isinstance(value, np.generic):
        return value.item()
    return [_plain(item) for item in value] if isinstance(value, (list, np.ndarray)) else value


def _feature_names(feature: Any, prefix: str = "") -> set[str]:
    """`a/b` for what lies within `a`, `a[]` for a list of plain values."""
    if isinstance(feature, tfds.features.Sequence):
        inner = feature.feature
        nested = isinstance(inner, tfds.features.FeaturesDict)
        return _feature_names(inner, prefix) if nested else {f"{prefix}[]"}
    if not isinstance(feature, tfds.features.FeaturesDict):
        return {prefix}
    return {
        name
        for key, inner in feature.items()
        for name in _feature_names(inner, f"{prefix}/{key}".lstrip("/"))
    }


def _converter(info: Any) -> Callable[[Row], _Read]:
    names = _feature_names(info.features)
    for needed, convert in _SCHEMAS.items():
        if set(needed.split()) <= names:
            return convert
    known = "; ".join(_SCHEMAS)
    raise UserError(f"tfds:{info.full_name} has features {sorted(names)}; known are: {known}")


def _squad(row: Row) -> _Read:
    title = row.text("title", default="", empty=True).replace("_", " ").strip()
    context = row.text("context")
    answers = [] if row.fields.get("is_impossible") else _pairs(row, "answers/text answer_start")
    passage = Passage(content_id(title, context), title, context)
    span = _sentence(context, *answers[0]) if answers else None
    fields = {
        **({"id": row.text("id")} if "id" in row.fields else {}),
        **{"task": "open_qa", "question": row.text("question").strip()},
        **{"answers": tuple(dict.fromkeys(text for text, _ in answers if text)), "kind": "span"},
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


def _hotpot(row: Row) -> _Read:
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


def _trivia(row: Row) -> _Read:
    """A document is cut into paragraphs; evidence is the first that holds an answer."""
    known = Row(row.where, row.fields["answer"])
    answers = [known.text("value", default="", empty=True), *known.fields.get("aliases", [])]
    answers = [answer for answer in dict.fromkeys(answers) if answer and answer != _UNKNOWN]
    passages: list[Passage] = []
    for pages in ("entity_pages/title wiki_context", "search_results/title search_context"):
        for title, document in _pairs(row, pages):
            parts = [part.strip() for part in document.splitlines() if part.strip()]
            passages += [Passage(content_id(title, part), title, part) for part in parts]
        if passages:
            break  # what a search found is noisier, and only wanted where there is no page
    holding = (p.id for p in passages if any(answer in p.text for answer in answers))
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


def _nq_open(row: Row) -> _Read:
    answers = tuple(dict.fromkeys(row.texts("answer")))
    question = row.text("question").strip()
    return [], {"task": "open_qa", "question": question, "answers": answers, "kind": "span"}


_SCHEMAS: dict[str, Callable[[Row], _Read]] = {
    "context question answers/text answers/answer_start": _squad,
    "question answer context/title context/sentences[] supporting_facts/title "
    "supporting_facts/sent_id": _hotpot,
    "question question_id answer/value answer/aliases[]": _trivia,
    "question answer[]": _nq_open,
}
