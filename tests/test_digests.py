"""Digests of files: right, and read once."""

import os

import pytest

from cosup_jax.data import digests
from cosup_jax.errors import UserError


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A file that nobody has touched for a minute, and what was hashed of it."""
    path, hashed = tmp_path / "source", []
    path.write_text("one")
    age(path)
    read = digests._hash
    monkeypatch.setattr(digests, "_hash", lambda path: hashed.append(path) or read(path))
    return path, hashed


def age(path, seconds=60):
    at = path.stat().st_mtime_ns - seconds * 10**9
    os.utime(path, ns=(at, at))


def test_a_file_is_read_once(source, tmp_path):
    """Bug: every process reads 35 GB at every start before it does anything."""
    path, hashed = source
    found = {digests.digest([path, path], tmp_path) for _ in range(3)}
    assert len(found) == 1 and len(hashed) == 1


def test_a_changed_file_is_read_again(source, tmp_path):
    """Bug: yesterday's digest for today's file, and stale tokens with it."""
    path, hashed = source
    first = digests.file_digest(path, tmp_path)
    path.write_text("two")  # as long
    age(path, 30)
    second = digests.file_digest(path, tmp_path)
    path.write_text("three")
    os.utime(path, ns=(path.stat().st_mtime_ns - 90 * 10**9,) * 2)
    assert len({first, second, digests.file_digest(path, tmp_path)}) == len(hashed) == 3


def test_a_file_just_written_is_not_trusted(source, tmp_path):
    """Bug: a second change within the clock's grain goes unseen."""
    path, hashed = source
    for text in ("two", "one"):
        path.write_text(text)
        digests.file_digest(path, tmp_path)
    digests.file_digest(path, tmp_path)
    assert len(hashed) == 3


def test_a_damaged_note_is_written_anew(source, tmp_path):
    """Bug: a traceback for half a note, or a digest that is none."""
    path, hashed = source
    first = digests.file_digest(path, tmp_path)
    (note,) = (tmp_path / "digests").glob("*.json")
    for damaged in ("", "[]", "{", '{"sha256": 3}'):
        note.write_text(damaged)
        assert digests.file_digest(path, tmp_path) == first
    assert len(hashed) == 5
    with pytest.raises(UserError, match="No such file"):
        digests.file_digest(tmp_path / "none", tmp_path)
