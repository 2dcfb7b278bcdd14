"""The embedded data set: true to its facts, honest in its splits, the same everywhere."""

import collections
import os
import socket
import subprocess
import sys

import pytest

from cosup_jax.data import world, world_facts, world_text
from cosup_jax.data.schema import Dataset, Example, Passage
from cosup_jax.data.world_facts import Fact
from cosup_jax.errors import UserError

ENTITIES = 600


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="module")
def dataset(tfds_dir):
    """Built as a user's first run does it, with every network connection refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was tried"))
        return load(ENTITIES, str(tfds_dir))


def load(entities, place):
    """What `world.records` gives, in memory."""
    found = [record for _, record in world.records(entities, str(place))]
    passages, examples = ([r for r in found if isinstance(r, cls)] for cls in (Passage, Example))
    return Dataset.of("world", world.version(entities), examples, passages)


def by_split(dataset):
    splits = collections.defaultdict(list)
    for example in dataset.examples:
        splits[example.split].append(example)
    return splits


def pairs(examples):
    """(entity, relation) of every hop of every example."""
    found = set()
    for example in examples:
        relations = example.id.split(".")[1].split("-")
        found |= set(zip(example.evidence, relations, strict=True))
    return found


def test_the_stored_rows_are_the_composed_ones(dataset):
    """Catches a column that TFDS loses or reorders, and rows stored under another split."""
    composed = world.compose(ENTITIES, world.TRAIN_QUESTIONS)
    assert dataset.examples == composed.examples
    assert dataset.passages == composed.passages
    assert tuple(by_split(dataset)) == world.SPLITS


def test_a_second_load_only_reads(dataset, tfds_dir, monkeypatch):
    """Catches a rebuild on every start."""
    monkeypatch.setattr(world, "compose", lambda *_: pytest.fail("built twice"))
    monkeypatch.setattr(world.compose, "cache_clear", lambda: None, raising=False)
    again = load(ENTITIES, tfds_dir)
    assert again.examples == dataset.examples and again.passages == dataset.passages


def test_another_process_with_other_hashing_composes_the_same_rows():
    """Catches an order that comes from Python's hash of strings or from a set."""
    code = (
        "import hashlib; from cosup_jax.data import world; d = world.compose(120, 8);"
        "print(hashlib.sha256(repr((d.examples, list(d.passages.values()))).encode()).hexdigest())"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
        )
        for seed in ("1", "2")
    ]
    digests = [process.communicate(timeout=300)[0] for process in started]
    assert digests[0] == digests[1] and len(digests[0]) == 65


def test_held_out_pairs_are_asked_nowhere_in_training(dataset):
    """Catches a held-out pair that another template, task or hop of train gives away."""
    splits = by_split(dataset)
    train, in_domain = pairs(splits["train"]), pairs(splits["in_domain"])
    assert in_domain and not in_domain & train
    assert {entity for entity, _ in in_domain} <= {entity for entity, _ in train}


def test_unseen_entities_and_the_unseen_task_stay_out_of_training(dataset):
    """Catches leaks of the two out-of-domain splits into train."""
    splits = by_split(dataset)
    train = pairs(splits["train"]) | pairs(splits["in_domain"])
    unseen = {entity for entity, _ in pairs(splits["unseen_entities"])}
    assert unseen and not unseen & {entity for entity, _ in train}
    assert unseen <= set(dataset.passages)
    assert world.UNSEEN_RELATION not in {relation for _, relation in train}
    assert "multi_hop" not in {e.task for e in splits["train"] + splits["in_domain"]}
    tasks = collections.Counter(example.task for example in splits["unseen_task"])
    assert set(tasks) == {"multi_hop", "slot_filling"}


def test_ids_and_questions_are_unique_over_all_splits(dataset):
    """Catches a question that stands twice, once to train on and once to be tested with."""
    assert len({example.id for example in dataset.examples}) == len(dataset.examples)
    questions = collections.Counter(example.question for example in dataset.examples)
    assert [question for question, count in questions.items() if count > 1] == []


def test_answers_stand_in_the_supporting_sentence(dataset):
    """Catches support that points at another sentence, and answers the evidence does not give."""
    for example in dataset.examples:
        texts = [dataset.passages[passage_id].text for passage_id in example.evidence]
        grounds = [t[slice(*span)] for t, span in zip(texts, example.support, strict=True)]
        for ground in grounds:
            assert ground[-1] == "." and ground == ground.strip(), example
            assert ground[0] == ground[0].upper(), example
        if example.kind == "span":
            assert example.answers[0] in grounds[-1], example
        else:
            assert example.answers in (("SUPPORTS",), ("REFUTES",)), example


def test_a_two_hop_question_names_the_city_and_hides_the_country(dataset):
    """Catches two-hop questions that one passage answers, or with the hops in wrong order."""
    two_hop = [e for e in dataset.examples if e.task == "multi_hop"]
    for example in two_hop:
        city, country = (dataset.passages[passage_id] for passage_id in example.evidence)
        assert city.title in example.question
        assert country.title in city.text[slice(*example.support[0])]
        assert example.answers[0] not in example.question


def test_the_size_is_respected_and_every_entity_is_trained_or_held_out(dataset):
    """Catches a corpus of another size, or entities that nobody asks about."""
    assert len(dataset.passages) == ENTITIES
    train = collections.Counter(e.evidence[0] for e in by_split(dataset)["train"])
    assert max(train.values()) == world.TRAIN_QUESTIONS
    unseen = {e.evidence[0] for e in by_split(dataset)["unseen_entities"]}
    assert train.keys() | unseen == set(dataset.passages)
    assert min(train.values()) >= 4


def test_the_labels_of_claims_are_balanced_and_true(dataset):
    """Catches a label that can be guessed, and refuted claims that are in fact right."""
    entities = {entity.id: entity for entity in world_facts.entities(ENTITIES)}
    labels = collections.Counter()
    for example in by_split(dataset)["train"]:
        if example.task == "fact_check":
            entity = entities[example.evidence[0]]
            fact = entity.facts[example.id.split(".")[1]]
            supported = example.answers == ("SUPPORTS",)
            labels[supported] += 1
            right = {fact.text} if supported else {fact.text, *fact.also}
            relation = world_text.RELATIONS[entity.kind][example.id.split(".")[1]]
            claims = [
                world_text.sentence(claim, {"name": entity.text, "value": text})
                for text in right
                for claim in relation.claims
            ]
            assert (example.question in claims) == supported, example
    assert 0.45 < labels[True] / labels.total() < 0.55


def test_a_passage_states_every_fact_once_and_briefly(dataset):
    """Catches a fact that can be asked but is not stated, and passages that outgrow Ctx rows."""
    for entity in world_facts.entities(ENTITIES):
        passage, spans = world_text.passage(entity)
        assert set(spans) == set(entity.facts)
        for relation, (start, end) in spans.items():
            assert entity.facts[relation].text in passage.text[start:end]
        assert 20 <= len(passage.text.split()) <= 60
        assert "{" not in passage.text and "  " not in passage.text


def test_articles_and_numbers_read_as_english():
    """Catches "lies in Netherlands", "the the", and figures such as 1e+03 or 1000 million."""
    countries = {e.id: e for e in world_facts.entities(1500) if e.kind == "country"}
    netherlands = countries["NL"]
    assert (netherlands.name, netherlands.text) == ("Netherlands", "the Netherlands")
    assert world_text.passage(netherlands)[0].text.startswith("The Netherlands")
    assert countries["PE"].text == "Peru" and countries["PH"].text == "the Philippines"
    assert countries["CH"].facts["currency"] == Fact("Swiss franc", "the Swiss franc")
    assert {"AN", "CS", "AQ"}.isdisjoint(countries)
    written = {628: "628", 96_286: "96,300", 999_600: "1 million", 999_950_000: "1 billion"}
    written |= {1_249_999: "1.25 million", 327_167_434: "327 million", 15_007: "15,000"}
    for value, text in written.items():
        assert world_facts._quantity(value).text == text


def test_near_values_and_further_right_values_contradict_nothing():
    """Catches refuted claims that one could defend."""
    language = Fact("Hindi", "Hindi", frozenset({"English"}))
    assert not Fact("English", "English").contradicts(language)
    assert Fact("German", "German").contradicts(language)
    near, far = world_facts._quantity(1_200_000), world_facts._quantity(9_000_000)
    assert not near.contradicts(world_facts._quantity(1_100_000))
    assert far.contradicts(near)


def test_changed_packages_or_sizes_never_reuse_prepared_data(monkeypatch):
    """Catches yesterday's data under today's package versions."""
    name = world.WorldConfig(entities=600).name
    assert world.WorldConfig(entities=601).name != name
    assert world.WorldConfig(entities=600, train_questions=9).name != name
    world.fingerprint.cache_clear()
    monkeypatch.setattr(world, "package_versions", lambda: {"pycountry": "99"})
    try:
        assert world.WorldConfig(entities=600).name != name
    finally:
        world.fingerprint.cache_clear()


def test_versions_of_the_packages_are_recorded(dataset):
    """Catches results that cannot be traced to the facts they were trained on."""
    for package, version in world.package_versions().items():
        assert f"{package}-{version}" in dataset.version


def test_a_build_that_was_killed_does_not_get_in_the_way(tmp_path, monkeypatch):
    """Catches half-written data that the next run would read."""

    def killed(*_):
        yield 0, {"id": "CN", "title": "China", "text": "Half a table."}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(world.World, "_generate_examples", killed)
        with pytest.raises(KeyboardInterrupt):
            load(100, str(tmp_path))
    assert len(load(100, str(tmp_path)).passages) == 100


def test_processes_that_start_together_build_once(tmp_path):
    """Catches the second process of a launch failing where the first has just put its data."""
    code = f"from cosup_jax.data import world; list(world.records(100, {str(tmp_path)!r}))"
    started = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(timeout=300) for process in started] == [0, 0]


@pytest.mark.parametrize(
    ("entities", "place", "reason"),
    [
        (10, "", "at least 100"),
        (99_999, "", "to offer, ask less"),
        (100, "gs://bucket", "local directory"),
        (100, "FILE", "Not a directory|File exists"),
    ],
)
def test_bad_settings_are_refused_in_one_line(tmp_path, entities, place, reason):
    """Catches tracebacks and empty splits for a size or a place that cannot be."""
    (tmp_path / "file").write_text("")
    place = {"FILE": str(tmp_path / "file"), "": str(tmp_path)}.get(place, place)
    with pytest.raises(UserError, match=reason) as caught:
        load(entities, place)
    assert "\n" not in str(caught.value)
