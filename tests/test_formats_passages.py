"""A corpus without questions, in each of the files that it may come in."""

import gzip
import json

import msgpack
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imports import JUNK, WRONG, write_lines

from cosup_jax.config import DataConfig
from cosup_jax.data import sources
from cosup_jax.data.schema import Passage
from cosup_jax.errors import UserError

ROWS = [
    {"id": "1", "title": "Oslo", "text": "Oslo is a city."},
    {"id": "ü", "text": "No title.", "url": "ignored"},
    {"id": "3", "title": "", "text": '{"text": 1}'},
]
PASSAGES = [Passage("1", "Oslo", "Oslo is a city."), Passage("ü", "", "No title.")]
PASSAGES.append(Passage("3", "", '{"text": 1}'))


def record(path, *rows, pack=msgpack.packb):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        writer.write(row if isinstance(row, bytes) else pack(row))
    writer.close()
    return path


def as_json(row):
    return json.dumps(row).encode()


@pytest.mark.parametrize("kind", ["jsonl", "gz", "msgpack", "json", "directory"])
def test_every_kind_of_file(tmp_path, kind):
    """Bugs: a passage lost, or in another order; a row of JSON taken for msgpack; a file lost for
    the -0 of its name."""
    where = tmp_path / "wiki.v1"
    match kind:
        case "jsonl":
            path = write_lines(where.with_name("wiki.v1.jsonl"), *ROWS)
        case "gz":
            path = where.with_name("wiki.v1.jsonl.gz")
            path.write_bytes(gzip.compress(b"\n".join(map(as_json, ROWS))))
        case "msgpack":
            path = record(where.with_name("wiki.v1.array_record"), *ROWS)
        case "json":
            path = record(
                where.with_name("wiki.v1.array_record-00000-of-00001"), *ROWS, pack=as_json
            )
        case "directory":
            path = where
            path.mkdir()
            record(path / "a.array_record-00000-of-00002", ROWS[0])
            packed = gzip.compress(as_json(ROWS[1]))
            (path / "a.jsonl-00001-of-00002.gz").write_bytes(packed)
            write_lines(path / "b-01.jsonl", ROWS[2])
            (path / "README.md").write_text("not read")
    dataset, problems = sources.load_corpus(str(path), DataConfig(), tmp_path / "data")
    assert list(dataset.passages.values()) == PASSAGES and not problems.errors
    assert dataset.name == "wiki.v1" and not len(dataset.examples) and not dataset.splits


def test_bad_records_are_named(tmp_path):
    """Bug: a record that is lost without a word, or a traceback."""
    rows = [ROWS[0], b"\xc1", b"{", [1], {"id": 2, "text": "x"}, {"id": "2"}, ROWS[0]]
    path = record(tmp_path / "x.array_record", *rows)
    dataset, problems = sources.load_corpus(str(path), DataConfig(), tmp_path / "data")
    assert list(dataset.passages) == ["1"]
    assert [(p.kind, p.where) for p in problems.listed] == [
        *(("not_json", f"{path}[{number}]") for number in (1, 2, 3)),
        ("wrong_type", f"{path}[4]"),
        ("missing_field", f"{path}[5]"),
        ("duplicate_id", f"{path}[6]"),
    ]


def test_no_corpus_is_one_line(tmp_path):
    """Bugs: an index of nothing; a damaged file that ends in a traceback, or is read in part."""
    (tmp_path / "empty").mkdir()
    for name, reason in (("none.jsonl", "No such file"), ("empty", "no corpus; it may be .jsonl")):
        with pytest.raises(UserError, match=reason):
            sources.load_corpus(str(tmp_path / name), DataConfig(), tmp_path / "data")
    path = record(tmp_path / "x.array_record", *ROWS)
    for content in (b"", b"no record at all", path.read_bytes()[:-9]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.array_record: no whole ArrayRecord file"):
            sources.load_corpus(str(path), DataConfig(), tmp_path / "data")


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(["id", "title", "text"]), st.one_of(JUNK, WRONG))
def test_no_junk_crashes(tmp_path_factory, field, junk):
    """Bug: an exception that is no UserError."""
    try:
        packed = msgpack.packb(ROWS[0] | {field: junk})
    except (ValueError, UnicodeError):
        packed = json.dumps(ROWS[0] | {field: junk}).encode()
    directory = tmp_path_factory.mktemp("junk")
    path = record(directory / "x.array_record", ROWS[1], packed)
    dataset, problems = sources.load_corpus(str(path), DataConfig(), directory / "data")
    assert len(dataset.passages) + problems.errors == 2
