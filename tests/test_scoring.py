"""Scores of one answer, each against what the rules of the peers give by hand."""

from types import SimpleNamespace

import pytest
from declared import held_to_its_word

from cosup_jax.config import Config
from cosup_jax.data.schema import Passage
from cosup_jax.dotted import replace_dotted
from cosup_jax.evaluation import scoring
from cosup_jax.evaluation.nli import Containment

PARIS = {"number": 1, "id": "p1", "title": "Paris", "text": "Paris is the capital of France."}
ROME = {"number": 2, "id": "p2", "title": "", "text": "Rome is old."}
PASSAGES = {
    id: Passage(id, "", text)
    for id, text in (("p1", PARIS["text"]), ("p2", ROME["text"]), ("p3", "Bonn is small."))
}


def answer(**more):
    """A record: right, cited, its evidence found first."""
    found = {
        "id": "q",
        "question": "Capital of France?",
        "task": "open_qa",
        "kind": "span",
        "answers": ["Paris", "City of Light"],
        "long": False,
        "long_answer": "",
        "answer_groups": [],
        "evidence": ["p1"],
        "answer": "Paris",
        "text": "Paris",
        "output": "Paris[1] ",
        "spans": [{"text": "Paris", "passage": "p1", "number": 1}],
        "sources": [PARIS],
        "ranking": ["p1", "p2", "p3"],
    }
    return found | more


def scores_of(record):
    (scores,) = scoring.scored([record], Containment(), PASSAGES)
    return scores


def test_right_cited_and_found():
    """Bugs: a score in percent beside others in 0..1; one of a long answer that is not there."""
    scores = scores_of(answer())
    one = {name: score for name, score in scores.items() if score == 1}
    assert scores["rougel"] == pytest.approx(1) and scores["KILT-rougel"] == pytest.approx(1)
    assert set(scores) - set(one) == {
        *("rougel", "KILT-rougel", "precision@5", "precision@10"),  # one page of evidence
    }
    assert not {"str_em", "rougeLsum", "citation_rec"} & set(scores)
    assert {"containment_citation_rec", "containment_citation_prec"} <= set(one)


def test_found_late_and_cited_badly():
    """Bugs: a gate that opens for evidence at rank 2, or for half of it; citations
    judged against another source than the one they number; the rank confused with what was
    shown; an answer sought in the shown passages alone, where all found ones count."""
    late = answer(ranking=["p2", "p1"], sources=[ROME | {"number": 1}], output="Paris[1] ")
    scores = scores_of(late)
    assert scores["Rprec"] == 0 and scores["recall@5"] == 1 and scores["retrieval_hit"] == 0
    assert scores["em"] == 1 and scores["KILT-em"] == 0
    assert scores["containment_citation_rec"] == 0
    assert scores["answer_in_context@1"] == 0 and scores["answer_in_context@5"] == 1
    both = answer(sources=[PARIS, ROME], output="Paris[2] Paris[1] ", evidence=["p1", "p2"])
    assert scores_of(both)["retrieval_precision"] == 1
    half = scores_of(answer(evidence=["p1", "p3"]))
    assert half["Rprec"] == 0.5 and half["em"] == 1 and half["KILT-em"] == 0


def test_a_span_is_judged_by_the_passage_that_it_cites():
    """Bugs: of two passages at one [Ret] the other one grounds the span too; of spans that cite
    different passages one is judged by another's."""
    said = "Paris is the capital of France."
    cites = lambda *numbers: answer(
        sources=[PARIS, ROME],
        spans=[{"text": said, "passage": "?", "number": number} for number in numbers],
    )
    for numbers, share in (((1,), 1), ((2,), 0), ((2, 1), 0.5), ((3,), 0)):
        assert scores_of(cites(*numbers))["containment_grounding"] == share
    other = cites(1)
    other["spans"].append({"text": "Rome is old.", "passage": "p2", "number": 2})
    assert scores_of(other)["containment_grounding"] == 1


def test_short_answer_and_whole_text_are_told_apart():
    """Bugs: a label after its grounding never exact, as the span stands before it; an answer that
    is only quoted in the span counted as said exactly."""
    claim = answer(
        kind="label",
        answers=["supports"],
        answer="supports",
        text="Paris is the capital of France. supports",
        output="Paris is the capital of France[1]. supports",
        spans=[{"text": "Paris is the capital of France.", "passage": "p1", "number": 1}],
    )
    scores = scores_of(claim)
    assert scores["accuracy"] == scores["em"] == scores["acc_substring"] == 1
    assert scores["containment_citation_rec"] == 0.5  # "supports" is not in the passage
    assert scores_of(claim | {"answer": "refutes", "text": "it supports"})["accuracy"] == 0


def test_what_a_question_has_no_ground_for_is_absent():
    """Bug: a question without evidence, or without a short answer, counted as missed."""
    free = scores_of(answer(evidence=[], answers=["Rome"], sources=[ROME]))
    assert not {"Rprec", "recall@5", "KILT-em"} & set(free) and free["retrieval_hit"] == 1
    grouped = answer(answers=[], answer_groups=[["Paris"], ["Rome", "Roma"]], text="Paris it is")
    grouped["output"] = "Paris it is[1]."
    assert scores_of(grouped)["str_em"] == 0.5
    long = scores_of(answer(answers=["x"], long_answer="Paris is big", answer="Paris is big"))
    assert long["rougel"] == pytest.approx(1) and long["em"] == 0 and long["rougeLsum"] < 0.6


def test_a_study_may_name_every_score():
    """Bug: a score that is added here and refused by every study, as one that nothing gives."""
    more = {"long_answer": "Paris is big", "answer_groups": [["Paris"]]}
    scores = scores_of(answer(**more)) | {"correct": 1.0}
    held_to_its_word("answers", {"": {f"gold/{name}": {"q": v} for name, v in scores.items()}})
    assert {"str_em", "rougeLsum", "KILT-rougel", "success_rate@10"} <= set(scores)
    nli = {f"corpus/{name}": {"q": 1.0} for name in ("citation_rec", "citation_prec", "grounding")}
    judged = replace_dotted(Config(), "eval.judge", "google/t5_xxl_true_nli_mixture")
    held_to_its_word("answers", {"": nli}, judged)


def test_a_long_answer_is_scored_whole():
    """Bugs: only what follows the last span is scored, so that an answer in several parts is never
    right; a label behind its explanation scored with it."""
    said = "Paris is the capital. It lies on the Seine. Both are old"
    record = answer(long=True, text=said, answer="Both are old", answers=[said], kind="text")
    scores = scores_of(record)
    assert scores["em"] == scores["f1"] == scores["KILT-f1"] == 1
    assert scores["rougel"] == pytest.approx(1)
    scores = scores_of(record | {"answers": [], "long_answer": said})
    assert scores["rougel"] == pytest.approx(1) and scores["f1"] == 1
    assert "retrieval_hit" not in scores_of(
        record | {"answers": [], "long_answer": said, "evidence": []}
    )
    example = lambda **more: SimpleNamespace(
        **{"long_answer": "", "output": "", "task": "open_qa", "kind": ""} | more
    )
    assert not scoring.is_long(example())
    for more in ({"long_answer": "x"}, {"output": "x"}, {"task": "long_form", "kind": "text"}):
        assert scoring.is_long(example(**more))
        assert not scoring.is_long(example(**more | {"kind": "label"}))


def test_every_line_of_an_answer_is_scored():
    """Bug: ALCE's scores of a first line alone, beside others of all lines."""
    said = "Paris is the capital of France.\nRome is new."
    scores = scores_of(
        answer(
            **{"long": True, "long_answer": said, "text": said, "sources": [PARIS, ROME]},
            answer_groups=[["Paris"], ["Rome"]],
            output="Paris is the capital of France[1].\nRome is new[2].",
            spans=[
                {"text": "Paris is the capital of France.", "passage": "p1", "number": 1},
                {"text": "Rome is new.", "passage": "p2", "number": 2},
            ],
        )
    )
    assert scores["str_em"] == scores["rougeLsum"] == 1
    assert scores["containment_citation_rec"] == scores["containment_grounding"] == 0.5


@pytest.mark.parametrize(
    ("output", "span", "share"),
    [
        ("Rome is old [12][2].", "Rome is old [12].", 1),
        ("[3] Rome is old[2]. [12]", "Rome is old.", 1),
        ("Rome is old[2]. Paris is the capital of France [1].", "Rome is old.", 0.5),
        ("Bonn is old[2].\n[Rome is old[2].", "Rome is old.", 0.5),
        ("Rome is old[2]. Rome is old[2].", "Rome is old.", 1),
    ],
)
def test_numbers_in_brackets_cite_nothing_of_themselves(output, span, share):
    """Bugs: a number that a passage has in brackets takes a statement's citation away; one that Gen
    writes there itself cites a passage for it; the second of two equal spans loses its citation."""
    spans = [{"text": span, "passage": "p2", "number": 2}] * output.count("[2]")
    scores = scores_of(answer(output=output, spans=spans, sources=[PARIS, ROME]))
    assert scores["containment_citation_rec"] == share
    assert scores["containment_citation_prec"] == scores["containment_grounding"] == 1


def test_empty_answer_counts_zero():
    """Bug: an answer without words left out of a mean, or scored right."""
    empty = answer(answer="", text="", output="", spans=[], sources=[], ranking=[], answers=["The"])
    assert set(scores_of(empty).values()) == {0.0}


@pytest.mark.parametrize(
    ("rows", "metric"),
    [
        ([{"answer_groups": [["a"]]}], "str_em"),
        ([{"long_answer": "x"}, {"long_answer": "y"}, {}], "rougel"),
        ([{"task": "long_form", "kind": "text"}], "rougel"),
        ([{"long_answer": "x"}, {}, {}], "acc_substring"),
        ([{"answers": [], "output": "x"}], "rougel"),
        ([{"output": "x"}], "acc_substring"),
        ([{"long_answer": "x", "kind": "label"}], "accuracy"),
        ([{"kind": "label"}, {"kind": "choice"}], "accuracy"),
        ([{"kind": "text"}], "f1"),
        ([{"kind": "span"}, {"kind": ""}], "acc_substring"),
        ([{"kind": "span"}, {"kind": "label"}], "em"),
    ],
)
def test_what_a_set_is_judged_by(rows, metric):
    """Bug: "A", the letter of a choice, is in every text, so that a set of choices is all right."""
    assert scoring.judged_by([SimpleNamespace(**answer(**row)) for row in rows]) == metric
