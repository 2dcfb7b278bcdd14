"""From the name of a source to its examples and passages."""

from cosup_jax.config import DataConfig
from cosup_jax.data.schema import Dataset, Example, read_jsonl
from cosup_jax.data.world import load_world
from cosup_jax.errors import UserError


def load(source: str, data: DataConfig) -> Dataset:
    """Reads one source, without its `@weight`; `tfds:world` is built on first use.

    Raises UserError if there is no such source or something is wrong with its content.
    """
    if source == "tfds:world":
        return load_world(data.world_entities, data.tfds_dir)
    if source.endswith(".jsonl") and not source.endswith(".passages.jsonl"):
        return read_jsonl(source)
    raise UserError(
        f"unknown data source {source!r}; known are tfds:world and DIR/x.jsonl "
        "(its passages in DIR/x.passages.jsonl)"
    )


def eval_sets(dataset: Dataset) -> dict[str, list[Example]]:
    """Everything held out, by `<data set>.<split>`, in the order of first appearance."""
    sets: dict[str, list[Example]] = {}
    for example in dataset.examples:
        if example.split != "train":
            sets.setdefault(f"{dataset.name}.{example.split}", []).append(example)
    return sets
