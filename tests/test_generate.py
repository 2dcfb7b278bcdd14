"""--mode=generate: a file of questions, a prompt, and what a user can get wrong."""

import dataclasses
import io
from types import SimpleNamespace

import pytest
from untrained import config_of, save_checkpoint, write_config, write_lines

from cosup_jax import generate, main
from cosup_jax.answer.decode import Budget
from cosup_jax.answer.records import read
from cosup_jax.config import ArchConfig, Config, GenerateConfig, TowerConfig
from cosup_jax.errors import UserError

TOWNS = [f"town{i}" for i in range(9)]
QUESTIONS = [{"question": f"where lies {town}?", "answers": ["river"]} for town in TOWNS]
QUESTIONS[4] |= {"max_tokens": 3, "max_retrievals": 0}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A workdir with a checkpoint that nothing has trained, beside its data and config."""
    home = tmp_path_factory.mktemp("generate")
    passages = [{"id": t, "title": t, "text": f"{t} lies by a river."} for t in TOWNS]
    write_lines(home / "towns.passages.jsonl", passages)
    row = {"task": "open_qa", "answers": ["river"]}
    rows = [row | {"id": t, "question": f"where lies {t}?", "evidence": [t]} for t in TOWNS]
    source = str(write_lines(home / "towns.jsonl", rows))
    settings = {"max_tokens": 9, "batch_size": 8, "retrieve_first": True, "max_retrievals": 2}
    settings = {f"generate__{name}": value for name, value in settings.items()}
    write_config(home, data__train=source, data__eval=source, **settings)
    save_checkpoint(home)
    write_lines(home / "asked.jsonl", QUESTIONS)
    return home


def test_a_file_of_questions(home, capsys, monkeypatch):
    """Bugs: a killed run starts over, answers twice, or leaves half a line; a finished one compiles
    for nothing; answers out of order or to other questions; a question's own budget forgotten, or
    taken by its neighbours; what was printed does not tell how it went."""
    run = lambda: generate.generate(config_of(home), str(home / "run"), str(home / "asked.jsonl"))
    run()
    printed = capsys.readouterr().out
    assert "9 answers in" in printed and "shapes: fill 8 x 32 of 64, write 8 x 1 of 64" in printed
    path = home / "run/answers/asked.jsonl"
    whole = path.read_text()
    rows = read(path)
    assert [row["question"] for row in rows] == [row["question"] for row in QUESTIONS]
    assert [row["id"] for row in rows] == [str(n) for n in range(1, 10)]
    own = rows.pop(4)
    assert (own["retrievals"], own["tokens"], own["stopped"]) == (0, 3, "tokens")
    assert all(row["retrievals"] >= 1 and row["retrieved"][0]["score"] for row in rows)
    assert all(0 < row["tokens"] <= 9 and row["raw"].startswith("[Ret]") for row in rows)
    assert max(row["tokens"] for row in rows) > 3
    path.write_text(whole[: len(whole) * 2 // 3])  # in the middle of a line
    run()
    assert "answers are in" in capsys.readouterr().out and path.read_text() == whole
    monkeypatch.setattr(generate.Writer, "_retriever", lambda *_: pytest.fail("asked for nothing"))
    run()
    assert path.read_text() == whole


def test_what_an_answer_depends_on():
    """Bugs: answers over other passages, by another model, in another precision, or of other
    questions or budgets left in a file as if they were these; a file that must be answered anew for
    another batch size."""
    asked = generate.Question("1", "open_qa", "Where?", (), (), budget=Budget(9, 2))

    def run(asked=asked, version="v", contract="c", dtype="float32", pair="", **changed):
        settings = dataclasses.replace(GenerateConfig(), **changed)
        told = SimpleNamespace(to_dict=lambda: {"weights": contract})
        gen = TowerConfig(arch=ArchConfig(dtype=dtype))
        trained = SimpleNamespace(config=Config(generate=settings, gen=gen), contract=told)
        writer = SimpleNamespace(trained=trained, library=SimpleNamespace(version=version))
        writer.pair = pair and SimpleNamespace(decides={"weights": pair})
        return generate._run([asked], writer)

    assert run() == run(batch_size=3, chunk_tokens=5, examples=0)
    assert run(pair="p") == run(pair="p", retriever="runs/p") != run(pair="q")
    others = [run(version="w"), run(contract="d"), run(seed=7), run(retrieval="gold")]
    others += [run(dtype="bfloat16")]
    others += [run(dataclasses.replace(asked, question="Who?"))]
    others += [run(dataclasses.replace(asked, budget=Budget(9, 1))), run(pair="p")]
    assert len({run(), *others}) == 9


def test_at_a_prompt(home, capsys, monkeypatch):
    """Bugs: a source without its title, score or text; an empty line that is answered; the end of
    input, or what is typed in another encoding, as a traceback."""
    typed = io.BytesIO(b"where lies town3?\n\n  \n\xe9 town4?")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(typed, "utf-8", errors="strict"))
    generate.generate(config_of(home), str(home / "run"))
    printed = capsys.readouterr().out
    assert printed.count("  [1] town") == 2 and "lies by a river." in printed and "(0." in printed


def test_spans_are_marked_in_their_sources():
    """Bugs: a span marked in another passage, or where it does not stand, or in the mark of another
    span; a missing score, or that of a later search that found the passage again; an empty answer
    that prints nothing."""
    source = {"number": 1, "id": "p", "title": "", "text": "Ulm lies on the Danube."}
    other = source | {"number": 2, "title": "Bonn"}
    spans = [{"text": "the Danube", "number": 1}, {"text": "", "number": 2}]
    record = {"output": "the Danube[1]", "spans": spans, "stopped": "tokens"}
    retrieved = [{"number": 1, "score": 0.5}, {"number": 2, "score": None}]
    retrieved.append({"number": 1, "score": 0.25})
    lines = generate.told(record | {"sources": [source, other], "retrieved": retrieved}, ("<", ">"))
    assert lines.splitlines() == [
        "the Danube[1] (cut off: config.generate.max_tokens)",
        "  [1] p  (0.500)",
        "      Ulm lies on <the Danube>.",
        "  [2] Bonn",
        "      Ulm lies on the Danube.",
    ]
    nothing = {"output": " ", "spans": [], "stopped": "end", "sources": [], "retrieved": []}
    assert generate.told(nothing, ("<", ">")) == "(empty answer)"
    mark = generate.UNDERLINED
    record["spans"] = [{"text": text, "number": 1} for text in ("Danube", "m", "the Danube", "4")]
    lines = generate.told(record | {"sources": [source], "retrieved": retrieved[:1]}, mark)
    assert lines.endswith(f"Ul{'m'.join(mark)} lies on {'the Danube'.join(mark)}.")


def test_what_else_a_line_may_hold(tmp_path):
    """Bugs: a file of a data set, or one with fields of its owner's, is refused as misspelt."""
    row = {"question": "a", "question_id": 5, "split": "dev", "hard_negatives": ["p"], "url": ""}
    path = write_lines(tmp_path / "asked.jsonl", [row])
    assert [q.question for q in generate.read_questions(str(path), GenerateConfig())] == ["a"]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (['{"question": "a"}', '{"question": 3}'], "asked.jsonl:2: 'question' must be text"),
        (['{"id": "x"}'], "asked.jsonl:1: x: 'question' is missing"),
        (['{"question": "a", "id": "2"}', '{"question": "b"}'], "has the id '2'"),
        (['{"question": "a"'], "asked.jsonl:1: not JSON"),
        (["[]"], "asked.jsonl:1: the line is not a JSON object"),
        ([], "the file is empty"),
        (['{"question": "a", "evidence": "x"}'], "list of strings"),
        (['{"question": "a", "max_tokens": "9"}'], "asked.jsonl:1: 'max_tokens' must be a whole"),
        (['{"question": "a", "max_retrievals": true}'], "must be a whole number, not True"),
        (
            ['{"question": "a"}', '{"question": "a", "max_tokns": 9}'],
            "asked.jsonl:2: 'max_tokns' means nothing; did you mean 'max_tokens'?",
        ),
        (['{"question": "a", "max_tokens": 0}'], "'max_tokens' must be 1 to 64, as config.gen"),
        (['{"question": "a", "max_tokens": 65}'], "must be 1 to 64"),
        (['{"question": "a", "max_retrievals": 5}'], "must be 0 to 4"),
        (['{"question": "a", "max_retrievals": -1}'], "must be 0 to 4"),
    ],
)
def test_malformed_questions(tmp_path, lines, says):
    """Bug: a bad line is skipped, is a traceback, or is found after an hour of answers."""
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(UserError, match=says.replace("[", r"\[")):
        generate.read_questions(str(path), GenerateConfig())


def test_what_a_user_can_get_wrong(home, tmp_path, capsys, monkeypatch):
    """Bugs: a traceback, or minutes of compiling before the mistake is told; somebody's file is
    overwritten; answers of two settings in one file."""
    monkeypatch.setattr(generate, "Decoder", lambda *_: pytest.fail("compiled"))
    config, questions = f"--config={home / 'config.py'}", f"--questions={home / 'asked.jsonl'}"

    def refused(*flags, workdir=home / "run", questions=questions):
        asked = [questions] if questions else []
        argv = ["--mode=generate", config, f"--workdir={workdir}", *asked, *flags]
        assert main.main(argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "holds no checkpoint" in refused(workdir=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert "made with prompt=''" in refused("--config.ctx.prompt=about:")
    assert "gen.arch.family='llama'" in refused("--config.gen.arch.family=mistral")
    assert "No such file" in refused("--questions=none.jsonl")
    assert "at a prompt" in refused(f"--output={tmp_path / 'x'}", questions="")
    assert "to a local file" in refused("--output=gs://bucket/answers.jsonl")
    assert "needs --questions" in refused("--config.generate.retrieval=gold", questions="")
    named = write_lines(tmp_path / "named.jsonl", [{"question": "a", "evidence": ["town1", "ulm"]}])
    gold = "--config.generate.retrieval=gold"
    monkeypatch.setattr(generate, "Decoder", lambda *_: None)  # made, but never run
    assert "'1': evidence 'ulm' is no passage" in refused(gold, questions=f"--questions={named}")
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"id": "x", "text": "important"}\nnotes\n')
    assert "something else than answers" in refused(f"--output={mine}")
    assert mine.read_text().endswith("notes\n")
    mine.write_text("notes\n")
    assert "something else than answers" in refused(f"--output={mine}")
    assert mine.read_text() == "notes\n"
    for text in ("notes", '{"question": "a"}', '{"id": "1", "question": "a"}'):  # no line break
        mine.write_text(text)
        assert "something else than answers" in refused(f"--output={mine}")
        if text != "notes":
            flags = f"--questions={mine}", f"--output={mine}"
            assert "something else than answers" in refused(*flags, questions="")
        assert mine.read_text() == text
    assert "Is a directory" in refused(f"--output={tmp_path}")
    assert f"cannot write {mine / 'x'}" in refused(f"--output={mine / 'x'}")
    answers = write_lines(tmp_path / "old.jsonl", [{"id": "1", "run": "another"}])
    assert "something else than answers" in refused(f"--output={answers}")
