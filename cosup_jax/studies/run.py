"""A trained run as the measures of a study read it: its models, its held-out sets, its past."""

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from cosup_jax import assemble, held_out
from cosup_jax.assemble import Trained
from cosup_jax.checkpoint import complete_steps, restore_params
from cosup_jax.config import Config
from cosup_jax.data import tokens
from cosup_jax.data.batch import batch_shape
from cosup_jax.data.pipeline import pack_passages
from cosup_jax.data.plan import left_out
from cosup_jax.data.schema import Passage
from cosup_jax.data.storage import Chosen
from cosup_jax.dotted import replace_dotted
from cosup_jax.held_out import Evaluator, HeldOut
from cosup_jax.runtime.workdir import checkpoints
from cosup_jax.search.encoder import Encoder
from cosup_jax.towers import Towers

# Metric -> item -> value. An item is the id of a question, or SOURCE/ID of a passage; a number of a
# whole set, or of the whole run, has the one item "".
Metrics = dict[str, dict[str, float]]
Scores = dict[str, Metrics]  # by held-out set; "" is of none

# What a metric's values are, and what a measure may give: a regular expression of whole names.
SHARE = "share"  # of 0 to 1
POINTS = "points"  # a difference of two shares
NUMBER = "number"  # nothing says how much of it is as good as none; nor of the next two
POSITIVE = "positive"  # nats, ranks, squared distances, ratios: 0 or more
COSINE = "cosine"  # -1 to 1
LESS = " - "  # between two metrics: the first less the second, item by item
Gives = Mapping[str, str]

PASSAGES = 500  # that every run of a study is measured on
_SEED = 0  # by which they are drawn: of the measure, not of the run


class Read(NamedTuple):
    """What was read of a run so far: several measures want the same."""

    queries: dict[tuple[int, int], Any]  # by step and id of a HeldOut, which is kept beside them
    vectors: dict[tuple[int, bytes], np.ndarray]  # [D], by step and digest of a passage's tokens


class Run(NamedTuple):
    """One checkpoint of a run, and what is asked of it."""

    trained: Trained
    workdir: Path
    sets: list[HeldOut]  # packed, as `held_out_sets` makes them
    store: tokens.TokenStore  # what it was trained on
    read: Read


class Asked(NamedTuple):
    """The [Ret]s of a held-out set, in packed order."""

    ids: list[str]  # of each one's question
    query_QxD: np.ndarray  # float32, as compared with passages
    passage_Q: np.ndarray  # the passage it asks for, by its row in the set's store


class Sample(NamedTuple):
    """Passages of all held-out sources together."""

    ids: list[str]  # SOURCE/ID
    passages: list[Passage]
    tokens: list[np.ndarray]  # int32 [n], as Ctx reads them


def opened(config: Config, workdir: Path) -> Run:
    """The newest checkpoint of a locked workdir. Raises UserError as `assemble.trained` does."""
    trained = assemble.trained(config, workdir)
    config, directory = trained.config, workdir / "data"
    store = tokens.tokenize(trained.data.train, *trained.tokenizers, config, directory)
    asked = sets(trained, workdir, store, config.eval.examples)
    return Run(trained, workdir, asked, store, Read({}, {}))


def sets(trained: Trained, workdir: Path, store: tokens.TokenStore, most: int) -> list[HeldOut]:
    """The held-out sets of a run that was trained on `store`, at most so many questions of each."""
    config = replace_dotted(trained.config, "eval.examples", most)
    given = (trained.data.held_out, trained.tokenizers, config, workdir / "data", store)
    return held_out.held_out_sets(*given, left_out(store, config))


def over_training(run: Run) -> Iterator[Run]:
    """The run at each of its kept checkpoints, oldest first; `run` itself is one of them.

    Raises UserError for a damaged one.
    """
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    abstract, saved = jax.tree.map(place, run.trained.params), checkpoints(run.workdir)
    for step in complete_steps(saved):
        if step == run.trained.step:
            yield run
            continue
        found = restore_params(saved, abstract, step)
        now = run.trained._replace(params=found.state, step=step, meta=found.meta)
        yield run._replace(trained=now)


def asked(run: Run, part: HeldOut) -> Asked:
    """The queries of a set's [Ret]s; of a set without any, none."""
    trained, key = run.trained, (run.trained.step, id(part))
    if key not in run.read.queries:
        evaluator = _evaluator(trained.mesh, trained.towers, trained.config)
        run.read.queries[key] = part, evaluator.queries(trained.params, part)
    query_QxD, rets_Q = run.read.queries[key][1]
    question_Q = np.searchsorted(part.store.ret_offsets, rets_Q, side="right") - 1
    ids = [part.examples[question].id for question in question_Q]
    return Asked(ids, query_QxD, part.store.ret_passages[rets_Q])


def sample(run: Run, most: int = PASSAGES) -> Sample:
    """`most` distinct passages, the same for every run over the same sources."""
    sources = list({part.dataset.version: part for part in run.sets}.values())
    rows, first = drawn(sum(len(part.dataset.passages) for part in sources), most), 0
    found = Sample([], [], [])
    for part in sources:
        passages = part.dataset.passages
        here = rows[(rows >= first) & (rows < first + len(passages))] - first
        for row in passages.by_id()[here]:
            found.passages.append(passages.at(int(row)))
            found.ids.append(f"{part.dataset.name}/{found.passages[-1].id}")
            found.tokens.append(part.store.ctx[int(row)])
        first += len(passages)
    return found


def vectors(run: Run, passages: Sequence[np.ndarray]) -> np.ndarray:
    """[N, D] float32 vectors of passages given as the tokens that Ctx reads."""
    trained, read = run.trained, run.read.vectors
    keys = [(trained.step, hashlib.sha256(passage).digest()) for passage in passages]
    new = {key: i for i, key in enumerate(keys) if key not in read}
    if new:
        encoder = _encoder(trained.mesh, trained.towers, trained.config)
        chosen = Chosen(passages.__getitem__, np.array([*new.values()]))
        packed = pack_passages(chosen, batch_shape(trained.config))
        read.update(zip(new, encoder.corpus(trained.params, packed, len(new)), strict=True))
    found_NxD = np.empty((len(keys), trained.towers.gen.width), np.float32)
    for row, key in enumerate(keys):
        found_NxD[row] = read[key]
    return found_NxD


def corpus_vectors(run: Run, part: HeldOut) -> np.ndarray:
    """[N, D] float32 vectors of a set's corpus, by its rows."""
    return vectors(run, part.corpus.tokens)


def by_item(ids: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """{id: value}; of an id that comes several times, as of a question's two [Ret], the mean."""
    found: dict[str, list[float]] = {}
    for id, value in zip(ids, values, strict=True):
        found.setdefault(id, []).append(float(value))
    return {id: float(np.mean(given)) for id, given in found.items()}


def whole(**values: float) -> Metrics:
    """Metrics that have no items but the whole."""
    return {name: {"": float(value)} for name, value in values.items()}


def drawn(count: int, most: int) -> np.ndarray:
    """int64, rising: `most` of the numbers below `count`, or all."""
    return np.sort(np.random.default_rng(_SEED).permutation(count)[:most])


# Programs are compiled once for all checkpoints of a run, and for all runs of one config.
@functools.lru_cache(maxsize=2)
def _evaluator(mesh: Mesh, towers: Towers, config: Config) -> Evaluator:
    return Evaluator(mesh, towers, config)


@functools.lru_cache(maxsize=2)
def _encoder(mesh: Mesh, towers: Towers, config: Config) -> Encoder:
    return Encoder(mesh, towers, config)
