"""Reading rows: JSON lines, plain or gzipped, and fields with the type they should have."""

import difflib
import functools
import gzip
import hashlib
import json
import re
import reprlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cosup_jax.data.problems import BadRow, Problems
from cosup_jax.errors import UserError
from cosup_jax.runtime.paths import expanded

_SURROGATE = re.compile("[\ud800-\udfff]")
_OTHER_LAYOUT = re.compile(rb"\s*(\[\s*(\{|$)|\{\s*$)")  # how a file of JSON, not JSONL, starts
_BROKEN = (EOFError, OSError, zlib.error)  # what a damaged gzip file raises half way


class Row:
    """One JSON object with the place it came from; getters raise BadRow."""

    def __init__(self, where: str, fields: Any):
        self.where = where
        if not isinstance(fields, dict):
            raise BadRow("not_json", "the line is not a JSON object")
        self.fields = fields

    @property
    def id(self) -> str:
        """Its id, or "" where that is no text: for messages."""
        return self.fields["id"] if isinstance(self.fields.get("id"), str) else ""

    def misspelt(self, known: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        """Fields that are none of those known, each with the one that it looks like."""
        for name in sorted(self.fields.keys() - set(known)):
            if near := _near(name, known):
                yield name, near

    def text(self, name: str, default: str | None = None, empty: bool = False) -> str:
        """Text; null and absence give the default, without which they are refused."""
        value = self._value(name, default)
        check_text(name, value)
        if not empty and not value.strip():
            raise BadRow("empty_text", f"'{name}' is empty")
        return value

    def texts(self, name: str, default: tuple | None = None) -> tuple[str, ...]:
        """A list of texts, none of them empty."""
        values = self._value(name, default)
        if not isinstance(values, (list, tuple)):
            raise BadRow("wrong_type", f"'{name}' must be a list of strings")
        for value in values:
            check_text(name, value)
            if not value.strip():
                raise BadRow("empty_text", f"'{name}' holds an empty string")
        return tuple(values)

    def groups(self, name: str) -> tuple[tuple[str, ...], ...]:
        """A list of lists of texts, none of them empty; absent: none."""
        values = self._value(name, ())
        if not isinstance(values, (list, tuple)) or not all(isinstance(v, list) for v in values):
            raise BadRow("wrong_type", f"'{name}' must be a list of lists of strings")
        return tuple(Row(self.where, {name: value}).texts(name) for value in values)

    def key(self, name: str, default: str | None = None) -> str:
        """An id, which other formats also write as a whole number."""
        value = self._value(name, default)
        return str(value) if type(value) is int else self.text(name, default)

    def whole(self, name: str, default: int) -> int:
        """A whole number."""
        value = self._value(name, default)
        if type(value) is not int:
            found = reprlib.repr(value)
            raise BadRow("wrong_type", f"'{name}' must be a whole number, not {found:.60}")
        return value

    def rows(self, name: str) -> list["Row"]:
        """A list of objects, none of them left out; absent is refused."""
        values = self._value(name, None)
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise BadRow("wrong_type", f"'{name}' must be a list of objects")
        return [Row(self.where, value) for value in values]

    def spans(self, name: str) -> tuple[tuple[int, int] | None, ...]:
        """A list of [start, end] or null; absent: none."""
        values = self._value(name, ())
        wanted = f"'{name}' must be a list of [start, end] or null"
        if not isinstance(values, (list, tuple)):
            raise BadRow("wrong_type", wanted)
        for span in values:
            pair = isinstance(span, list) and [type(offset) for offset in span] == [int, int]
            if span is not None and not pair:
                raise BadRow("wrong_type", wanted)
        return tuple(None if span is None else tuple(span) for span in values)

    def _value(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        if value is None:
            if default is None:
                raise BadRow("missing_field", f"'{name}' is missing")
            return default
        return value


@functools.lru_cache(1024)
def _near(name: str, known: tuple[str, ...]) -> str:
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.8)), "")


def check_text(name: str, value: Any) -> None:
    """Raises BadRow unless `value` is text that can be encoded."""
    if not isinstance(value, str):
        # reprlib stops early where what stands there nests without end.
        raise BadRow("wrong_type", f"'{name}' must be text, not {reprlib.repr(value):.60}")
    # JSON's \ud800 passes json.loads and breaks the tokenizer much later.
    if _SURROGATE.search(value):
        raise BadRow("not_utf8", f"'{name}' holds half a surrogate pair")


def alike(found: Any, example: Any) -> bool:
    """Whether a JSON value is built as `example` is, whose key "" stands for any other, and whose
    list for one of any length; more keys may be there."""
    if isinstance(example, list) and isinstance(found, list):
        return all(alike(value, example[0]) for value in found)
    if not isinstance(example, dict):
        return type(found) is type(example)
    if not isinstance(found, dict) or not (example.keys() - {""}) <= found.keys():
        return False
    known = [key for key in found if key in example or "" in example]
    return all(alike(found[key], example.get(key, example.get(""))) for key in known)


def content_id(*texts: str) -> str:
    """An id for what has none: equal texts share it, in every source and run."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:20]


def read_lines(path: Path, problems: Problems) -> Iterator[Row]:
    """The objects of a JSONL file, plain or .gz; blank lines are skipped, bad ones noted.

    Raises UserError if the file cannot be opened, breaks off, holds no line, or starts as JSON of
    another layout: an array, or an object over several lines.
    """
    found = False
    for number, line in enumerate(_lines(path), start=1):
        line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        if not found and _OTHER_LAYOUT.match(line):
            array = line.lstrip().startswith(b"[")
            what, by = ("an array", "'.[]'") if array else ("an object over several lines", ".")
            raise UserError(
                f"{path}:{number}: JSON, but {what}, where each line must be one object; "
                f"rewrite it, for example by jq -c {by}"
            )
        found = True
        try:
            row = Row(f"{path}:{number}", parse(line))
        except BadRow as error:
            problems.add(error.kind, f"{path}:{number}", "", error.reason)
            continue
        yield row
    if not found:
        raise UserError(f"{path}: the file is empty; it needs one JSON object a line")


def _lines(path: Path) -> Iterator[bytes]:
    number = 0
    with open_file(path) as file:
        try:
            for line in file:
                number += 1
                yield line
        except _BROKEN as error:
            raise UserError(f"{path}:{number + 1}: breaks off ({error}); fetch it again") from None


def read_json(path: Path) -> Any:
    """A whole JSON file, plain or .gz. Raises UserError if it is none."""
    try:
        with open_file(path) as file:
            return parse(file.read())
    except BadRow as error:
        raise UserError(f"{path}: {error.reason}") from None
    except _BROKEN as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def existing(name: str, hint: str) -> Path:
    """The file of that name. Raises UserError if it is not there; `hint` says how to name it."""
    path = expanded(name)
    if not path.is_file():
        raise UserError(f"{path}: No such file; {hint}")
    return path


def open_file(path: Path) -> BinaryIO:
    """Opened for reading bytes, unpacked where the name ends in .gz. Raises UserError."""
    try:
        return gzip.open(path) if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; check the path") from None


def parse(text: bytes) -> Any:
    """JSON, strictly: raises BadRow for NaN, for a key that stands twice, and for broken text."""
    try:
        return json.loads(
            text.decode("utf-8"), object_pairs_hook=_object, parse_constant=_refuse_constant
        )
    except UnicodeDecodeError as error:
        raise BadRow("not_utf8", f"byte {error.start + 1} is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "a number too long or nesting too deep").removesuffix(" at")
        raise BadRow("not_json", f"not JSON ({reason})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRow("not_json", f"the key {twice!r:.60} stands twice")
    return found


def _refuse_constant(name: str) -> None:
    raise BadRow("not_json", f"not JSON ({name} is no number)")
