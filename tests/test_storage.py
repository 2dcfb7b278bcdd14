"""Files that are whole or absent, also on a full disk and under a reader."""

import os

import numpy as np
import pytest
from files import full_disk

from cosup_jax.data import ingest, storage
from cosup_jax.data.schema import Example, Passage
from cosup_jax.errors import UserError


@pytest.mark.parametrize("write", ["writer", "array"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, write):
    """Bug: a traceback and exit code 1 where the disk is full, and half a gigabyte of halves."""

    def build(directory):
        if write == "array":
            return storage.write_array(directory / "x", np.arange(10_000), "<i8")
        with storage.ArrayWriter(directory, {"x": "<i8"}) as writer:
            writer.add("x", np.arange(10_000))

    with full_disk(), pytest.raises(UserError, match=r"cannot write .*: File too large; check"):
        storage.build_once(tmp_path / "target", build)
    assert [path.name for path in tmp_path.iterdir()] == [".target.lock"]


def test_an_error_of_ours_is_not_called_a_full_disk(tmp_path):
    """Bug: every OSError told as the user's, so that faults of the program are never found."""
    with pytest.raises(FileNotFoundError):
        storage.build_once(tmp_path / "target", lambda directory: (directory / "x").read_bytes())


def test_a_mapped_array_outlives_its_replacement(tmp_path):
    """Bug: an index written in place kills, with a bus error, the run that has it mapped."""
    for count in (5000, 1):
        names = storage.IdIndex.write(tmp_path, "x", map(str, range(count)))
        if count > 1:
            mapped = storage.map_array(tmp_path / "x_by_hash", "<i8")
    assert sorted(mapped) == list(range(5000))
    assert len(storage.map_array(tmp_path / "x_by_hash", "<i8")) == 1
    assert sorted(os.listdir(tmp_path)) == sorted(names) == ["x_by_hash", "x_by_id", "x_hashes"]


def test_ids_with_one_hash_are_told_apart(tmp_path, monkeypatch):
    """Bug: of two ids with the same hash one is another's passage, or is called a copy of it."""
    for module in (storage, ingest):
        monkeypatch.setattr(module, "hash_of", lambda id: 7)
    records = [("here", Passage(id, "", f"text {id}")) for id in ("a", "b", "a", "c", "b")]
    records += [("there", Example(id, "t", "Q?", (id,), (id,))) for id in ("a", "b")]
    read = lambda problems: iter(records)
    dataset, problems = ingest.ingest("x", "1", read, tmp_path)
    assert problems.counts == {"duplicate_id": 2}
    assert [dataset.passages.row(id) for id in "abc"] == [0, 1, 2] and len(dataset.examples) == 2
    assert dataset.passages["b"].text == "text b" and "d" not in dataset.passages
