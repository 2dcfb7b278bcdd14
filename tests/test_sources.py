"""Names of sources, and the evaluation sets they hold."""

import json

import numpy as np
import pytest
from batches import config

from cosup_jax import assemble
from cosup_jax.config import DataConfig
from cosup_jax.data import markup, sources
from cosup_jax.data.schema import Dataset, Example, Passage
from cosup_jax.errors import UserError

ROW = {"id": "e", "task": "t", "question": "Q?", "answers": ["A"], "evidence": ["p"]}


def write(directory, *names):
    for name in names:
        passage = {"id": "p", "title": "", "text": "A text."}
        (directory / f"{name}.passages.jsonl").write_text(json.dumps(passage))
        (directory / f"{name}.jsonl").write_text(json.dumps(ROW))


def test_a_path_reads_jsonl(tmp_path):
    """Catches a path that is looked up as something else."""
    write(tmp_path, "mine")
    dataset, _ = sources.load(f"{tmp_path}/mine.jsonl", DataConfig(), tmp_path / "data")
    assert (dataset.name, len(dataset.examples)) == ("mine", 1)


def test_wildcards_name_files_of_examples(tmp_path):
    """Catches a corpus read as examples, an order that differs between hosts, and files that lie
    deeper than one folder left out."""
    write(tmp_path, "b", "a", "c")
    found = sources.expand(f"{tmp_path}/[ab]*.jsonl")
    assert found == [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
    assert sources.expand("tfds:world") == ["tfds:world"]
    (tmp_path / "x/y").mkdir(parents=True)
    write(tmp_path / "x/y", "d")
    assert sources.expand(f"{tmp_path}/**/[ad].jsonl") == [
        f"{tmp_path}/{name}.jsonl" for name in ("a", "x/y/d")
    ]
    with pytest.raises(UserError, match="matches no file"):
        sources.expand(f"{tmp_path}/x*.jsonl")


def test_a_tilde_is_the_home(tmp_path, monkeypatch):
    """Catches "No such file" for a source that the shell has not expanded, behind =."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "a")
    assert sources.expand("~/a.jsonl") == sources.expand("~/*.jsonl") == [f"{tmp_path}/a.jsonl"]
    assert sources.expand("corpus:~/a.jsonl") == [f"corpus:{tmp_path}/a.jsonl"]
    with pytest.raises(UserError, match=r"~nobody-here/a\.jsonl: Could not determine home"):
        sources.expand("~nobody-here/a.jsonl")


def test_tfds_world_takes_size_and_place_from_the_config(tmp_path, monkeypatch):
    """Catches a world of another size than configured, or one built in another place."""
    asked = []

    def records(entities, place):
        asked.append((entities, place))
        yield "here", Passage("p", "", "A text.")

    monkeypatch.setattr(sources.world, "records", records)
    data = DataConfig(world_entities=123, tfds_dir="here")
    for _ in range(2):  # the second time it is kept
        sources.load("tfds:world", data, tmp_path)
    assert asked == [(123, "here")]


def test_a_world_as_a_corpus(tmp_path, monkeypatch):
    """Bugs: a world of the training data's size instead of the one that is named; minutes of
    writing questions that nobody asks for; two sizes kept as one."""

    def records(entities, place):
        for number in range(entities):
            yield "here", Passage(f"{number}", "", f"{place} {number} of {entities}.")
        pytest.fail("asked for questions too")

    monkeypatch.setattr(sources.world, "records", records)
    data = DataConfig(world_entities=123, tfds_dir="here")
    for entities in (3, 5):
        dataset, problems = sources.load_corpus(f"tfds:world/{entities}", data, tmp_path)
        texts = [f"here {number} of {entities}." for number in range(entities)]
        assert [passage.text for passage in dataset.passages.values()] == texts
        assert dataset.name == f"world-{entities}"
        assert not len(dataset.examples) and not problems.errors
    for name in ("tfds:world", "tfds:world/many", "tfds:world/1" + 5000 * "0", "tfds:squad"):
        with pytest.raises(UserError, match=r"corpus of TFDS is tfds:world/N"):
            sources.check_corpus(name)
    with pytest.raises(UserError, match=r"nowhere\.jsonl: No such file"):
        sources.check_corpus(str(tmp_path / "nowhere.jsonl"))


def test_a_world_of_no_size_as_a_corpus(tmp_path):
    """Bugs: a corpus without a passage; a key that nobody has set told as wrong, and nothing of
    the one that is."""
    for entities in (0, 99, 40_000):
        name = f"tfds:world/{entities}"
        with pytest.raises(UserError, match=f"^{name}: data.world_entities={entities}: "):
            sources.load_corpus(name, DataConfig(tfds_dir=str(tmp_path)), tmp_path)


def test_a_corpus_is_read_as_texts_to_learn(tmp_path, monkeypatch):
    """Bug: questions and answers of the source leak into what should be its bare passages; or a
    link to the same file counts as another corpus."""
    write(tmp_path, "a")
    (tmp_path / "a.passages.jsonl").write_text(
        '{"id": "p", "title": "Ulm", "text": "On the Danube."}\n{"id": "q", "text": "Bare."}'
    )
    monkeypatch.chdir(tmp_path)
    dataset, problems = sources.load("corpus:a.jsonl", DataConfig(), tmp_path / "data")
    told = [(e.question, e.long_answer, e.answers, e.evidence) for e in dataset.rows("train")]
    texts = [("Ulm", "On the Danube."), (sources.TITLE, "Bare.")]
    assert told == [(*text, (), ()) for text in texts]
    assert list(dataset.splits) == ["train"] and list(dataset.passages) == ["p", "q"]
    assert dataset.name == "a_corpus" and not problems.errors
    assert sources.expand("corpus:*.jsonl") == ["corpus:a.jsonl"]
    assert sources.identity("corpus:a.jsonl") == sources.identity("corpus:./a.jsonl")


def test_a_corpus_that_holds_markup_loses_no_text(tmp_path, monkeypatch):
    """Bugs: a text that speaks of [Ret] is read as markup and left out; one that cannot be learnt
    is left out of a data set without bad rows."""
    texts = {"p": "Write [Ret:q] or [Ret].", "q": "[Cs] and [Ce].", "r": "Bare.", "s": " "}
    records = [("here", Passage(id, "", text)) for id, text in texts.items()]
    monkeypatch.setattr(sources.world, "records", lambda *_: iter(records))
    dataset, problems = sources.load("corpus:tfds:world", DataConfig(), tmp_path)
    read = [markup.pieces(example, dataset.passages)[1:] for example in dataset.rows("train")]
    end = markup.Piece(markup.TARGET, control="eos")
    assert read == [[markup.Piece(markup.TARGET, texts[id]), end] for id in "pqr"]
    assert problems.errors == 1 and problems.first_error.id == "s"
    assert problems.counts["control_text"] == 4  # of two passages, and of what is made of them


@pytest.mark.parametrize("source", ["x.json", "x.passages.jsonl", "world", "hf:squad", ""])
def test_an_unknown_source_is_refused_with_the_list(tmp_path, source):
    """Catches a typo that reads nothing, or reads passages as if they were examples."""
    with pytest.raises(UserError, match=r"known are DIR/x\.jsonl.*tfds:world"):
        sources.load(source, DataConfig(), tmp_path)


def test_a_tfds_set_that_is_not_prepared_is_refused_in_one_line(tmp_path):
    """Catches a download tried without a network, or a traceback for a typo."""
    with pytest.raises(UserError, match="tfds build wolrd --file_format=array_record"):
        sources.load("tfds:wolrd", DataConfig(tfds_dir=str(tmp_path)), tmp_path)


def held_out_by_hand():
    passages = [Passage(f"{i}", "", f"text {i // 2}") for i in range(200)]  # each text twice
    examples = [
        Example(f"{i}", "t", "Q?", ("A",), (f"{i % 200}", f"{i * 7 % 200}")[: i % 3])
        for i in range(600)
    ]
    return Dataset.of("made", "1", examples, passages)


def test_a_carved_part_has_passages_of_its_own():
    """Catches held-out questions all of whose passages training reads, also under another id."""
    whole = held_out_by_hand()
    dataset = sources.carve(whole, 0.2)
    assert set(dataset.splits) == {"train", "dev"} and dataset.version != whole.version
    together = np.sort(np.concatenate(list(dataset.splits.values())))
    assert together.tolist() == list(range(600))
    texts = lambda split: [
        {dataset.passages[id].text for id in example.evidence} for example in dataset.rows(split)
    ]
    trained = set().union(*texts("train"))
    for read in filter(None, texts("dev")):
        assert not read <= trained
    assert 60 < len(dataset.splits["dev"]) < 300
    assert any(not read for read in texts("dev")) and any(not read for read in texts("train"))


def test_something_is_always_held_out():
    """Catches an evaluation of nothing where few passages meet a small share."""
    passages = [Passage(f"{i}", "", f"text {i}") for i in range(5)]
    examples = [Example(f"{i}", "t", "Q?", ("A",), (f"{i}",)) for i in range(5)]
    dataset = sources.carve(Dataset.of("few", "1", examples, passages), 0.001)
    assert len(dataset.splits["dev"]) == 1 and len(dataset.splits["train"]) == 4


def test_what_cannot_be_carved_is_said_so():
    """Bug: where all examples read one passage, training is left without any, and the message is
    about something else."""
    examples = [Example(f"{i}", "t", "Q?", ("A",), ("p",)) for i in range(5)]
    dataset = Dataset.of("one", "1", examples, [Passage("p", "", "text")])
    with pytest.raises(UserError, match=r"one: .* would leave none to train on; give some rows"):
        sources.carve(dataset, 0.05)


@pytest.mark.parametrize("stem", ["x" * 238, "x\udcff"], ids=["long", "not UTF-8"])
def test_a_name_that_cannot_name_files_is_refused(tmp_path, stem):
    """Bug: a traceback of the file system's, or of the terminal's, for an odd file name."""
    write(tmp_path, "a")
    for ending in ("jsonl", "passages.jsonl"):
        try:
            (tmp_path / f"{stem}.{ending}").symlink_to(tmp_path / f"a.{ending}")
        except OSError:
            pytest.skip("the file system refuses the name itself")
    with pytest.raises(UserError, match="rename the file") as error:
        sources.load(f"{tmp_path}/{stem}.jsonl", DataConfig(), tmp_path / "data")
    str(error.value).encode()


def test_a_set_that_is_only_evaluated_is_evaluated_whole(tmp_path):
    """Catches a test file without splits of which one row in twenty is used."""
    write(tmp_path, "a", "b")
    keys = {"data__train": f"{tmp_path}/a.jsonl", "data__eval": f"{tmp_path}/b.jsonl"}
    found = assemble.read_sources(config(**keys), tmp_path / "data")
    assert {k: len(v) for k, v in found.held_out[0].splits.items()} == {"all": 1}


def test_a_set_with_a_split_is_left_as_it_is(tmp_path):
    """Catches a source's own test questions moved into training, or training's into a split."""
    write(tmp_path, "a")
    rows = [{**ROW, "id": f"{i}", "split": split} for i, split in enumerate(["train", "test"])]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = f"{tmp_path}/a.jsonl"
    found = assemble.read_sources(config(data__train=path, data__eval=path), tmp_path / "data")
    assert {k: len(v) for k, v in found.held_out[0].splits.items()} == {"train": 1, "test": 1}
    assert found.train[0][0] is found.held_out[0]


@pytest.mark.parametrize("spelling", ["./a.jsonl", "{}/a.jsonl", "../{name}/a.jsonl", "link.jsonl"])
def test_a_source_is_one_however_it_is_spelt(tmp_path, monkeypatch, spelling):
    """Bug: train=a.jsonl and eval=./a.jsonl evaluate all that is trained on, as if held out."""
    write(tmp_path, "a")
    rows = [{**ROW, "id": f"{i}", "evidence": []} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for ending in ("jsonl", "passages.jsonl"):
        (tmp_path / f"link.{ending}").symlink_to(tmp_path / f"a.{ending}")
    monkeypatch.chdir(tmp_path)
    other = spelling.format(tmp_path, name=tmp_path.name)
    keys = {"data__train": "a.jsonl", "data__eval": other}
    found = assemble.read_sources(config(data__dev_fraction=0.3, **keys), tmp_path / "data")
    assert found.train[0][0] is found.held_out[0] and list(found.problems) == ["a.jsonl"]
    assert set(found.held_out[0].splits) == {"train", "dev"}


@pytest.mark.parametrize("again", ["a.jsonl", "./a.jsonl", "*.jsonl"])
def test_a_source_named_twice_is_refused(tmp_path, monkeypatch, again):
    """Bug: a name pasted twice doubles a source without a word."""
    (tmp_path / "held_out").mkdir()
    write(tmp_path, "a")
    write(tmp_path / "held_out", "b")
    monkeypatch.chdir(tmp_path)
    chosen = lambda train: config(data__train=train, data__eval="held_out/b.jsonl")
    read = lambda train: assemble.read_sources(chosen(train), tmp_path / "data")
    with pytest.raises(UserError, match=r"train names a\.jsonl 2 times; .* a\.jsonl@2 to draw"):
        read(f"a.jsonl,{again}")
    assert [weight for _, weight in read(f"a.jsonl@3,{again}").train] == [3, 1]


def test_eval_sets_are_named_by_split_and_leave_train_out():
    """Catches training rows scored as held out, and splits merged into one set."""
    rows = [
        Example(f"{number}", "t", "Q?", ("A",), (), split=split)
        for number, split in enumerate(["train", "test", "dev", "test"])
    ]
    dataset = Dataset.of("squad", "1", rows, [])
    sets = sources.eval_sets([dataset])
    assert sets == {"squad.test": (dataset, "test"), "squad.dev": (dataset, "dev")}
    with pytest.raises(UserError, match=r"two evaluation sets are called squad\.test"):
        sources.eval_sets([dataset, dataset])
    with pytest.raises(UserError, match="squad: nothing is held out"):
        sources.eval_sets([Dataset.of("squad", "1", rows[:1], [])])
    assert list(dataset.rows("test")) == [rows[1], rows[3]]
