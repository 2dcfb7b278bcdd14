"""Another run's Gen and Ctx retrieve: against hidden states without a cache, and by files."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from decoding import ByHand
from test_decode import PASSAGES, SLOTS, VARIANTS, gen_of, prompts_of, settings
from untrained import config_of, save_checkpoint, write_config, write_lines

from cosup_jax import assemble, evaluate, generate, main, sharding
from cosup_jax.answer.decode import Decoder
from cosup_jax.answer.library import Library
from cosup_jax.answer.pair import Reader
from cosup_jax.answer.records import read
from cosup_jax.answer.retrieve import Search, Separate
from cosup_jax.config import MeshConfig, to_dict
from cosup_jax.data import markup, tokenizer
from cosup_jax.report import page, tables
from cosup_jax.runtime.workdir import Workdir
from cosup_jax.towers import similarity_space

TOWNS = [f"town{i}" for i in range(9)]


class Plain:
    """What another pair finds: one text at a time, no cache, every dot product."""

    passages = PASSAGES

    def __init__(self, gen, params, config, corpus_NxD):
        self._corpus, self.queries = corpus_NxD, []
        place_1xS = np.arange(SLOTS)[None]

        @jax.jit
        def look(tokens, length):
            real_1xS = (place_1xS < length).astype(np.int32)
            hidden_SxD = gen.hidden(params["gen"], tokens, real_1xS, place_1xS)[0]
            return similarity_space(hidden_SxD[length - 1], config)

        self._look = look

    def limit(self, question):
        return 99

    def __call__(self, query_QxD, questions, turns, k, texts):
        (text,) = texts
        padded = np.zeros((1, SLOTS), np.int32)
        padded[0, : len(text)] = text
        query_D = np.asarray(self._look(padded, len(text)))
        self.queries.append((query_QxD[0], query_D))
        return Search(PASSAGES, self._corpus)(query_D[None], questions, turns, k)


@pytest.mark.parametrize(
    ("variant", "devices"), [("kept", 4), pytest.param("dropped", 1, marks=pytest.mark.slow)]
)
def test_another_gen_asks(variant, devices):
    """Bugs: the own query searched among the other's vectors; a text without its [Ret], with
    passages that were dropped, or read at its padding; queries handed to the wrong rows, or to the
    second [Ret] that of the first; a compilation for every length or number of texts."""
    mesh = sharding.make_mesh(MeshConfig(devices, 1, 1), jax.devices()[:devices])
    bpe = tokenizer.train([passage.text for passage in PASSAGES], 290)
    c = settings(**VARIANTS[variant])
    towers, params = gen_of(bpe, c)
    other = gen_of(bpe, c, seed=1)
    rng = np.random.default_rng(3)
    corpus_NxD = rng.normal(size=(len(PASSAGES), towers.gen.width)).astype(np.float32)
    prompts = prompts_of(bpe, (3, 17, 40, 5, 30, 1, 12, 70))
    reader = Reader(mesh, other[0], c)
    separate = Separate(functools.partial(reader, other[1]), Search(PASSAGES, corpus_NxD))
    found = list(Decoder(mesh, towers, c, bpe).answers(params, prompts, separate))
    plain = Plain(other[0].gen, other[1], c, corpus_NxD)
    by_hand = ByHand(towers.gen, params["gen"], c, bpe, plain)
    for question, (prompt, answer) in enumerate(zip(prompts, found, strict=True)):
        tokens, passages, written, why = by_hand.answer(question, prompt)
        assert (answer.tokens, answer.written, answer.stopped) == (tokens, written, why), question
        rows = lambda found: [[one.row for one in each] for each in found]
        assert rows(answer.retrieved) == rows(passages)
    assert max(len(answer.retrieved) for answer in found) > 1
    own, wanted = map(np.array, zip(*plain.queries, strict=True))
    assert np.mean(np.argmax(own @ corpus_NxD.T, 1) != np.argmax(wanted @ corpus_NxD.T, 1)) > 0.5
    assert 2 <= len(reader.compiled) == len(set(reader.compiled)) <= 3


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Three runs that nothing has trained: `run`, `other`, which reads less of a passage, so that
    two are one to it, and `foreign`, of another vocabulary."""
    home = tmp_path_factory.mktemp("pair")
    far = "past seven seas lies "
    passages = [{"id": t, "title": t, "text": f"it lies by a river, as {t} would."} for t in TOWNS]
    passages += [{"id": id, "title": "", "text": far + id} for id in ("a bonn", "b ulm")]
    passages += [{"id": f"d{n}", "title": f"{n}", "text": "a distractor"} for n in range(3)]
    write_lines(home / "towns.passages.jsonl", passages)
    ask = lambda t, split: {
        **{"id": f"{split} {t}", "task": "open_qa", "question": f"where lies {t}?"},
        **{"answers": ["river"], "evidence": [t], "split": split, "candidates": TOWNS[2:7]},
    }
    rows = [ask(t, split) for t in TOWNS for split in ("train", "test")]
    rows += [ask("a bonn", "test"), ask("b ulm", "test")]
    source = str(write_lines(home / "towns.jsonl", rows))
    write_lines(home / "asked.jsonl", [ask(t, "test") for t in TOWNS])
    keys = {"max_tokens": 6, "batch_size": 8, "retrieve_first": True, "max_retrievals": 2}
    keys = {f"generate__{name}": value for name, value in keys.items()}
    keys |= {"data__train": source, "data__eval": source, "eval__corpus_sizes": "12"}
    for name, seed, more in (
        ("foreign", 1, {"data__vocab_size": 290}),
        ("other", 1, {"data__max_ctx_tokens": 12}),
        ("run", 0, {}),
    ):
        write_config(home, **keys | more)
        save_checkpoint(home, seed)
        (home / "run/config.json").write_text(json.dumps(to_dict(config_of(home))))
        if name != "run":
            (home / "run").rename(home / name)
    return home


def state(directory):
    return {str(path): path.stat().st_mtime_ns for path in directory.rglob("*")}


def without_scores(records):
    """Theirs are of queries that were read in one go, and may differ in the last digit."""
    kept = [{k: v for k, v in r.items() if k not in ("run", "retrieved")} for r in records]
    return [
        r | {"retrieved": [f["id"] for f in one["retrieved"]]}
        for r, one in zip(kept, records, strict=True)
    ]


def answers(home, name="", output=""):
    """By the Gen of `run` and the retriever that a name stands for."""
    given = config_of(home, generate__retriever=name and str(home / name))
    output = home / f"{output or name or 'own'}.jsonl"
    generate.generate(given, str(home / "run"), str(home / "asked.jsonl"), str(output))
    return read(output)


@pytest.mark.slow
def test_answers_by_another_run(home):
    """Bugs: a run that retrieves for itself finds other passages than without the detour; the other
    Gen's queries beside the own vectors; a file or a lock left in the other workdir; an answer
    taken for the other's, or made again for nothing."""
    own, again = answers(home), answers(home, "run")
    with Workdir(home / "other"):  # as while it is trained
        before = state(home / "other")
        others = answers(home, "other")
        assert state(home / "other") == before
    assert without_scores(again) == without_scores(own)
    scores = lambda records: [f["score"] for r in records for f in r["retrieved"]]
    np.testing.assert_allclose(scores(again), scores(own), rtol=1e-4)
    with pytest.raises(main.UserError, match="holds something else"):
        answers(home, "other", "own")
    trained = assemble.trained(config_of(home, data__max_ctx_tokens=12), home / "other")
    library = Library.of(trained, home / "other")
    plain = Plain(trained.towers.gen, trained.params, trained.config, library.vectors)
    t, found = trained.tokenizers.gen, []
    for question in generate.read_questions(str(home / "asked.jsonl"), trained.config.generate):
        text = [*markup.prompt(question, t), t.ret]
        (best,) = plain(np.zeros((1, 1)), [0], [0], 1, [text])
        found.append(library.passages[best[0].row].id)
    assert found == [record["retrieved"][0]["id"] for record in others]
    assert found != [record["retrieved"][0]["id"] for record in own]


@pytest.mark.slow
def test_an_evaluation_by_another_run(home, monkeypatch):
    """Bugs: rows of the other's corpus, which has one passage less, taken for those of this one;
    an arm that keeps its own queries, or says that it does; gold passages answered anew."""
    monkeypatch.setattr(page, "write_report", lambda path, run: None)  # plots take time
    place = home / "run/evaluation"

    def run(name):
        given = {"generate__retriever": name and str(home / name)}
        evaluate.evaluate(
            config_of(home, **given, eval__arms="corpus,candidates,gold"), str(home / "run")
        )
        summary = json.loads((place / "summary.json").read_text())
        (part,) = summary["sets"]
        assert f", by {part['arms'][0]['label']}: " in tables.answers_table(summary)
        return part["arms"], {
            arm["arm"]: read(place / part["name"] / f"{arm['arm']}.jsonl") for arm in part["arms"]
        }

    (_, own), (_, again), (arms, others) = run(""), run("run"), run("other")
    fields = ("id", "output", "ranking", "sources")
    told = lambda found, arm: [[record[name] for name in fields] for record in found[arm]]
    assert set(own) == {"corpus", "corpus_12", "candidates", "gold"}
    assert others["gold"] == own["gold"]
    for arm in ("corpus", "corpus_12", "candidates"):
        assert told(again, arm) == told(own, arm) != told(others, arm)
    labels = [arm["label"].replace(str(home), "") for arm in arms]
    searches = ["retrieval by /other", "retrieval by /other", "its candidates, by /other"]
    assert labels == [*searches, "gold passage"]
    assert not any(arm["minus_trained"] for arm in arms)
    first = {r["question"]: r["ranking"][0] for r in others["corpus"] if len(r["ranking"])}
    theirs = {r["question"]: r["retrieved"][0]["id"] for r in answers(home, "other")}
    assert {question: first[question] for question in theirs} == theirs
    kept = state(home / "run/retriever/towns")
    town = {"id": "new", "title": "berne", "text": "a town"}
    corpus = str(write_lines(home / "more.jsonl", [town]))
    given = {"generate__retriever": str(home / "other"), "eval__corpus": corpus}
    evaluate.evaluate(config_of(home, **given, eval__arms="corpus"), str(home / "run"))
    (part,) = json.loads((place / "summary.json").read_text())["sets"]
    assert part["arms"][0]["passages"] == arms[0]["passages"] + 1
    assert state(home / "run/retriever/towns") == kept != {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["retriever={home}/foreign"], "its Gen has another tokenizer"),
        (["retriever={home}/nowhere"], "holds no checkpoint"),
        (["retriever={home}"], "holds no checkpoint"),
        (["retriever=gs://runs/other"], "a local directory"),
        (["retriever={home}/other", "retrieval=gold"], "means nothing without retrieval by"),
        (["retriever={home}/moved"], "the data have changed since it was trained"),
    ],
)
def test_wrong_retrievers(home, flags, says, capsys):
    """Bugs: a traceback; a Gen that reads other words than were written; a tokenizer trained into
    the other workdir, where it lacks its own."""
    if not (home / "moved").exists():
        shutil.copytree(home / "other", home / "moved")
        shutil.rmtree(home / "moved/tokenizer")
    argv = [f"--config={home}/run/config.json", f"--workdir={home}/run", "--mode=generate"]
    argv += [f"--config.generate.{flag.format(home=home)}" for flag in flags]
    assert main.main([*argv, f"--questions={home}/asked.jsonl"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: config.generate.retriever=") and says in line
    assert not (home / "moved/tokenizer").exists()
