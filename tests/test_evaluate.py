"""--mode=evaluate on a workdir that nothing has trained: what it asks, keeps, and answers anew."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from batches import config
from test_scoring import PASSAGES, answer
from untrained import config_of, save_checkpoint, write_config, write_lines

from cosup_jax import assemble, evaluate
from cosup_jax.answer import answering, library, records, retrieve
from cosup_jax.answer.asked import Arm
from cosup_jax.answer.cited import Part
from cosup_jax.answer.decode import Found
from cosup_jax.data.pooled import pooled
from cosup_jax.data.schema import Dataset, Example, Passage
from cosup_jax.data.sources import load_corpus
from cosup_jax.data.storage import id_order
from cosup_jax.errors import UserError
from cosup_jax.evaluation import metrics, scoring
from cosup_jax.evaluation.baselines import BM25
from cosup_jax.evaluation.nli import Containment
from cosup_jax.report import page as report_page

COUNT = 9
ARMS = ["corpus", "corpus_10", "candidates", "gold", "bm25", "wrong", "none"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """24 towns; 9 questions held out, of which each names its own candidates; claims, which are
    labelled; and a greeting, which no answer is right for."""
    home = tmp_path_factory.mktemp("evaluate")
    passage = lambda i: {"id": f"p{i}", "title": f"town{i}", "text": f"It lies by river{i}."}
    write_lines(home / "towns.passages.jsonl", map(passage, range(24)))
    ask = lambda i, split: {
        **{"id": f"{split}{i}", "task": "open_qa", "question": f"where is town{2 * i}?"},
        **{"answers": [f"river{2 * i}"], "evidence": [f"p{2 * i}"], "split": split},
        **{"candidates": [f"p{2 * i}", f"p{2 * i + 1}", "p20"], "kind": "span"},
    }
    rows = [ask(i, "train") for i in range(3)] + [ask(i, "test") for i in range(COUNT)]
    write_lines(home / "towns.jsonl", rows)
    claim = lambda i, split, label: {
        **{"id": f"{split}{i}", "task": "fact_check", "question": f"claim {i}", "kind": "label"},
        **{"answers": [label], "evidence": [f"p{i}"], "split": split},
    }
    labels = [claim(i, "train", "no") for i in range(3)] + [claim(5, "train", "yes")]
    labels += [claim(i, "test", "yes" if i else "no") for i in range(4)]
    write_lines(home / "claims.jsonl", labels)
    free = {"id": "test0", "task": "dialog", "question": "hello", "split": "test"}
    write_lines(home / "free.jsonl", [free | {"answers": [], "evidence": [], "output": "good day"}])
    for name in ("claims", "free"):
        shutil.copy(home / "towns.passages.jsonl", home / f"{name}.passages.jsonl")
    write_config(
        home,
        **{"data__train": f"{home}/towns.jsonl"},
        **{"data__eval": ",".join(f"{home}/{name}.jsonl" for name in ("towns", "claims", "free"))},
        **{"generate__batch_size": 8, "generate__max_tokens": 6, "generate__retrieve_first": True},
        **{"generate__max_retrievals": 2, "eval__corpus_sizes": "10,24", "generate__examples": 2},
    )
    save_checkpoint(home)
    return home


@pytest.fixture(scope="module")
def summary(home):
    indexed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "BM25", lambda texts: indexed.append(texts) or BM25(texts))
        patch.setattr(Containment, "cut", 3, raising=False)  # as an NLI model counts
        evaluate.evaluate(config_of(home), str(home / "run"))
    assert len(indexed) == 3  # a corpus of each source, for arm and reference
    page = (home / "run/report.html").read_text()
    assert all(text in page for text in ("claims.test", "Size of the corpus", "no retrieval"))
    return read_summary(home)


def read_summary(home):
    return json.loads((home / "run/evaluation/summary.json").read_text())


def arm_file(home, arm, part="towns.test"):
    return home / "run/evaluation" / part / f"{arm}.jsonl"


def test_arms_answer_the_same_questions(home, summary):
    """Bugs: an arm that is asked others, that takes its passages from elsewhere, or whose file is
    another's; passages of a part of the corpus numbered as in the whole."""
    towns, claims, _ = summary["sets"]
    assert [arm["arm"] for arm in towns["arms"]] == ARMS
    assert [arm["arm"] for arm in claims["arms"]] == [a for a in ARMS if a != "candidates"]
    found = {arm: records.read(arm_file(home, arm)) for arm in ARMS}
    ids = [record["id"] for record in found["corpus"]]
    assert len(set(ids)) == COUNT
    for arm, rows in found.items():
        assert [record["id"] for record in rows] == ids
        assert all(record["run"] == rows[0]["run"] for record in rows)
        assert all(bool(record["retrievals"]) is (arm != "none") for record in rows)
    assert len({rows[0]["run"] for rows in found.values()}) == len(ARMS)
    gold = {f"p{2 * i}" for i in range(COUNT)}
    for number in range(COUNT):
        row = {arm: rows[number] for arm, rows in found.items()}
        own = row["corpus"]["evidence"][0]
        ids = {arm: [source["id"] for source in one["sources"]] for arm, one in row.items()}
        assert ids["gold"] == [own] and own not in ids["wrong"] and len(ids["wrong"]) == 1
        near = {own, f"p{int(own[1:]) + 1}", "p20"}
        assert set(ids["candidates"]) <= near == set(row["candidates"]["ranking"])
        assert row["bm25"]["ranking"][0] == own == ids["bm25"][0] and not ids["none"]
        assert len(row["corpus"]["ranking"]) == len(row["corpus_10"]["ranking"]) == 10
        assert row["corpus"]["ranking"][0] == ids["corpus"][0]
        assert gold < set(row["corpus_10"]["ranking"])
        text = {s["id"]: s["text"] for one in row.values() for s in one["sources"]}
        assert all(text[id] == f"It lies by river{id[1:]}." for id in text)


def test_summary_is_the_records_means(home, summary):
    """Bugs: a score of another arm or set; a split by something else; a hash that is not there."""
    for part in summary["sets"][:2]:
        trained = records.read(arm_file(home, "corpus", part["name"]))
        for arm in part["arms"]:
            rows = records.read(arm_file(home, arm["arm"], part["name"]))
            for name in ("Rprec", "f1", "containment_citation_rec", "retrieval_hit", "KILT-em"):
                values = [row["scores"][name] for row in rows]
                assert arm["scores"][name]["mean"] == pytest.approx(np.mean(values))
                assert arm["scores"][name]["n"] == len(rows) == part["questions"]
                if arm["arm"] == "corpus":
                    assert arm["minus_trained"] == {}
                    continue
                apart = np.subtract(values, [row["scores"][name] for row in trained])
                assert arm["minus_trained"][name]["mean"] == pytest.approx(apart.mean())
            hits = [row for row in rows if row["scores"]["retrieval_hit"] == 1]
            assert arm["splits"]["retrieval succeeded"]["questions"] == len(hits)
            gold = [r["scores"]["retrieval_hit"] for r in rows]
            assert arm["arm"] != "gold" or set(gold) == {1.0}
    towns, claims, _ = summary["sets"]
    assert towns["in_domain"] and not claims["in_domain"]
    assert towns["evidence_seen"] == pytest.approx(3 / COUNT)
    assert {"in-domain", "out-of-domain"} == set(summary["domains"])
    assert all(summary["hashes"][name] for name in ("code", "config", "weights", "data", "index"))
    assert summary["judge"] == {"name": "containment", "prefix": "containment_", "cut": 3}


def test_an_output_alone_is_what_is_expected(home, summary):
    """Bugs: a KeyError once all is answered; a set of outputs that nothing is scored by; retrieval
    judged by whether a passage holds all of a long answer."""
    free = summary["sets"][2]
    assert [arm["arm"] for arm in free["arms"]] == ["corpus", "corpus_10", "bm25", "none"]
    assert free["correct"] == "rougel" and "retrieval_hit" not in free["arms"][0]["scores"]
    (record,) = records.read(arm_file(home, "corpus", "free.test"))
    assert record["long_answer"] == "good day" and record["correct"] == record["scores"]["rougel"]
    assert summary["domains"]["out-of-domain"]["sets"] == ["claims.test", "free.test"]


def test_references(summary):
    """Bugs: the label most frequent in the questions themselves, which no system may know; BM25
    scored by answers that it does not give; the trained retrieval compared with itself."""
    towns, claims, _ = summary["sets"]
    assert [one["label"] for one in towns["references"]] == ["BM25 alone, the question"]
    majority, bm25 = claims["references"]
    assert majority["label"] == "'no', most frequent in training"
    assert majority["scores"]["accuracy"] | {"low": 0, "high": 0} == {
        **{"mean": 0.25, "low": 0, "high": 0, "n": 4}
    }
    assert "Rprec" not in majority["scores"] and "f1" not in bm25["scores"]
    assert bm25["scores"]["Rprec"]["n"] == 4 and towns["correct"] == "acc_substring"
    assert claims["correct"] == "accuracy"
    assert not towns["arms"][0]["minus_trained"] and towns["arms"][2]["minus_trained"]


def test_official_records_agree(home, summary):
    """Bug: our records, read by KILT's own rules as whole files, score otherwise than here."""
    rows = records.read(arm_file(home, "corpus"))
    page = lambda id: {"wikipedia_id": id}
    gold = [
        {"id": r["id"], "output": [{"answer": a, "provenance": list(map(page, r["evidence"]))}]}
        for r in rows
        for a in r["answers"]
    ]
    ranked = lambda r: {"answer": r["answer"], "provenance": list(map(page, r["ranking"]))}
    guess = [{"id": r["id"], "output": [ranked(r)]} for r in rows]
    kilt = metrics.kilt_scores(gold, guess)
    ours = summary["sets"][0]["arms"][0]["scores"]
    for group in ("downstream", "kilt"):
        for name, value in kilt[group].items():
            assert ours[name]["mean"] == pytest.approx(value)
    for name in ("Rprec", "recall@5"):
        assert ours[name]["mean"] == pytest.approx(kilt["retrieval"][name])


def test_goes_on_after_a_kill_and_starts_anew(home, summary, monkeypatch):
    """Bugs: what is on disk is answered again, or half a record is read; other weights, another
    budget or other data keep the old answers; the table differs after a kill."""
    asked = []
    true = answering.Answering.answers

    def counted(self, params, part, questions, arm, *corpus):
        asked.extend((part.name, arm.name, number) for number in questions)
        return true(self, params, part, questions, arm, *corpus)

    monkeypatch.setattr(answering.Answering, "answers", counted)
    monkeypatch.setattr(report_page, "write_report", lambda path, run: None)  # plots take time
    run = lambda **flags: evaluate.evaluate(config_of(home, **flags), str(home / "run"))
    whole = {}
    for arm in ("candidates", "gold", "bm25", "wrong"):
        whole[arm] = arm_file(home, arm).read_bytes().splitlines(keepends=True)
        arm_file(home, arm).write_bytes(b"".join(whole[arm][:6]) + whole[arm][6][:100])
    arm_file(home, "none", "claims.test").unlink()
    run(eval__arms="candidates,gold,bm25,wrong,none", eval__questions=8)
    again = [("towns.test", arm, number) for arm in whole for number in (6, 7)]
    assert asked == again + [("claims.test", "none", number) for number in range(4)]
    for arm, lines in whole.items():
        assert arm_file(home, arm).read_bytes().splitlines(keepends=True) == lines[:8]
    before, after = (found["sets"][1]["arms"][-1] for found in (summary, read_summary(home)))
    assert after["arm"] == "none" and after["scores"] == before["scores"]
    edited = json.loads(lines[0])
    del edited["spans"]
    arm_file(home, arm).write_text(json.dumps(edited) + "\n")
    with pytest.raises(UserError, match=f"{arm}.jsonl: the answer to 'test.' is not as it was"):
        run(eval__arms=arm, eval__questions=2)
    arm_file(home, arm).unlink()
    asked.clear()
    run(generate__max_tokens=5, eval__arms="gold", eval__questions=2)
    assert len(asked) == 2 + 2
    asked.clear()
    save_checkpoint(home, seed=1, step=2)
    run(eval__arms="none", eval__questions=2)
    assert len(asked) == 2 + 2 + 1 and read_summary(home)["step"] == 2


def test_what_an_answer_depends_on():
    """Bugs: answers over another part of the corpus, by another model or by another retriever taken
    for these; all answered anew for another batch size or number of questions, or those of an arm
    that the retriever has no part in."""

    def run(
        version="v", weights="w", name="a.test", data="1", arm="corpus", rows=None, pair="", **keys
    ):
        told = SimpleNamespace(to_dict=lambda: {"weights": weights})
        given = SimpleNamespace(
            _trained=SimpleNamespace(config=config(**keys), contract=told),
            _library=lambda part: SimpleNamespace(version=version),
            _pair=pair and SimpleNamespace(decides={"weights": pair}),
        )
        part = SimpleNamespace(name=name, dataset=SimpleNamespace(version=data))
        return evaluate.Evaluation._run(given, part, Arm(arm, "", 9, rows))

    same = {"generate__batch_size": 3, "generate__chunk_tokens": 5, "generate__examples": 1}
    assert run() == run(**same, eval__questions=3)
    others = [run(version="x"), run(weights="x"), run(name="x"), run(data="x"), run(arm="gold")]
    others += [run(rows=np.arange(2)), run(rows=np.arange(1, 3))]
    others += [run(seed=1), run(generate__max_tokens=5)]
    others += [run(pair="p"), run(pair="q"), run(pair="p", rows=np.arange(2), arm="corpus_2")]
    assert len({run(), *others}) == 13
    assert run(pair="p", arm="gold") == run(arm="gold")


def test_answers_are_scored_once(tmp_path, monkeypatch):
    """Bugs: an answer judged correct by another score than its set's; an NLI model asked again for
    what is scored; scores of another judge, or of other files of its name, kept, or ones that
    somebody has deleted."""
    said = {"answer": "It is Paris", "text": "It is Paris"}
    fields = ("question", "task", "kind", "answers", "long", "long_answer", "answer_groups")
    facts = [
        {"id": id, "seen": None, "evidence": ["p1"]} | {name: answer()[name] for name in fields}
        for id in ("a", "b")
    ]
    asked, true = [], scoring.scored
    scored = lambda new, *rest: asked.append([r["id"] for r in new]) or true(new, *rest)
    monkeypatch.setattr(scoring, "scored", scored)
    part = SimpleNamespace(dataset=SimpleNamespace(passages=PASSAGES))

    def score(judge="containment", version=""):
        given = SimpleNamespace(_code="c", _judge=Containment())
        given._judge.version = version
        given._trained = SimpleNamespace(config=SimpleNamespace(eval=SimpleNamespace(judge=judge)))
        with records.Answers(tmp_path / "x.jsonl", "r") as answers:
            for id in {"a", "b"} - set(answers.known):
                answers.add(answer(id=id, **said))
            return evaluate.Evaluation._scored(given, part, answers, facts, "acc_substring")

    first = score()
    assert [record["id"] for record in first] == ["a", "b"]
    assert first[0]["scores"]["em"] == 0 and first[0]["correct"] == 1
    assert score() == first and asked == [["a", "b"], []]
    assert score("another")[1]["scored_by"] == ["another", "", "c"] and asked[2] == ["a", "b"]
    lost = [first[0] | {"scores": None}, first[1]]
    (tmp_path / "x.jsonl").write_text(records.lines(lost))
    assert score() == first and asked[3] == ["a"]
    assert score(version="2")[1]["scored_by"] == ["containment", "2", "c"]
    assert asked[4] == ["a", "b"]


def test_an_arm_searches_its_own_passages():
    """Bugs: a part of the corpus searched by the vectors of another part; candidates ranked no
    deeper than they are shown, so that recall@5 is recall@1; BM25 that shows one passage where two
    are asked for; another arm than its name says."""
    passages = [Passage(f"p{i}", "", f"t{i}") for i in range(6)]
    vector_NxD = np.eye(6, dtype=np.float32)
    asked = [Example("q", "open_qa", "t4?", (), ("p2",), candidates=("p5", "p1", "p3"))]
    row = lambda ids: [int(id[1:]) for id in ids]
    part = SimpleNamespace(corpus=SimpleNamespace(passages=passages), examples=asked, rows=row)
    part.evidence = lambda question: row(asked[question].evidence)
    given = SimpleNamespace(_mesh=None, _config=config())
    query_QxD = np.array([[0, 0.5, 0.1, 0.4, 0.6, 0.3]], np.float32)

    def found(name, rows=None, k=1):
        arm, bm25 = Arm(name, "", 6, rows), BM25([passage.text for passage in passages])
        ranked = answering.Answering._retriever(given, part, [0], arm, vector_NxD, bm25)
        shown = ranked(query_QxD, [0], [0], k)
        first = [ranked.passages[one.row].id for one in shown[0]]
        return first, [ranked.passages[row].id for row in ranked.ranking(0)]

    assert found("corpus") == (["p4"], ["p4", "p1", "p3", "p5", "p2", "p0"])
    assert found("corpus_3", np.array([1, 3, 5])) == (["p1"], ["p1", "p3", "p5"])
    assert found("candidates") == (["p1"], ["p1", "p3", "p5"])
    assert found("gold") == (["p2"], ["p2"]) and found("bm25")[0] == ["p4"]
    assert found("bm25", k=2)[0] == ["p4", "p0"] and found("wrong")[0] != ["p2"]
    none = answering.Answering._retriever(given, part, [0], Arm("none", "", None), None, None)
    assert none is None


def test_bm25_by_the_bare_question():
    """Bugs: the worst first; more shown than one; a ranking where an answer sought nothing."""
    passages = [Passage(f"p{i}", "", text) for i, text in enumerate(("ulm", "bonn", "bonn bonn"))]
    part = SimpleNamespace(corpus=SimpleNamespace(passages=passages))
    bm25 = BM25([passage.text for passage in passages])
    (found,) = answering.bm25_rankings(part, [{"question": "ulm?"}], bm25)
    assert found["ranking"] == ["p0", "p1", "p2"] and found["answer"] == ""
    assert [source["id"] for source in found["sources"]] == ["p0"]
    lexical = retrieve.Lexical(passages, bm25, ["ulm?", "bonn?"])
    ranked = answering._RankedByWords(lexical, bm25, ["ulm?", "bonn?"])
    ranked(None, [0], [0], 1)
    assert ranked.ranking(0) == [0, 1, 2] and ranked.ranking(1) == []


def test_short_answer():
    """Bugs: blanks behind a span taken for the answer; a label lost behind its grounding."""
    span, plain = [Found(0, None)], None
    assert answering.short_answer([]) == ""
    assert answering.short_answer([Part("so: ", plain), Part(" Paris ", span)]) == "Paris"
    assert answering.short_answer([Part("It is.", span), Part(" yes", plain)]) == "yes"
    assert answering.short_answer([Part("Paris", span), Part(" ", plain)]) == "Paris"


def test_ranking_takes_turns():
    """Bug: the tenth of the first search ranked before the first of the second."""

    class Fixed:
        passages, limit = (), None

        def __call__(self, query_QxD, questions, turns, k, texts):
            orders = ([3, 1, 2], [4, 3])
            return [[Found(row, 0.0) for row in orders[turn]][:k] for turn in turns]

    ranked = answering._Ranked(Fixed(), deeper=True)
    assert [[one.row for one in found] for found in ranked(None, [7], [0], 1)] == [[3]]
    ranked(None, [7], [1], 1)
    assert ranked.ranking(7) == [3, 4, 1, 2] and ranked.ranking(8) == []


def test_a_corpus_searched_beside_the_own_passages(home, summary, tmp_path):
    """Bugs: passages of the corpus that nothing finds, or that take the place of those of the same
    id; a copy of a right passage that is wrong; the index of the own passages written over; a set
    that training reads out of the domain, as its corpus has grown."""
    passage = lambda n, i: {"id": f"p{n}", "title": f"town{i}", "text": f"It lies by river{i}."}
    more = [passage(0, 0), passage(1, 40), passage(30, 41)]  # p0 as it is there, p1 another town
    corpus = write_lines(tmp_path / "more.jsonl", more)
    before = {path: path.read_bytes() for path in (home / "run/index").rglob("*") if path.is_file()}
    keys = {"eval__corpus": str(corpus), "eval__arms": "corpus,bm25", "eval__corpus_sizes": "10,25"}
    given = config_of(home, **keys)
    trained = assemble.trained(given, home / "run")
    found = evaluate.Evaluation(trained, Containment(), home / "run", "more").summary()
    towns = found["sets"][0]
    counted = {arm["arm"]: arm["passages"] for arm in towns["arms"]}
    assert counted == {"corpus": 26, "corpus_10": 10, "corpus_25": 25, "bm25": 26}
    assert towns["in_domain"] and not found["sets"][2]["in_domain"]
    after = {path: path.read_bytes() for path in before}
    assert after == before != {} and (home / "run/index/with-more/towns").is_dir()
    by_words = records.read(home / "run/more/towns.test/bm25.jsonl")
    first = {record["id"]: record["ranking"][0] for record in by_words}
    assert first["test0"] == "more/p0"  # one passage with p0, by the lower id
    hits = {record["id"]: record["scores"]["retrieval_hit"] for record in by_words}
    assert hits == dict.fromkeys(hits, 1.0)
    dataset = pooled(trained.data.held_out[0], load_corpus(str(corpus), given.data, tmp_path)[0])
    for id in ("p1", "more/p1", "more/p30"):
        assert dataset.passages.at(dataset.passages.row(id)).id == id in dataset.passages
    assert dataset.passages["more/p1"].title == "town40" != dataset.passages["p1"].title
    assert not any(id in dataset.passages for id in ("more/p7", "other/p1", "p30"))
    assert list(dataset.passages)[-3:] == ["more/p0", "more/p1", "more/p30"]
    assert dataset.passages.by_id().tolist() == id_order(dataset.passages).tolist()
    write_lines(corpus, [passage(0, 50)])  # the same name, another content
    again = evaluate.Evaluation(trained, Containment(), home / "run", "more").summary()
    assert again["sets"][0]["arms"][0]["passages"] == 25


def test_a_corpus_that_cannot_join(home, tmp_path):
    """Bugs: a passage of the corpus taken for a right one of the same id; the tokens of a prepared
    set with passages that it never tokenised."""
    names = lambda *ids: Dataset.of("x", "1", [], [Passage(id, "", id) for id in ids])
    for own in (("more/1",), ("a", "more/", "z")):
        with pytest.raises(UserError, match=r"'more/1?' has an id as those of the corpus more get"):
            pooled(names(*own), dataclasses.replace(names("1"), name="more"))
    trained = SimpleNamespace(
        data=SimpleNamespace(held_out=[names("1")]),
        config=config(eval__corpus=str(tmp_path / "more.jsonl")),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "is_prepared", lambda dataset: True)
        with pytest.raises(UserError, match=r"more\.jsonl cannot join x, which was prepared"):
            evaluate._with_corpus(trained, tmp_path)
    with pytest.raises(UserError, match=r"more\.jsonl: No such file"):
        evaluate.evaluate(config_of(home, eval__corpus=trained.config.eval.corpus), str(home))


def test_wrong_input(home, tmp_path):
    """Bug: a traceback, or minutes of answering, before a setting is found wrong."""
    for flags, says in (
        ({"eval__arms": "corpus,golden"}, "golden"),
        ({"eval__arms": "gold,gold"}, "each once"),
        ({"eval__corpus_sizes": "100,ten"}, "numbers of passages"),
        ({"eval__hard_corpus_sizes": "0"}, "numbers of passages"),
    ):
        with pytest.raises(UserError, match=says):
            config_of(home, **flags)
    with pytest.raises(UserError, match="cannot be read"):
        evaluate.evaluate(config_of(home, eval__judge=str(tmp_path)), str(home / "run"))
    with pytest.raises(UserError, match="no checkpoint"):
        evaluate.evaluate(config_of(home), str(tmp_path / "other"))
