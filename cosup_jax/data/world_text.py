"""The English of the `world` data set: sentences, questions and claims about an entity.

Every choice of wording is a hash of what is worded: the same facts give the same text everywhere.
"""

import dataclasses
import hashlib
import string
from collections.abc import Iterable, Sequence
from typing import TypeVar

from cosup_jax.data.schema import Passage
from cosup_jax.data.world_facts import Entity, Fact

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Relation:
    """How one relation is asked for and claimed; {name} is the entity, {value} a value."""

    slot: str  # name of the relation in a slot-filling question
    questions: tuple[str, ...]
    claims: tuple[str, ...]


RELATIONS = {
    "city": {
        "country": Relation(
            "country",
            (
                "In which country is {name}?",
                "Which country does {name} belong to?",
                "{name} is a city in which country?",
            ),
            ("{name} is a city in {value}.", "{name} belongs to {value}."),
        ),
        "continent": Relation(
            "continent",
            (
                "On which continent does {name} lie?",
                "Which continent is {name} part of?",
                "{name} is found on what continent?",
            ),
            ("{name} lies in {value}.", "The continent of {name} is {value}."),
        ),
        "population": Relation(
            "population",
            (
                "How many people live in {name}?",
                "What is the population of {name}?",
                "About how many inhabitants does {name} have?",
            ),
            ("About {value} people live in {name}.", "{name} has about {value} inhabitants."),
        ),
        "timezone": Relation(
            "time zone",
            (
                "What is the time zone of {name}?",
                "Which time zone do clocks in {name} follow?",
                "In which time zone is {name}?",
            ),
            ("The time zone of {name} is {value}.", "Clocks in {name} follow {value}."),
        ),
        "latitude": Relation(
            "latitude",
            (
                "What is the latitude of {name}?",
                "How far from the equator is {name}?",
                "At which latitude does {name} lie?",
            ),
            ("The latitude of {name} is {value}.", "{name} lies at {value}."),
        ),
        "larger_city": Relation(
            "nearest larger city",
            (
                "What is the nearest larger city to {name}?",
                "Which city is the closest to {name} among those that are larger?",
                "From {name}, which is the nearest larger city?",
            ),
            (
                "The nearest larger city to {name} is {value}.",
                "{value} is the nearest city larger than {name}.",
            ),
        ),
        "capital_distance": Relation(
            "distance to the capital",
            (
                "How far is {name} from the capital?",
                "What is the distance between {name} and the capital?",
                "How many kilometres is it from {name} to the capital?",
            ),
            (
                "{name} is about {value} from the capital.",
                "The capital is about {value} away from {name}.",
            ),
        ),
    },
    "country": {
        "capital": Relation(
            "capital",
            (
                "What is the capital of {name}?",
                "Which city is the capital of {name}?",
                "What is the name of the capital of {name}?",
            ),
            ("The capital of {name} is {value}.", "{value} is the capital of {name}."),
        ),
        "continent": Relation(
            "continent",
            (
                "On which continent does {name} lie?",
                "Which continent is {name} part of?",
                "{name} is found on what continent?",
            ),
            ("{name} lies in {value}.", "{name} is part of {value}."),
        ),
        "currency": Relation(
            "currency",
            (
                "Which currency is used in {name}?",
                "What is the currency of {name}?",
                "What do people pay with in {name}?",
            ),
            ("The currency of {name} is {value}.", "People in {name} pay with {value}."),
        ),
        "language": Relation(
            "language",
            (
                "Which language is spoken in {name}?",
                "What language do people speak in {name}?",
                "What is a language of {name}?",
            ),
            ("{value} is spoken in {name}.", "People in {name} speak {value}."),
        ),
        "population": Relation(
            "population",
            (
                "How many people live in {name}?",
                "What is the population of {name}?",
                "About how many inhabitants does {name} have?",
            ),
            ("About {value} people live in {name}.", "{name} has about {value} inhabitants."),
        ),
        "area": Relation(
            "area",
            ("How large is {name}?", "What is the area of {name}?", "What area does {name} cover?"),
            ("{name} covers about {value}.", "The area of {name} is about {value}."),
        ),
        "calling_code": Relation(
            "calling code",
            (
                "What is the calling code of {name}?",
                "Which code do you dial first to call {name}?",
                "Telephone numbers of {name} begin with which code?",
            ),
            (
                "The calling code of {name} is {value}.",
                "Telephone numbers of {name} begin with {value}.",
            ),
        ),
        "domain": Relation(
            "internet domain",
            (
                "What is the internet domain of {name}?",
                "Which internet domain belongs to {name}?",
                "What do web addresses of {name} end in?",
            ),
            (
                "The internet domain of {name} is {value}.",
                "The domain {value} belongs to {name}.",
            ),
        ),
        "neighbour": Relation(
            "neighbour",
            (
                "Which country borders {name}?",
                "What is a neighbour of {name}?",
                "With which country does {name} share a border?",
            ),
            ("{name} borders {value}.", "{name} shares a border with {value}."),
        ),
    },
}

# One opening names the entity; the other sentences refer back to it and so may come in any order.
_OPENINGS = {
    "city": (
        "{name} is a city in {country}, on the continent of {continent}.",
        "{name} lies in {country}, which is part of {continent}.",
        "{name}, a city of about {population} people in {country}, lies in {continent}.",
        "{name} is a city in {country} ({continent}) with about {population} inhabitants.",
        "{name}, a city of about {population} people, lies in {country}.",
        "{name} is a city in {country}.",
    ),
    "country": (
        "{name} is a {noun} in {continent}.",
        "{name} is a {noun} in {continent} with about {population} people.",
        "{name} is a {noun} in {continent}; its capital is {capital}.",
        "{name}, a {noun} in {continent}, covers about {area}.",
        "{name} is a {noun} in {continent}, home to about {population} people.",
    ),
}
_SENTENCES = {
    "city": (
        "About {population} people live there.",
        "It has about {population} inhabitants.",
        "Its population is about {population}.",
        "It is home to about {population} people.",
        "Its time zone is {timezone}.",
        "Clocks there follow the {timezone} time zone.",
        "Its time zone is {timezone}, and its population is about {population}.",
        "Its latitude is {latitude}.",
        "It lies at {latitude}.",
        "It lies at {latitude}, in the {timezone} time zone.",
        "The nearest larger city is {larger_city}.",
        "{larger_city} is the nearest larger city.",
        "The capital is about {capital_distance} away.",
        "It is about {capital_distance} from the capital.",
        "The nearest larger city is {larger_city}; the capital is about {capital_distance} away.",
        "It is about {capital_distance} from the capital, and the nearest larger city is "
        "{larger_city}.",
    ),
    "country": (
        "Its capital is {capital}.",
        "The capital is {capital}.",
        "Its capital is {capital}, and its currency is {currency}.",
        "Its currency is {currency}.",
        "People there pay with {currency}.",
        "{language} is spoken there.",
        "{language} is a language of the {noun}.",
        "People pay with {currency}, and {language} is spoken.",
        "About {population} people live there.",
        "It has about {population} inhabitants.",
        "Its area is about {area}.",
        "It covers about {area}.",
        "It covers about {area} and has about {population} inhabitants.",
        "It borders {neighbour}.",
        "It shares a border with {neighbour}.",
        "Its calling code is {calling_code}.",
        "Telephone numbers begin with {calling_code}.",
        "Web addresses end in {domain}, and telephone numbers begin with {calling_code}.",
        "Its internet domain is {domain}, and its calling code is {calling_code}.",
        "Its internet domain is {domain}.",
    ),
}


def draw(*key: str) -> int:
    """A uniform 64-bit number that depends on the key alone."""
    return int.from_bytes(hashlib.sha256("\x1f".join(key).encode()).digest()[:8], "big")


def pick(options: Sequence[_T], *key: str) -> _T:
    """One of the options, chosen by the key."""
    return options[draw(*key) % len(options)]


def shuffled(options: Iterable[str], *key: str) -> list[str]:
    """The options in an order chosen by the key."""
    return sorted(options, key=lambda option: draw(*key, option))


def passage(entity: Entity) -> tuple[Passage, dict[str, tuple[int, int]]]:
    """The passage that states all facts of the entity, each once.

    Returns: the passage and, for each relation, [start, end) of its sentence in the text.
    """
    texts = {relation: fact.text for relation, fact in entity.facts.items()}
    texts |= {"name": entity.text, "noun": entity.noun}
    unstated = set(entity.facts)
    fitting = [opening for opening in _OPENINGS[entity.kind] if _fields(opening) <= set(texts)]
    whole = [opening for opening in fitting if "continent" in _fields(opening)]
    sentences = [pick(whole or fitting, entity.id, "opening")]
    unstated -= _fields(sentences[0])
    for template in shuffled(_SENTENCES[entity.kind], entity.id):
        stated = _fields(template) - {"noun"}
        if stated <= unstated:
            sentences.append(template)
            unstated -= stated
    text, spans = "", {}
    for template in sentences:
        text += " " if text else ""
        start = len(text)
        text += sentence(template, texts)
        spans |= {field: (start, len(text)) for field in _fields(template) if field in entity.facts}
    return Passage(entity.id, entity.name, text), spans


def sentence(template: str, texts: dict[str, str]) -> str:
    """The template filled in; an article that comes first gets its capital letter."""
    filled = template.format_map(texts)
    return "T" + filled[1:] if filled.startswith("the ") else filled


def question(template: str, name: str) -> str:
    return sentence(template, {"name": name})


def claim(relation: Relation, entity: Entity, value: Fact, key: str) -> str:
    """A statement that `value` is the entity's."""
    template = pick(relation.claims, entity.id, key)
    return sentence(template, {"name": entity.text, "value": value.text})


def _fields(template: str) -> set[str]:
    return {field for _, field, _, _ in string.Formatter().parse(template) if field}
