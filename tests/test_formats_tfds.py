"""Data sets as TFDS prepares them, of each schema we know and of one we do not."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from imports import paths, replaced, training_text

from cosup_jax.data import ingest
from cosup_jax.data.formats import tfds as format
from cosup_jax.data.formats import tfds_schemas
from cosup_jax.data.problems import BadRow
from cosup_jax.data.rows import Row
from cosup_jax.errors import UserError

Text, Sequence = tfds.features.Text, tfds.features.Sequence
SQUAD = {
    **{"id": Text(), "title": Text(), "context": Text(), "question": Text()},
    "answers": Sequence({"text": Text(), "answer_start": np.int32}),
}
HOTPOT = {
    **{"id": Text(), "question": Text(), "answer": Text()},
    "supporting_facts": Sequence({"title": Text(), "sent_id": np.int32}),
    "context": Sequence({"title": Text(), "sentences": Sequence(Text())}),
}
TRIVIA = {
    **{"question": Text(), "question_id": Text()},
    "answer": {"value": Text(), "aliases": Sequence(Text()), "type": Text()},
    "entity_pages": Sequence({"title": Text(), "wiki_context": Text()}),
    "search_results": Sequence({"title": Text(), "search_context": Text()}),
}
NQ = {"question": Text(), "answer": Sequence(Text())}

CONTEXT = "Oslo is a city. It has fish. It is old."
SQUAD_ROW = {
    **{"id": "s1", "title": "The_city", "context": CONTEXT, "question": "What has it?"},
    "answers": {"text": ["fish", "fish", "old"], "answer_start": [23, 23, 35]},
}
HOTPOT_ROW = {
    **{"id": "h1", "question": "Is it?", "answer": "yes"},
    "supporting_facts": {"title": ["Sun", "Oslo", "Sun"], "sent_id": [1, 0, 2]},
    "context": {
        "title": ["Oslo", "Fish", "Sun"],
        "sentences": [["Oslo is old.", " Yes."], ["Fish swim."], ["A sun.", " Hot.", " Far."]],
    },
}
TRIVIA_ROW = {
    **{"question": "Which?", "question_id": "t1"},
    "answer": {"value": "Oslo", "aliases": ["Oslo", "Christiania"], "type": "x"},
    "entity_pages": {"title": ["Norway"], "wiki_context": ["Oslofjord.\n\nChristiania is it.\n"]},
    "search_results": {"title": ["Web"], "search_context": ["Oslo!"]},
}


class Table(tfds.core.GeneratorBasedBuilder):
    """Whatever rows with whatever features; subclasses have its data set's name."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos: dict = {}  # noqa: RUF012
    features: dict
    splits: dict

    def _info(self):
        features = tfds.features.FeaturesDict(self.features)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(rows) for split, rows in self.splits.items()}

    def _generate_examples(self, rows):
        yield from enumerate(rows)


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Prepares rows under a name, as ArrayRecord, and returns where."""
    # Writing lists of lists asks TensorFlow for a type that NumPy has as well; reading does not.
    np_dtype = property(lambda info: info.np_dtype)
    monkeypatch.setattr(tfds.features.TensorInfo, "tf_dtype", np_dtype)
    tfds.disable_progress_bar()

    def prepare(name, features, file_format="array_record", **splits):
        fields = {"features": features, "splits": splits, "__module__": __name__, "name": name}
        with tfds.core.registered.skip_registration():
            builder = type(name.title().replace("_", ""), (Table,), fields)
        builder(data_dir=str(tmp_path / "tfds"), file_format=file_format).download_and_prepare()
        return str(tmp_path / "tfds")

    return prepare


def read(name, place, cache):
    """A prepared data set, ingested."""
    read = lambda problems: format.read(name, place, problems)
    return ingest.ingest("set", format.version(name, place, Path(place)), read, cache)


def test_squad(prepare, tmp_path):
    """Catches validation rows in training, one passage per question, and a wrong sentence."""
    impossible = SQUAD_ROW | {"id": "s2", "answers": {"text": [], "answer_start": []}}
    other = SQUAD_ROW | {"id": "s3", "answers": {"text": ["Oslo"], "answer_start": [5]}}
    whole = SQUAD_ROW | {"id": "s4", "answers": {"text": ["Oslo is a city."], "answer_start": [0]}}
    last = SQUAD_ROW | {"id": "s5", "answers": {"text": ["old"], "answer_start": [35]}}
    rows = {"train": [SQUAD_ROW, impossible], "validation": [other, whole, last]}
    place = prepare("my_squad", SQUAD, **rows)
    dataset, problems = read("my_squad", place, tmp_path)
    assert dict(problems.counts) == {"no_answer": 1}
    assert problems.listed[0].where == "my_squad/1.0.0/train[1]"
    (passage,) = dataset.passages.values()
    assert (passage.title, passage.text) == ("The city", CONTEXT)
    first, second, *others = dataset.examples
    assert (first.id, first.answers, first.split) == ("s1", ("fish", "old"), "train")
    start, end = first.support[0]
    assert CONTEXT[start:end] == "It has fish."
    assert (second.id, second.split, second.support) == ("s3", "dev", (None,))
    assert [CONTEXT[slice(*e.support[0])] for e in others] == ["Oslo is a city.", "It is old."]
    assert training_text(dataset)[0] == [
        *[(1, "<ret>"), (2, f"The city :: {CONTEXT}"), (2, "<cs>"), (1, "fish"), (1, "<ce>")],
        (1, "<eos>"),
    ]


def test_squad_2_marks_what_cannot_be_answered(prepare, tmp_path):
    """Catches a plausible but wrong answer learnt from SQuAD 2.0."""
    features = SQUAD | {"is_impossible": np.bool_}
    rows = [SQUAD_ROW | {"is_impossible": True}, SQUAD_ROW | {"id": "b", "is_impossible": False}]
    dataset, problems = read("squad_two", prepare("squad_two", features, train=rows), tmp_path)
    assert [e.id for e in dataset.examples] == ["b"] and dict(problems.counts) == {"no_answer": 1}


def test_hotpot(prepare, tmp_path):
    """Catches distractors as evidence, facts in the wrong page, and blanks in the spans."""
    lost = HOTPOT_ROW | {"id": "h2", "supporting_facts": {"title": ["Moon"], "sent_id": [0]}}
    far = HOTPOT_ROW | {"id": "h3", "supporting_facts": {"title": ["Sun"], "sent_id": [9]}}
    below = HOTPOT_ROW | {"id": "h4", "supporting_facts": {"title": ["Sun"], "sent_id": [-1]}}
    place = prepare("hops", HOTPOT, train=[HOTPOT_ROW, lost, far, below])
    dataset, problems = read("hops", place, tmp_path)
    assert dict(problems.counts) == {"missing_passage": 1} and len(dataset.passages) == 3
    assert [e.support for e in dataset.examples] == [((7, 16), (0, 12)), (None,), (None,)]
    assert len(dataset.examples[0].candidates) == 3 and dataset.examples[0].kind == "label"
    assert training_text(dataset)[0] == [
        *[(1, "<ret>"), (2, "Sun :: A sun. Hot. Far."), (2, "<cs>"), (1, "Hot. Far."), (1, "<ce>")],
        *[(1, "<ret>"), (2, "Oslo :: Oslo is old. Yes."), (2, "<cs>"), (1, "Oslo is old.")],
        *[(1, "<ce>"), (1, "yes"), (1, "<eos>")],
    ]


def test_a_dict_of_lists_is_as_good_as_a_list_of_dicts(prepare, tmp_path):
    """Catches HotpotQA as Hugging Face lays it out, refused as an unknown schema."""
    features = HOTPOT | {
        "supporting_facts": {"title": Sequence(Text()), "sent_id": Sequence(np.int32)},
        "context": {"title": Sequence(Text()), "sentences": Sequence(Sequence(Text()))},
    }
    dataset, problems = read("lists", prepare("lists", features, train=[HOTPOT_ROW]), tmp_path)
    assert not problems.counts and dataset.examples[0].support == ((7, 16), (0, 12))


def test_trivia(prepare, tmp_path):
    """Catches whole pages as passages, the web before the encyclopedia, "<unk>" as answer, what
    holds the answer within another word as evidence, and examples kept of a time when it was."""
    bare = TRIVIA_ROW | {
        "question_id": "t2",
        "entity_pages": {"title": [], "wiki_context": []},
        "search_results": {"title": [], "search_context": []},
    }
    found = {"title": ["Web"], "search_context": ["In Oslo."]}
    web = bare | {"question_id": "t3", "search_results": found}
    hidden = bare | {"question_id": "t4", "answer": {"value": "<unk>", "aliases": [], "type": ""}}
    place = prepare("trivia", TRIVIA, train=[TRIVIA_ROW, bare, web], test=[hidden])
    dataset, problems = read("trivia", place, tmp_path)
    assert dataset.version.startswith("trivia/1.0.0+r2-")
    assert dict(problems.counts) == {"no_answer": 1, "no_provenance": 1}
    texts = [(passage.title, passage.text) for passage in dataset.passages.values()]
    assert texts == [
        ("Norway", "Oslofjord."),
        ("Norway", "Christiania is it."),
        ("Web", "In Oslo."),
    ]
    assert [len(e.evidence) for e in dataset.examples] == [1, 0, 1]
    assert dataset.examples[0].answers == ("Oslo", "Christiania")
    assert training_text(dataset)[:2] == [
        [
            *[(1, "<ret>"), (2, "Norway :: Christiania is it."), (2, "<cs>")],
            *[(1, "Christiania"), (1, "<ce>"), (1, "<eos>")],
        ],
        [(1, "Oslo"), (1, "<eos>")],
    ]


def test_nq_open(prepare, tmp_path):
    """Catches a question without id or passage that is refused or gets another's id."""
    rows = [{"question": "Who?", "answer": ["A", "B", "A"]}, {"question": "Who?", "answer": []}]
    dataset, problems = read("nq", prepare("nq", NQ, train=rows, validation=rows[:1]), tmp_path)
    assert dict(problems.counts) == {"no_provenance": 2, "no_answer": 1}
    assert [(e.id, e.answers) for e in dataset.examples] == [
        ("train-0", ("A", "B")),
        ("validation-0", ("A", "B")),
    ]


def test_bad_rows_are_named(prepare, tmp_path):
    """Catches empty questions and contexts in training."""
    rows = [
        SQUAD_ROW | {"id": f"{n}", field: " "} for n, field in enumerate(("context", "question"))
    ]
    dataset, problems = read("bad", prepare("bad", SQUAD, train=rows), tmp_path)
    assert dict(problems.counts) == {"empty_text": 2} and not dataset.examples


def test_an_unknown_schema_is_refused_with_the_known(prepare):
    """Catches features that are guessed at."""
    features = {"label": Text(), "image": Sequence({"x": np.int32})}
    place = prepare("images", features, train=[{"label": "a", "image": {"x": [1]}}])
    with pytest.raises(UserError, match=r"features \['image/x', 'label'\]; known are: ") as error:
        list(format.read("images", place, None))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nq/other", "nq:9.9.9", "squad/v1.1:3.0.0"])
def test_what_is_not_prepared_is_told_how_to(prepare, name):
    """Catches a download on every host, a traceback of TFDS, and another version than asked for."""
    place = prepare("nq", NQ, train=[{"question": "Who?", "answer": ["A"]}])
    with pytest.raises(UserError, match=f"tfds build {name} --file_format=array_record") as error:
        format.version(name, place, Path(place))
    assert "\n" not in str(error.value)
    assert format.version("nq:1.0.0", place, Path(place)) == format.version(
        "nq", place, Path(place)
    )


def test_another_file_format_is_told_how_to_prepare(prepare):
    """Catches TFDS's own message, a paragraph about builder arguments."""
    place = prepare("nq", NQ, train=[{"question": "Who?", "answer": ["A"]}])
    (about,) = Path(place).rglob("dataset_info.json")
    about.write_text(about.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="is not prepared as ArrayRecord"):
        format.version("nq", place, Path(place))


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "array_record"])
@pytest.mark.parametrize("keep", [0.5, 0])
def test_damaged_files_are_told(prepare, name, keep):
    """Catches a traceback of a reader deep below, and a data set that reads as if it were empty."""
    place = prepare("nq", NQ, train=[{"question": "Who?", "answer": ["A"]}])
    (path,) = (path for path in Path(place).rglob("*") if name in path.name)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(UserError, match=r"are damaged .*prepare it again") as error:
        list(format.read("nq", place, None))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "a b", "../x", "a/b/c", "a:b", "a:1"])
def test_a_name_that_is_none_is_refused(name, tmp_path):
    """Catches a path outside the data directory."""
    with pytest.raises(UserError, match=r"write tfds:NAME"):
        format.version(name, str(tmp_path), tmp_path)


def test_the_version_follows_the_content(prepare):
    """Catches a data set prepared anew that is taken for the old one."""
    rows = [{"question": "Who?", "answer": [answer]} for answer in "AB"]
    place = prepare("nq", NQ, train=rows[:1])
    before = format.version("nq", place, Path(place))
    shutil.rmtree(place)
    assert format.version("nq", prepare("nq", NQ, train=rows[1:]), Path(place)) != before


SCHEMAS = [
    (SQUAD_ROW, tfds_schemas.squad),
    (HOTPOT_ROW, tfds_schemas.hotpot),
    (TRIVIA_ROW, tfds_schemas.trivia),
    ({"question": "Who?", "answer": ["A"]}, tfds_schemas.nq_open),
]


def same_type(value, data):
    """Another value that the features allow."""
    if isinstance(value, str):
        return data.draw(st.sampled_from(["", " ", "x", "yes", "Sun"]) | st.text(max_size=3))
    if isinstance(value, int):
        return data.draw(st.integers(-5, 99))
    return [] if isinstance(value, list) else value


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_row_that_the_features_allow_crashes(data):
    """Catches an exception that is no BadRow, and an example without a question."""
    row, convert = data.draw(st.sampled_from(SCHEMAS))
    place = data.draw(st.sampled_from(paths(row)))
    value = row
    for key in place:
        value = value[key]
    try:
        _, fields = convert(Row("here", replaced(row, place, same_type(value, data))))
    except BadRow:
        return
    assert fields["question"] and all(fields["answers"])
    with pytest.raises(BadRow):
        convert(Row("here", row | {"question": data.draw(st.sampled_from(["", " "]))}))
