"""From the name of a source to its examples and passages."""

import dataclasses
import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from cosup_jax.config import DataConfig
from cosup_jax.data import prepared, world
from cosup_jax.data.digests import digest
from cosup_jax.data.formats import alce, jsonl, kilt, official, passages, selfrag, tfds
from cosup_jax.data.ingest import ingest
from cosup_jax.data.markup import passage_text
from cosup_jax.data.problems import Problems, printable
from cosup_jax.data.schema import Dataset, Example, Passage
from cosup_jax.data.storage import share_of
from cosup_jax.errors import UserError
from cosup_jax.runtime.bucket import is_url
from cosup_jax.runtime.paths import expanded

FORMATS = {"jsonl": jsonl, "official": official, "selfrag": selfrag, "kilt": kilt, "alce": alce}
KNOWN = (
    "DIR/x.jsonl[.gz] with its passages in DIR/x.passages.jsonl, tfds:world, tfds:NAME, "
    "prepared:DIR, official:DIR/x.pickle, selfrag:DIR/x.jsonl, kilt:DIR/x.jsonl::KNOWLEDGE, "
    "alce:DIR/x.json; corpus:SOURCE, its passages as texts to learn"
)
TITLE = "A text without a title"  # what asks for it
_REVISIONS = {"selfrag": 2}  # raise it whenever the same file gives as many, but other rows
_LONGEST_NAME = 160  # bytes; file systems take 255, of which we need some


def load(source: str, data: DataConfig, directory: Path) -> tuple[Dataset, Problems]:
    """Reads one source, without its `@weight`, or what an earlier call has kept of it.

    Args:
      directory: where data sets are kept.

    Raises:
      UserError: no such source, or a file that as a whole cannot be used. Bad rows are left out
        and noted in the problems.
    """
    kind, where = _kind(source)
    if source == "tfds:world":
        version = world.version(data.world_entities)
        read = lambda problems: world.records(data.world_entities, data.tfds_dir)
        return ingest("world", version, read, directory)
    if kind == "tfds":
        version = tfds.version(where, data.tfds_dir, directory)
        read = lambda problems: tfds.read(where, data.tfds_dir, problems)
        return ingest(re.split("[/:]", where)[0], version, read, directory)
    if kind in FORMATS:
        format = FORMATS[kind]
        name, version = _name(where), digest(format.files(where), directory)
        # KILT tells task and split by a file's name.
        version = f"{kind}{_REVISIONS.get(kind, '')}-{Path(where.split('::')[0]).name}-{version}"
        return ingest(name, version, lambda p: format.read(where, p), directory, where)
    if kind == "corpus":
        dataset, problems = load(where, data, directory)
        texts, found = _as_texts(dataset, directory, where)
        return texts, problems.extend([found])
    if kind == "prepared":
        return prepared.load(*where.rsplit("::", 1), directory), Problems()
    raise UserError(f"unknown data source {source!r}; known are {KNOWN}")


def _as_texts(dataset: Dataset, directory: Path, where: str) -> tuple[Dataset, Problems]:
    """The passages of a data set as examples without evidence: a title asks for its text."""
    passages, name = dataset.passages, f"{dataset.name}_corpus"

    def read(problems: Problems) -> Iterator[tuple[str, Example]]:
        for row, passage in enumerate(passages.values()):
            asked = {
                "task": "long_form",
                "question": passage.title or TITLE,
                "long_answer": passage.text,  # `output` would read markup in it
            }
            example = Example(id=passage.id, answers=(), evidence=(), **asked)
            yield passages.where(row), example

    texts, problems = ingest(name, f"{dataset.version}-texts", read, directory, where)
    return dataclasses.replace(texts, passages=passages), problems


def load_corpus(where: str, data: DataConfig, directory: Path) -> tuple[Dataset, Problems]:
    """Passages without questions: a file or a directory, as formats/passages.py reads them, or
    tfds:world/N, the N passages of a world of that size.

    Raises UserError if there is none; bad rows are left out and noted in the problems.
    """
    if where.startswith("tfds:"):
        entities = _entities(where)
        version, read = world.version(entities), lambda problems: _passages(entities, data.tfds_dir)
        try:
            return ingest(f"world-{entities}", version, read, directory)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    paths = passages.files(where)
    name, version = _name(where.rstrip("/")), digest(paths, directory)
    read = lambda problems: passages.read(where, problems)
    return ingest(name, f"passages-{version}", read, directory, where)


def check_corpus(where: str) -> None:
    """Raises UserError, in no time, for what `load_corpus` would find no passage in; "" is none."""
    if where.startswith("tfds:"):
        _entities(where)
    elif where and not is_url(where):
        passages.files(where)


def _entities(where: str) -> int:
    if found := re.fullmatch(r"tfds:world/(\d{1,9})", where):
        return int(found[1])
    raise UserError(f"{where}: a corpus of TFDS is tfds:world/N, N places such as 30000")


def _passages(entities: int, tfds_dir: str) -> Iterator[tuple[str, Passage | Example]]:
    """Of a world, which come first: its questions need not be written."""
    records = world.records(entities, tfds_dir)
    yield from itertools.islice(records, max(entities, 1))
    world.compose.cache_clear()


def expand(source: str) -> list[str]:
    """The sources that a prepared directory, or a name with wildcards, stands for, sorted.

    Raises UserError if there is none.
    """
    kind, where = _kind(source)
    if where.startswith("~"):
        home = str(expanded(where))
        source, where = source.removesuffix(where) + home, home
    if kind == "corpus":
        return [f"corpus:{name}" for name in expand(where)]
    if kind == "prepared" and "::" not in where:
        return [f"{source}::{name}" for name in prepared.manifest(where)["sources"]]
    if (
        kind in ("tfds", "prepared")
        or Path(where.split("::")[0]).is_file()
        or not glob.has_magic(where)
    ):
        return [source]
    prefix, (pattern, *rest) = source.removesuffix(where), where.split("::")
    paths = sorted(glob.glob(pattern, recursive=True))
    found = [path for path in paths if ".passages.jsonl" not in path]
    if not found:
        raise UserError(f"data source {source!r} matches no file; check the path")
    return ["::".join([prefix + path, *rest]) for path in found]


def by_name(datasets: Iterable[Dataset]) -> list[Dataset]:
    """Each once. Raises UserError if two of them have one name, by which files are called."""
    found: dict[str, Dataset] = {}
    for dataset in datasets:
        if found.setdefault(dataset.name, dataset) is not dataset:
            raise UserError(f"two sources are called {dataset.name}; rename one of their files")
    return list(found.values())


def identity(source: str) -> tuple[str, ...]:
    """The same for every spelling of a source: x.jsonl, ./x.jsonl, a link to it.

    Raises UserError if its files are not there.
    """
    kind, where = _kind(source)
    if kind == "corpus":
        return kind, *identity(where)
    if kind in FORMATS:
        return kind, *map(os.path.realpath, FORMATS[kind].files(where))
    directory, _, name = where.rpartition("::")
    return (kind, os.path.realpath(directory), name) if kind == "prepared" else (source,)


def carve(dataset: Dataset, fraction: float) -> Dataset:
    """Holds out a `dev` split of a data set that has nothing but training rows, by passage.

    A share of the passages, one at least, is drawn by a hash of their text. Examples that read any
    of them are `dev`, so that training reads none of these as evidence; it may read others of the
    same examples. Examples without evidence are drawn by a hash of their id.
    """
    rows, shares = dataset.splits["train"], {}
    lowest = np.zeros(len(rows))
    for i, example in enumerate(dataset.rows("train")):
        for id in example.evidence:
            if id not in shares:
                shares[id] = share_of(passage_text(dataset.passages[id]))
        lowest[i] = min([shares[id] for id in example.evidence] or [share_of(example.id)])
    held_out = lowest <= max(fraction, lowest.min())
    if held_out.all():
        raise UserError(
            f"data source {dataset.name}: all rows read the passage that would be held out, which "
            "would leave none to train on; give some rows a split such as 'dev', or evaluate on "
            "another source"
        )
    splits = {"train": rows[~held_out], "dev": rows[held_out]}
    return dataclasses.replace(dataset, splits=splits, version=f"{dataset.version}+dev{fraction}")


def prepared_directory(source: str) -> str:
    """DIR of `prepared:DIR::NAME`; "" for any other source."""
    kind, where = _kind(source)
    return where.rpartition("::")[0] if kind == "prepared" else ""


def eval_sets(datasets: Iterable[Dataset]) -> dict[str, tuple[Dataset, str]]:
    """Everything held out: `<data set>.<split>` -> data set, split.

    Raises UserError if a data set holds nothing out, or two sets have one name.
    """
    found: dict[str, tuple[Dataset, str]] = {}
    for dataset in datasets:
        splits = [split for split in dataset.splits if split != "train"]
        if not splits:
            raise UserError(
                f"evaluation source {dataset.name}: nothing is held out; give some rows another "
                "split than 'train', or set config.data.dev_fraction"
            )
        for split in splits:
            name = f"{dataset.name}.{split}"
            if name in found:
                raise UserError(
                    f"two evaluation sets are called {name}; rename one of the files in "
                    "config.data.eval"
                )
            found[name] = dataset, split
    return found


def _kind(source: str) -> tuple[str, str]:
    """`kilt:a::b` -> ("kilt", "a::b"); a path has no prefix."""
    prefix, colon, where = source.partition(":")
    if colon and prefix in (*FORMATS, "tfds", "prepared", "corpus"):
        return prefix, where
    name = source.removesuffix(".gz")
    if name.endswith(".jsonl") and not name.endswith(".passages.jsonl"):
        return "jsonl", source
    return "", source


def _name(where: str) -> str:
    """x of DIR/x.jsonl.gz. Raises UserError if it cannot name what is made of it."""
    name = re.sub(
        r"(\.jsonl|\.json|\.pickle|\.pkl|\.array_?record.*)?(\.gz)?$",
        "",
        Path(where.split("::")[0]).name,
    )
    is_utf8 = os.fsencode(where) == where.encode(errors="replace")
    if not is_utf8 or len(name.encode()) > _LONGEST_NAME:
        raise UserError(
            f"{printable(where)}: its path must be UTF-8, and its name at most "
            f"{_LONGEST_NAME} bytes, as files are named after it; rename the file"
        )
    return name
