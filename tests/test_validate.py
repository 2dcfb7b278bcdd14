"""What --mode=validate finds, prints and returns; what --show draws; near duplicates."""

import contextlib
import dataclasses
import json
import re

import pytest
from batches import config

from cosup_jax import assemble, main, validate
from cosup_jax.data import tokenizer
from cosup_jax.data.near import NearDuplicates, shingles, similarity
from cosup_jax.data.problems import BadRow, Problems
from cosup_jax.data.rows import parse
from cosup_jax.data.schema import Dataset, Example, Passage
from cosup_jax.dotted import replace_dotted
from cosup_jax.errors import UserError

TOWNS = ("Lima", "Quito", "Bogota", "Caracas", "Santiago", "Asuncion", "Montevideo", "Brasilia")


def rows():
    """Good rows: two questions a town, the last two towns held out."""
    passages = [{"id": t, "title": t, "text": f"{t} is a town. It lies by a river."} for t in TOWNS]
    examples = [
        {
            **{"id": f"{town}-{i}", "task": "open_qa", "answers": ["a river"]},
            **{"question": f"{what} {town} in all of America?", "evidence": [town]},
            **{"split": "test" if town in TOWNS[-2:] else "train"},
        }
        for town in TOWNS
        for i, what in enumerate(("What lies by", "By what lies the town of"))
    ]
    return passages, examples


def write(path, passages, examples):
    for name, found in (("x.passages.jsonl", passages), ("x.jsonl", examples)):
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in found))
    source = str(path / "x.jsonl")
    keys = {
        "data__max_gen_tokens": 200,
        "data__max_ctx_tokens": 60,
        "data__vocab_size": 400,
        "data__ctx_row_tokens": 120,
    }
    return config(data__train=source, data__eval=source, **keys)


def run(path, capsys, *rows, **options):
    """(exit code, what was printed, findings) of a validation."""
    code = 0
    try:
        validate.validate(write(path, *rows), str(path / "work"), **options)
    except UserError as error:
        code = 2
        print(error)
    lines = (path / "work" / "validation.jsonl").read_text().splitlines()
    return code, capsys.readouterr().out, [json.loads(line) for line in lines]


def kinds(findings):
    return sorted({finding["kind"] for finding in findings})


def test_good_data_passes_and_is_counted(tmp_path, capsys):
    """Bug: a warning where nothing is wrong, so that nobody reads warnings; counts of bad sets."""
    passages, examples = rows()
    for passage in passages:
        passage["text"] = "It lies by a river."
    code, out, findings = run(tmp_path, capsys, passages, examples)
    assert (code, findings) == (0, []) and "nothing is wrong" in out
    assert "x       16        8         train 12, test 4" in out
    assert "0% of 4 [Ret]" in out


@pytest.mark.parametrize("keys", [["eval.corpus"], ["index.corpus", "eval.corpus"]])
@pytest.mark.parametrize("good", [1, 0])
def test_a_corpus_without_questions_is_read_too(good, keys, tmp_path, capsys):
    """Bugs: evaluate or encode stops at a bad passage, or for want of a good one, and points here,
    where all is well; a corpus named in two ways counts twice; one that cannot be read hides what
    is wrong with the data."""
    more = [{"id": "a", "title": "Cusco", "text": "A town."}] * good + [{"id": "b"}]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    found = replace_dotted(write(tmp_path, *rows()), "data.bad_rows", "drop")
    for key, name in zip(keys, ("more.jsonl", "./more.jsonl"), strict=False):
        found = replace_dotted(found, key, f"{tmp_path}/{name}")
    with contextlib.nullcontext() if good else pytest.raises(UserError, match="no good passage"):
        validate.validate(found, str(tmp_path / "work"))
    out = capsys.readouterr().out
    assert len(re.findall(rf"^more +0 +{good}\b", out, re.M)) == 1
    (bad,) = map(json.loads, (tmp_path / "work/validation.jsonl").read_text().splitlines())
    assert bad["where"].endswith(f"more.jsonl:{good + 1}")
    with pytest.raises(UserError, match="1 bad row"):
        validate.validate(replace_dotted(found, "data.bad_rows", "refuse"), str(tmp_path / "work"))
    lost = replace_dotted(found, keys[0], "lost.jsonl")
    (tmp_path / "x.jsonl").write_text((tmp_path / "x.jsonl").read_text() + "no row\n")
    with pytest.raises(UserError, match=r"lost\.jsonl"):
        validate.validate(lost, str(tmp_path / "work"))
    assert "x.jsonl:17" in capsys.readouterr().out
    write(tmp_path, *rows())
    with pytest.raises(UserError, match=r"lost\.jsonl"):
        validate.validate(lost, str(tmp_path / "work"))
    assert "nothing is wrong" not in capsys.readouterr().out


def test_every_bad_row_is_named_and_the_exit_code_is_2(tmp_path, capsys):
    """Bug: only the first bad row told; a set that does not validate reported as fine."""
    passages, examples = rows()
    examples[3]["evidence"] = ["Atlantis"]
    examples[7]["question"] = ""
    examples[9]["answers"] = 3
    code, out, findings = run(tmp_path, capsys, passages, examples, limit=1)
    assert code == 2
    errors = [finding for finding in findings if finding["kind"] in validate.ERRORS]
    assert sorted(finding["where"].rpartition(":")[2] for finding in errors) == ["10", "4", "8"]
    assert {finding["id"] for finding in errors} == {examples[i]["id"] for i in (3, 7, 9)}
    assert "error missing_passage: 1 x" in out and "x.jsonl:4: Quito-1: evidence 'Atlantis'" in out


def test_odd_characters_of_an_id_are_escaped(tmp_path, capsys):
    """Bug: half a surrogate in an id is a traceback before validation.jsonl is written; an escape
    sequence in one reaches the terminal."""
    passages, examples = rows()
    examples[0]["id"] = "\ud800x"
    examples[1] |= {"id": "a\x1b[31m", "answers": []}
    examples[2] |= {"question": "\x1b]0;Why?"}
    code, out, findings = run(tmp_path, capsys, passages, examples, show_rows=1)
    ids = [f["id"] for f in findings if f["kind"] in validate.ERRORS]
    assert code == 2 and ids == [r"\ud800x", r"a\x1b[31m"]
    assert r"x.jsonl:2: a\x1b[31m: 'answers' is empty" in out and "\x1b" not in out


def test_what_tokens_and_training_tell(tmp_path, capsys):
    """Bug: an example that no row holds, a cut passage, an answer behind the cut, or a held-out
    question that training has seen, found out only from the scores."""
    passages, examples = rows()
    long = " ".join(["on and on"] * 100)
    passages.append({"id": "long", "title": "", "text": f"{long} to the end"})
    extra = {"task": "open_qa", "answers": ["to the end"], "evidence": ["long"]}
    examples += [
        {**extra, "id": "cut", "question": "Where to?"},
        {**extra, "id": "no row", "question": long},
        {**examples[0], "id": "leak", "split": "test"},
        {
            **examples[0],
            "id": "same words",
            "split": "test",
            "question": "What lies by Lima in all of America",
        },
        {
            **examples[0],
            "id": "near",
            "split": "test",
            "evidence": ["Brasilia"],
            "question": "And what lies by Lima in all of America?",
        },
    ]
    code, out, findings = run(tmp_path, capsys, passages, examples)
    of = lambda kind: {finding["id"] for finding in findings if finding["kind"] == kind}
    assert code == 0
    assert of("example_too_long") == {"no row"} and of("answer_cut") == {"cut"}
    assert "long" in of("passage_cut")
    cut = [finding["id"] for finding in findings if finding["kind"] == "passage_cut"]
    assert len(cut) == len(set(cut)) and f"passage_cut: {len(cut)} x" in out
    assert of("leaked_passage") == {"leak", "same words"}
    assert of("leaked_question") == {"leak", "same words"}
    assert of("near_duplicate") == {"near"}
    assert "40% of 5 [Ret]" not in out and "29% of 7 [Ret]" in out


def test_a_span_must_lie_before_the_cut_of_both_towers(tmp_path):
    """Bug: a span within Gen's limit but behind Ctx's, whose prompt and eos take tokens from the
    passage, is not told."""
    tokens = tokenizer.train(["x"], 300)
    both = assemble.Tokenizers(tokens, tokens)
    passage = "abc def"  # a token a letter
    found = [
        validate._behind_cut(
            passage, span, both, config(data__max_ctx_tokens=most, ctx__prompt=prompt)
        )
        for span, most, prompt in (
            *(("def", 8, ""), ("def", 7, ""), ("def", 6, ""), ("def", 8, "q:"), ("abc", 6, "q:")),
            *(("abc", 5, "q:"), ("xyz", 2, "")),
        )
    ]
    assert found == ["", "Ctx", "Gen", "Ctx", "", "Ctx", ""]


def test_a_cut_in_gen_alone_is_found(tmp_path):
    """Bug: with two tokenizers, a span behind Gen's cut is not told where Ctx reads all of it."""
    gen, ctx = tokenizer.train(["x"], 257), tokenizer.train(["it lies at the very end"] * 9, 280)
    passages = [Passage("p", "", "it lies at the very end"), Passage("q", "", "it lies")]
    ask = lambda id, answer, evidence: Example(id, "t", "Q?", (answer,), evidence)
    examples = [ask("a", "end", ("p",)), ask("b", "it", ("p",)), ask("c", "lies", ("q",))]
    dataset = Dataset.of("x", "1", examples, passages)
    dataset = dataclasses.replace(dataset, examples=Placed(examples))
    both = assemble.Tokenizers(gen, ctx)
    small = config(data__max_ctx_tokens=20, data__max_gen_tokens=200)
    part = validate._split("x", [(dataset, 1.0)], "train", both, small, tmp_path)
    assert not part.store.ctx_cut.any()
    validate._check_lengths(part, both, small, found := Problems())
    assert [(p.kind, p.id) for p in found.listed] == [("answer_cut", "a")]


class Placed(list):
    """Examples that know where they stand."""

    where = str


def test_training_does_not_read_what_no_row_holds(tmp_path, capsys):
    """Bug: evidence and question of an example too long for any row reported as seen in training,
    which never reads them."""
    passages, examples = rows()
    lone = {"id": "lone", "title": "", "text": "It lies alone."}
    asked = {**examples[0], "evidence": ["lone"], "answers": ["alone"]}
    long = {**asked, "id": "no row", "question": "why on earth? " * 100}
    held_out = [{**long, "id": "test", "split": "test"}, {**asked, "id": "t", "split": "test"}]
    held_out[1]["question"] = "What may lie alone?"
    training = [example for example in examples if example["split"] == "train"]
    _, out, findings = run(tmp_path, capsys, [*passages, lone], [*training, long, *held_out])
    assert not {"leaked_passage", "leaked_question"} & set(kinds(findings))
    assert "0% of 2 [Ret]" in out


def test_findings_of_two_sources_name_their_own_rows(tmp_path, capsys):
    """Bug: a row of the second source looked up in the first."""
    passages, examples = rows()
    long = {"id": "long", "title": "", "text": "on and on " * 100}
    for name, extra in (("a", []), ("b", [long])):
        (tmp_path / name).mkdir()
        asked = [{**e, "id": name + e["id"]} for e in examples]
        if extra:  # other texts under the same ids
            passages = [{**p, "text": f"{p['text']} It is a port."} for p in passages]
            asked.insert(0, {**asked[0], "id": "too long", "question": "why " * 300})
        found = write(tmp_path / name, passages + extra, asked)
        (tmp_path / name / "x.jsonl").rename(tmp_path / name / f"{name}.jsonl")
        (tmp_path / name / "x.passages.jsonl").rename(tmp_path / name / f"{name}.passages.jsonl")
    both = f"{tmp_path}/a/a.jsonl,{tmp_path}/b/b.jsonl"
    found = replace_dotted(replace_dotted(found, "data.train", both), "data.eval", both)
    validate.validate(found, str(tmp_path / "work"), show_rows=40)
    lines = (tmp_path / "work" / "validation.jsonl").read_text().splitlines()
    found = {(f["kind"], f["id"]): f["where"] for f in map(json.loads, lines)}
    assert found["example_too_long", "too long"] == f"{tmp_path}/b/b.jsonl:1"
    assert found["passage_cut", "long"] == f"{tmp_path}/b/b.passages.jsonl:9"
    out = capsys.readouterr().out
    for town in TOWNS[:-2]:
        assert out.count(f"positive | {town}: {town} :: ") == 4  # two questions in each source


def test_nothing_good_is_told_row_by_row(tmp_path, capsys):
    """Bug: of a file whose every row lacks a field nothing is said but that it has no rows."""
    passages, examples = rows()
    for example in examples:
        del example["task"]
    code, out, findings = run(tmp_path, capsys, passages, examples)
    assert code == 2 and len(findings) == 16 and kinds(findings) == ["missing_field"]
    assert "error missing_field: 16 x" in out
    assert "x.jsonl: all its examples are bad, 16 bad rows; " in out


def test_few_good_rows_are_told_beside_the_bad(tmp_path, capsys):
    """Bug: of a file whose training rows are all bad nothing is said but that it has none."""
    passages, examples = rows()
    for example in examples[:-4]:
        del example["task"]
    _, out, _ = run(tmp_path, capsys, passages, examples)
    assert "12 bad rows, and without them: " in out


def test_a_reason_is_a_whole_phrase():
    """Bug: the decoder's "Invalid control character at" stops where its column would stand."""
    with pytest.raises(BadRow, match=r"not JSON \(Invalid control character\)$"):
        parse(b'{"id": "q1\n')


@pytest.mark.parametrize("split", ["train", "test"])
def test_nothing_good_is_the_last_line_too(tmp_path, split):
    """Bug: after the list of bad rows the last line tells of a split that has no example."""
    passages, examples = rows()
    for example in examples:
        example |= {"task": 3, "split": split}
    found = write(tmp_path, passages, examples)
    with pytest.raises(UserError, match="all its examples are bad, 16 bad rows; "):
        validate.validate(found, str(tmp_path / "work"))
    dropping = replace_dotted(found, "data.bad_rows", "drop")
    data = assemble.read_sources(dropping, tmp_path / "data")
    with pytest.raises(UserError, match="all its examples are bad"):
        assemble.refuse_bad_rows(data, dropping)


def test_a_row_is_shown_as_the_model_reads_it(tmp_path, capsys):
    """Bug: targets shown one token off; the wrong passage shown for a [Ret]; siblings left out."""
    passages, examples = rows()
    two_hop = {**examples[0], "id": "two", "evidence": ["Lima", "Quito"], "answers": ["two"]}
    two_hop |= {"kind": "label", "support": [[0, 15], [0, 16]]}
    _, out, _ = run(tmp_path, capsys, passages, [two_hop, examples[-1]], show_rows=1)
    shown = out[out.index("row 0 of step 0") :].splitlines()
    lines = [line.strip().partition(" | ")[::2] for line in shown if " | " in line]
    names = [name.strip() for name, _ in lines]
    assert names == [
        *("read", "[Ret]", "positive", "sibling", "predict", "[Ret]", "positive", "sibling"),
        "predict",
    ]
    texts = [text for _, text in lines]
    assert texts[0].endswith("What lies by Lima in all of America?## Output:\\n\\n")
    assert texts[2].startswith("Lima: Lima :: ") and texts[3].startswith("Quito: Quito :: ")
    assert texts[4].startswith("Lima :: Lima is a") and texts[4].count("[Cs]Lima is a town") == 1
    assert texts[6].startswith("Quito: ") and texts[8].endswith("[Ce]two</s>")


def test_masked_evidence_is_shown_as_read(tmp_path, capsys):
    """Bug: evidence drawn as a target although the loss does not count it."""
    found = write(tmp_path, *rows())
    for mask in (False, True):
        changed = replace_dotted(found, "loss.mask_evidence", mask)
        validate.validate(changed, str(tmp_path / "work"), show_rows=1)
        assert ("predict  | a river[Ce]</s>" in capsys.readouterr().out) == mask


def test_options_belong_to_their_mode():
    """Bug: --show ignored in silence where it does nothing; a traceback for --show=all."""
    with pytest.raises(UserError, match="--show means nothing with --mode=train"):
        main._options({"--show": "3"}, "train")
    with pytest.raises(UserError, match="--show=all must be a whole number"):
        main._options({"--show": "all"}, "validate")
    assert main._options({"--show": "3", "--limit": "2"}, "validate") == {
        "show_rows": 3,
        "limit": 2,
    }


def test_near_duplicates_are_those_of_every_pair_compared():
    """Bug: hashes that miss what is alike, or call alike what is not."""
    words = [f"w{i}" for i in range(60)]
    base = [" ".join(words[i : i + 20]) for i in range(0, 40, 5)]
    near = NearDuplicates(base)
    for text in (*base, *(text + " more" for text in base), "w1 w2", "", "entirely other words"):
        best = max(similarity(shingles(text, 3), shingles(other, 3)) for other in base)
        found = near.find(text)
        assert (found is not None) == (best >= 0.8), text
        if found:
            assert found[1] == best
