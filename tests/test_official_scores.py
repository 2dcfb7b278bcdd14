"""The official code's scores by hand: raw outputs, retrieval, grounding."""

import pytest

from cosup_jax.evaluation import cited, metrics, official, support

DOCS = [{"id": n, "title": f"T{n}", "text": f"fact{n}"} for n in range(1, 6)]


@pytest.mark.parametrize(
    "raw, output",
    [
        ("x [Ret] p [Cs] Yes. [Ce] z</s>", "x Yes[1].  z"),
        ("[Ret]p[Cs]Really?[Ce]", "Really?[1] "),
        ("[Ret]p[Cs]Paris..[Ce]", "Paris.[1]. "),
        ("[Ret]p[Cs]a[Ce][Ret]q[Cs]b[Ce][Ret] p [Cs]c[Ce]", "a[1] b[2] c[1] "),
        ("[Ret]p[Cs] [Ce][Ret]q[Cs]b[Ce]", "b[2] "),  # an empty span takes a number
        ("[Ret]p[Ret]q[Cs]a[Ce]", "a[1] "),
        ("[Ret]p[Cs]a[Ret]b[Ce]c", "a[Ret]b[1] c"),
        ("a[Ret]p[Cs]b", "a[Ret]p[Cs]b"),
        ("[Cs]a[Ce][Ret]p", "[Cs]a[Ce][Ret]p"),
        ("Q## Output:\n\nA## Output:\n\nB", "A"),
        ("## Output:\n\nx## Raw Output:\n\ny", "y"),
        ("<s><PAD>", "<s><PAD>"),
    ],
)
def test_raw_output_becomes_an_answer(raw, output):
    """Bugs: a citation of another passage, a stop on the wrong side of it, text lost."""
    assert metrics.parse_cited_output(raw)["output"] == output


def test_parsed_output_has_its_spans():
    """Bug: numbers that do not name the passages they stand for."""
    found = metrics.parse_cited_output("x[Ret] p [Cs] a [Ce][Ret]q[Cs]b[Ce][Ret]p[Cs]c[Ce]")
    assert found["passages"] == ["p", "q"]
    assert [(s["text"], s["number"], s["passage"]) for s in found["spans"]] == [
        ("a", 1, "p"), ("b", 2, "q"), ("c", 1, "p"),
    ]  # fmt: skip


def official_item(raw, docs, **more):
    output = cited.parse_cited_output(raw)["output"]
    return {"question": "q", "raw_output": raw, "output": output, "docs": docs, **more}


def test_official_scores_by_hand():
    """Bugs: a split over the wrong items, a denominator that is another than stated."""
    raw = "[Ret] T2 :: fact2 [Cs] fact2. [Ce]"
    items = [
        official_item(raw, DOCS[:2], answers=["fact2"]),  # right, retrieved
        official_item("fact9", DOCS[:1], answers=["fact9"]),  # right, missed
        official_item("x", [], answers=["y"]),
        official_item(raw, DOCS[:2], answers=[]),
    ]
    judge = lambda premise, claim: claim.rstrip(".") in premise
    assert official.official_scores(items, "kilt_nq", judge) == {
        "acc_substring": 50.0, "acc_substring_retrieved": 100.0, "acc_substring_gated": 25.0,
        "acc_substring_missed": pytest.approx(100 / 3), "retrieval_precision": 12.5,
        "retrieval_hit": pytest.approx(100 / 3), "n": 4, "n_retrieved": 1, "n_missed": 3,
        "n_judged": 3, "grounding": 50.0, "grounding_gated": 25.0, "grounding_answered": 100.0,
        "n_grounded": 2,
    }  # fmt: skip
    theirs = official.official_scores(items, "kilt_nq", judge, peer_compat=True)
    assert theirs["rev.citation_rec"] == 0.0  # it judges the span against T1
    with pytest.raises(ValueError, match="retrieval is not judged for 'kilt_x'"):
        official.official_scores(items, "kilt_x")


def test_official_support():
    """Bugs: an answer found in other letters of case; a gold id's repeats folded."""
    one = {"docs": [DOCS[0], DOCS[0] | {"text": "y"}, DOCS[1]], "answers": "fact1", "gold_docs": []}
    assert support.support_by_answer(one)[:2] == (0.5, 1.0)
    assert support.support_by_answer(one | {"answers": ["Fact1"]})[:2] == (0.0, 0.0)
    assert support.support_by_gold(one) == support.Support(0.0, None, 0.0)
    found = support.support_by_gold(one | {"gold_docs": [1, 1, 3]})
    assert found[:3] == (0.5, 1.0, pytest.approx(2 / 3)) and found.exact == 0.0
    whole = support.support_by_gold(one | {"gold_docs": [{"id": 1}, {"id": 2}, {"id": 2}]})
    assert whole == support.Support(1.0, 1.0, 1.0, 1.0, 1.0)


def test_grounding_by_hand():
    """Bugs: `[k]` against another passage than the k-th shown; a mean over all sentences; text
    outside spans judged; a text without spans counted as grounded; the whole of a passage without a
    title taken for its title."""
    asked = []
    judge = lambda *pair: asked.append(pair) or "fact" in pair[1]
    raw = (
        "Zero. [Ret] T2 :: fact2 [Cs] One fact. Two. [Ce] so [Ret]T1  :: fact1[Cs] Three fact [Ce]"
        "[Ret] Other :: text [Cs] Four. [Ce]"
    )
    found = cited.groundings([official_item(raw, DOCS[:2]), official_item("x", [])], judge)
    assert found == [pytest.approx((1 / 2 + 1) / 2), None]
    both = "Title: T1\nfact1\nTitle: Other\ntext"  # no full stop between the last two spans
    assert asked == [
        ("Title: T2\nfact2", "One fact."),
        ("Title: T2\nfact2", "Two."),
        (both, "Three fact Four."),
    ]
    asked.clear()
    untitled = [{"id": 1, "title": "", "text": "fact"}]
    raw = "[Ret]fact[Cs]One fact.[Ce][Ret]cut off[Cs]Two fact.[Ce]"
    cited.groundings([official_item(raw, untitled)], judge)
    assert asked == [("Title: \nfact", "One fact."), ("cut off", "Two fact.")]


def test_official_keys_of_other_tasks():
    """Bugs: rounding, aliases or the words that `_wo_bool` leaves out."""
    keys = {"answer": "Rome", "answer_alias": ["The Roma"]}
    items = [official_item("roma", DOCS[:1], **keys), official_item("", [], **keys)]
    found = official.official_scores(items, "alce_musique", peer_compat=True)
    assert found["answer_em"] == found["answer_f1"] == 50.0
    items = [
        official_item(t, [], answer=a) for t, a in (("yes", "yes"), ("x", "y"), ("true", True))
    ]
    found = official.official_scores(items, "alce_strategyqa", peer_compat=True)
    assert found["answer_em"] == pytest.approx(200 / 3) and found["answer_em_wo_bool"] == 50.0
    pairs = [{"short_answers": ["b"]}]
    found = official.official_scores(
        [{"output": "a\nb", "qa_pairs": pairs}], "alce_asqa", peer_compat=True
    )
    assert found["str_em"] == 100.0  # all lines, where ALCE reads the first
    with pytest.raises(ValueError, match="exactly one answer"):
        two = official_item("x", [], answers=["a", "b"], gold_docs=[])
        official.official_scores([two], "kilt_wow", peer_compat=True)
