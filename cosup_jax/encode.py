"""--mode=encode: the passages of all data sets, or of one corpus, as vectors to search.

WORKDIR/index/NAME              the vectors of data set NAME, as vectors.py lays them out
WORKDIR/index/NAME/index.faiss  the same for faiss.read_index, where config.index.faiss
"""

import os
from pathlib import Path

import jax

from cosup_jax import assemble
from cosup_jax.assemble import Sources, Trained
from cosup_jax.config import Config
from cosup_jax.data.batch import batch_shape
from cosup_jax.data.schema import Dataset
from cosup_jax.data.sources import by_name
from cosup_jax.data.tokens import tokenize_passages
from cosup_jax.errors import UserError
from cosup_jax.runtime import processes
from cosup_jax.runtime.workdir import Workdir
from cosup_jax.search.corpus import Corpus, encode_to_disk
from cosup_jax.search.encoder import Encoder
from cosup_jax.search.vectors import Vectors


def encode(config: Config, workdir: str) -> None:
    """Writes or completes WORKDIR/index, by the newest checkpoint.

    Raises UserError without a checkpoint of this config, for bad data, or without room.
    """
    with Workdir(workdir, begun=True) as directory:
        directory.fetch("index")
        trained = assemble.trained(config, directory.path)
        for dataset in datasets(trained, directory.path):
            corpus, found = index(dataset, trained, directory.path)
            count, size = len(dataset.passages), sum(map(os.path.getsize, found.files))
            _say(
                f"{dataset.name}: {len(corpus):,} distinct of {count:,} passages, {found.width} x "
                f"{found.dtype}, {size / 2**20:,.1f} MiB, in {found.directory}"
            )
            if trained.config.index.faiss and jax.process_index() == 0:
                found.write_faiss(found.directory / "index.faiss")
            directory.publish(f"index/{dataset.name}")
        processes.barrier("encoded")


def index(
    dataset: Dataset, trained: Trained, workdir: Path, place: str | Path = "index"
) -> tuple[Corpus, Vectors]:
    """The distinct passages of a data set, and their vectors, encoded where they are not yet.

    `place` is where in the workdir they are.
    """
    config = trained.config
    store = tokenize_passages(dataset, trained.tokenizers.ctx, config, workdir / "data")
    corpus = Corpus(dataset, store, batch_shape(config))
    encoder = Encoder(trained.mesh, trained.towers, config)
    made_by = (encoder, trained.params, trained.contract)
    return corpus, encode_to_disk(workdir / place / dataset.name, corpus, *made_by, config.index)


def datasets(trained: Trained, workdir: Path) -> list[Dataset]:
    """Whose passages are encoded. Raises UserError for bad rows, or where there are none."""
    config, data = trained.config, trained.data
    if config.index.corpus:
        return [without_questions(config.index.corpus, config, workdir)]
    return _checked(data, config)


def without_questions(where: str, config: Config, workdir: Path) -> Dataset:
    """A corpus by itself, as `load_corpus` has it. Raises UserError as `datasets`."""
    dataset, problems = assemble.read_corpus(where, config, workdir / "data")
    return _checked(Sources([(dataset, 1.0)], [], {where: problems}), config)[0]


def _checked(data: Sources, config: Config) -> list[Dataset]:
    """Each data set once. Raises UserError as `datasets`."""
    for line in assemble.refuse_bad_rows(data, config):
        _say(line)
    found = by_name([*(dataset for dataset, _ in data.train), *data.held_out])
    for dataset in found:
        if not len(dataset.passages):
            raise UserError(f"data source {dataset.name}: no good passage; see --mode=validate")
    return found


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)
