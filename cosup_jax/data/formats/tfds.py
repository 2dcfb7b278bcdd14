"""Question answering data sets that TFDS has prepared as ArrayRecord, read without TensorFlow."""

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from cosup_jax.data.digests import digest
from cosup_jax.data.formats.tfds_schemas import REVISIONS, SCHEMAS, Convert
from cosup_jax.data.problems import BadRow, Problems
from cosup_jax.data.rows import Row
from cosup_jax.data.schema import Example, Passage
from cosup_jax.errors import UserError
from cosup_jax.runtime.paths import expanded

_SPLITS = {"validation": "dev"}
_BATCH = 1024  # rows read at once; one at a time is slow
_NAME = re.compile(r"(?P<name>\w+)(?:/(?P<config>\w[\w.+-]*))?(?::(?P<version>\d+\.\d+\.\d+))?")


def version(where: str, data_dir: str, memory: Path) -> str:
    """Of the content; `memory` keeps digests. Raises UserError as `read`."""
    builder = _builder(where, data_dir)
    files = sorted(path for path in Path(builder.data_dir).rglob("*") if path.is_file())
    revision = REVISIONS.get(_converter(builder.info), "")
    return f"{builder.info.full_name}+{revision}{digest(files, memory)}"


def read(where: str, data_dir: str, problems: Problems) -> Iterator[tuple[str, Passage | Example]]:
    """Every example, as NAME/SPLIT[NUMBER], after the passages it is the first to name.

    Raises UserError if it is not prepared, or its features are of no schema that we know.
    """
    builder = _builder(where, data_dir)
    convert, seen = _converter(builder.info), set()
    for split in sorted(builder.info.splits):
        for number, features in enumerate(_rows(builder, split)):
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
        raise UserError(f"tfds:{where}: not a data set's name; write tfds:NAME[/CONFIG][:1.0.0]")
    if "://" in data_dir:
        raise UserError(f"data.tfds_dir={data_dir}: give a local directory")
    place = str(expanded(data_dir or tfds.core.constants.DATA_DIR))
    try:
        with _intact(where, place):
            # By its files, not by its code: a data set of one's own needs none here.
            builder = tfds.core.read_only_builder.builder_from_files(
                **found.groupdict(), data_dir=place
            )
            formats = {form.value for form in builder.info.available_file_formats()}
    except tfds.core.registered.DatasetNotFoundError:
        formats = set()
    if "array_record" not in formats:
        raise UserError(
            f"tfds:{where} is not prepared as ArrayRecord in {place}; where TensorFlow is "
            f"installed, run: tfds build {where} --file_format=array_record --data_dir={place}"
        )
    return builder


@contextlib.contextmanager
def _intact(name: str, place: str) -> Iterator[None]:
    """Raises UserError for whatever TFDS and its readers raise over damaged files."""
    try:
        yield
    except tfds.core.registered.DatasetNotFoundError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"tfds:{name}: its files in {place} are damaged ({reason:.200}); prepare it again"
        ) from None


def _rows(builder: Any, split: str) -> Iterator[dict[str, Any]]:
    intact = functools.partial(_intact, builder.info.full_name, str(builder.data_dir))
    with intact():
        source = builder.as_data_source(split)
    for start in range(0, len(source), _BATCH):
        with intact():
            rows = source.__getitems__(range(start, min(start + _BATCH, len(source))))
        yield from rows


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


def _converter(info: Any) -> Convert:
    names = _feature_names(info.features)
    # A dict of lists holds the same as a list of dicts.
    found = names | {name.removesuffix("[]") for name in names if "/" in name}
    for needed, convert in SCHEMAS.items():
        if set(needed.split()) <= found:
            return convert
    schemas = "; ".join(f"{convert.__name__} ({needed})" for needed, convert in SCHEMAS.items())
    raise UserError(f"tfds:{info.full_name} has features {sorted(names)}; known are: {schemas}")
