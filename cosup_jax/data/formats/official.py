"""The official training data: DIR/train.pickle or .json, and the passages in DIR/ids2text.json.

The training file is a dict of equally long lists: `input`, `output`, and, where passages are
inserted, `evidence` (ids) and `hard_negs` (per row nothing, or ids and their texts). `ids2text`
maps "[k_ID]" to a passage. An output reads `[k_ID]passage [Cs] grounded text [Ce] text`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cosup_jax.data import markup
from cosup_jax.data.formats import prompts
from cosup_jax.data.formats.plain_pickle import read_pickle
from cosup_jax.data.problems import BadRow, Problems
from cosup_jax.data.rows import Row, check_text, existing, read_json
from cosup_jax.data.schema import Example, Passage
from cosup_jax.errors import UserError

_REQUIRED = ("input", "output")
_COLUMNS = (*_REQUIRED, "evidence", "hard_negs", "input_ids")
_MARKER = re.compile(r"\[k_([^\[\]\s]+)\]")
_BLANKS = re.compile(r" ?(\[C[se]\]) ?")  # one blank on either side belongs to the mark


def files(where: str) -> list[Path]:
    """The training file and its ids2text.json. Raises UserError if either is not there."""
    train, _, ids2text = where.partition("::")
    if not train.endswith((".pickle", ".pkl", ".json")):
        raise UserError(f"{train}: official training data is a .pickle or .json file")
    ids2text = ids2text or str(Path(train).with_name("ids2text.json"))
    hint = "name both as official:TRAIN::IDS2TEXT"
    return [existing(path, hint) for path in (train, ids2text)]


def read(where: str, problems: Problems) -> Iterator[tuple[str, Passage | Example]]:
    """All passages, then all examples, each as FILE[NUMBER]. Raises UserError for files."""
    train, ids2text = files(where)
    texts = {}
    for number, (marker, text) in enumerate(_mapping(ids2text).items()):
        place = f"{ids2text}[{number}]"
        try:
            passage = _passage(marker, Row(place, {"id": marker, "text": text}))
        except BadRow as error:
            problems.add(error.kind, place, marker, error.reason)
            continue
        texts[passage.id] = text
        yield place, passage
    columns = _columns(train)
    for number in range(len(columns["input"])):
        row = Row(f"{train}[{number}]", {name: column[number] for name, column in columns.items()})
        try:
            example = _example(str(number), row, texts, problems)
        except BadRow as error:
            problems.add(error.kind, row.where, str(number), error.reason)
            continue
        yield row.where, example


def _mapping(path: Path) -> dict[str, Any]:
    texts = read_json(path)
    if not isinstance(texts, dict) or not any(map(_MARKER.fullmatch, texts)):
        raise UserError(f'{path}: not an ids2text file; it maps "[k_ID]" to the text of a passage')
    return texts


def _columns(path: Path) -> dict[str, list]:
    """The lists of the training file, by name; all equally long."""
    read = read_json if path.suffix == ".json" else read_pickle
    table = read(path)
    if not isinstance(table, dict) or not all(
        isinstance(table.get(name, None if name in _REQUIRED else []), list) for name in _COLUMNS
    ):
        raise UserError(f"{path}: not official training data, a dict of lists: input, output, ...")
    columns = {name: table[name] for name in _COLUMNS if name in table}
    if len({len(column) for column in columns.values()}) != 1:
        lengths = ", ".join(f"{name} {len(column)}" for name, column in columns.items())
        raise UserError(f"{path}: its lists differ in length ({lengths}); write the file anew")
    if not columns["input"]:
        raise UserError(f"{path}: its lists are empty; write the file anew")
    return columns


def _passage(marker: str, row: Row) -> Passage:
    title, separator, text = row.text("text").partition(" :: ")
    if separator and not text.strip():
        raise BadRow("empty_text", "a title without a text")
    return Passage(_id("key", marker), *((title, text) if separator else ("", title)))


def _example(id: str, row: Row, texts: dict[str, str], problems: Problems) -> Example:
    prompt = row.text("input")
    task, question = prompts.split(prompt)
    if not question:
        raise BadRow("empty_text", "'input' holds no question")
    output, differing, unclosed = _output(row.text("output"), texts)
    example = Example(
        id=id,
        task=task,
        question=question,
        answers=(),
        evidence=_ids("evidence", row.fields.get("evidence")),
        hard_negatives=_hard_negatives(row.fields.get("hard_negs")),
        output=output,
    )
    if not prompts.is_framed(prompt):
        problems.add("other_prompt", row.where, id, f"'input' has no {prompts.INPUT!r}")
    for passage in differing:
        problems.add("other_insertion", row.where, id, f"not the text of passage {passage!r}")
    for passage in unclosed:
        problems.add("open_span", row.where, id, f"no [Ce] ends the span of passage {passage!r}")
    return example


def _output(official: str, texts: dict[str, str]) -> tuple[str, list[str], list[str]]:
    """In our markup, which inserts passages itself.

    Also the passages whose text was not what stood there, and those whose span has no [Ce].
    """
    first, *rest = _MARKER.split(official)
    ours, differing, unclosed = [first], [], []
    for id, stretch in zip(rest[::2], rest[1::2], strict=True):
        inserted, mark, after = stretch.partition("[Cs]")
        if not mark or "[Ce]" in inserted:
            raise BadRow("bad_marker", f"no [Cs] follows [k_{id}] and its passage")
        if id in texts and not _is_passage(inserted, texts[id]):
            differing.append(id)
        if "[Ce]" not in after:
            unclosed.append(id)
        ours += [f"[Ret:{id}]", _BLANKS.sub(r"\1", mark + after)]
    output = "".join(ours)
    if markup.inserted_ids(output) != rest[::2]:
        raise BadRow("bad_marker", "a [Ret:ID] in its own text would insert a passage")
    return output, differing, unclosed


def _is_passage(inserted: str, text: str) -> bool:
    """Nothing, the passage, its beginning, or the same without its title."""
    inserted, text = " ".join(inserted.split()), " ".join(text.split())
    return text.startswith(inserted) or text.partition(" :: ")[2].startswith(inserted)


def _hard_negatives(value: Any) -> tuple[str, ...]:
    """The ids in front; their texts, which follow, are in ids2text as well.

    The official trainer looks up the texts of the evidence instead.
    """
    if value is None or value == []:
        return ()
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise BadRow("wrong_type", "'hard_negs' must be empty or [ids, texts]")
    ids = value[0]
    return _ids("hard_negs", ids if isinstance(ids, (list, tuple)) else [ids])


def _ids(name: str, values: Any) -> tuple[str, ...]:
    if values is None:
        return ()
    if not isinstance(values, (list, tuple)):
        raise BadRow("wrong_type", f"'{name}' must be a list of ids")
    return tuple(_id(name, f"[k_{value}]" if type(value) is int else value) for value in values)


def _id(name: str, value: Any) -> str:
    """ID of "[k_ID]"; the evidence of a row has it without the marker."""
    check_text(name, value)
    found = _MARKER.fullmatch(value if name == "key" or "[" in value else f"[k_{value}]")
    if not found:
        raise BadRow("wrong_type", f"'{name}' holds {value!r:.60}, which is no id as in [k_ID]")
    return found[1]
