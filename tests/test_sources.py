"""Names of sources and of the evaluation sets they hold."""

import json

import pytest

from cosup_jax.config import DataConfig
from cosup_jax.data import sources
from cosup_jax.data.schema import Dataset, Example
from cosup_jax.errors import UserError


def test_a_path_reads_jsonl(tmp_path):
    """Catches a path that is looked up as something else."""
    passage = {"id": "p", "title": "", "text": "A text."}
    row = {"id": "e", "task": "t", "question": "Q?", "answers": ["A"], "evidence": ["p"]}
    (tmp_path / "mine.passages.jsonl").write_text(json.dumps(passage))
    (tmp_path / "mine.jsonl").write_text(json.dumps(row))
    dataset = sources.load(f"{tmp_path}/mine.jsonl", DataConfig())
    assert (dataset.name, len(dataset.examples)) == ("mine", 1)


def test_tfds_world_takes_size_and_place_from_the_config(monkeypatch):
    """Catches a world of another size than configured, or one built in another place."""
    monkeypatch.setattr(sources, "load_world", lambda entities, place: (entities, place))
    data = DataConfig(world_entities=123, tfds_dir="here")
    assert sources.load("tfds:world", data) == (123, "here")


@pytest.mark.parametrize("source", ["tfds:wolrd", "x.json", "x.passages.jsonl", "world", ""])
def test_an_unknown_source_is_refused_with_the_list(source):
    """Catches a typo that reads nothing, or reads passages as if they were examples."""
    with pytest.raises(UserError, match=r"tfds:world and DIR/x\.jsonl"):
        sources.load(source, DataConfig())


def test_eval_sets_are_named_by_split_and_leave_train_out():
    """Catches training rows scored as held out, and splits merged into one set."""
    rows = [
        Example(f"{number}", "t", "Q?", ("A",), (), split=split)
        for number, split in enumerate(["train", "test", "dev", "test"])
    ]
    sets = sources.eval_sets(Dataset("squad", "1", rows, {}))
    assert sets == {"squad.test": [rows[1], rows[3]], "squad.dev": [rows[2]]}
