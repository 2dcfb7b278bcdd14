"""ALCE's scores by hand, corner by corner, and where we depart from them."""

import math

import numpy as np
import pytest

from cosup_jax.evaluation import alce, metrics

DOCS = [{"id": n, "title": f"T{n}", "text": f"fact{n}"} for n in range(1, 6)]


def item(output, **more):
    return {"question": "q", "output": output, "docs": DOCS[:3], **more}


def needs(*facts):
    """A judge: the premise must have every fact, whatever the claim."""
    return lambda premise, claim: all(f"fact{n}" in premise for n in facts)


def test_str_em():
    """Bugs: a micro mean; later lines or citations read; nan hidden."""
    pairs = [{"short_answers": ["Paris", "x"]}, {"short_answers": ["Rome"]}]
    items = [item("In Paris [1].\nRome", qa_pairs=pairs), item("Rome [2]", qa_pairs=pairs[1:])]
    assert metrics.str_em(items) == {"str_em": 75.0, "str_hit": 50.0, "n": 2}
    assert metrics.str_em(items[0])["str_em"] == 50.0  # one item alone
    assert metrics.str_em([item("x")]) == {"str_em": 0.0, "str_hit": 0.0, "n": 1}
    assert math.isnan(metrics.str_em([items[0], item("x", qa_pairs=[])])["str_em"])
    assert math.isnan(metrics.str_em([])["str_em"])


def test_qampari():
    """Bugs: repeats that count once; top five of the list in place of the gold answers."""
    many = [[str(n), f"no {n}"] for n in range(10)]
    found = alce.qampari_of(item("0, no 1, 1, x, [1] .", answers=many))
    assert found["num_preds"] == 4 and found["prec"] == 0.75
    assert found["rec"] == 0.2 and found["rec_top5"] == 0.4
    assert found["f1"] == pytest.approx(0.3 / 0.95)
    assert alce.qampari_of(item("so: 0, 1", answers=many), cot=True)["num_preds"] == 2
    assert alce.qampari_of(item("0, 1", answers=many), cot=True)["num_preds"] == 0
    assert metrics.qampari_scores([item("", answers=many)])["qampari_f1"] == 0.0


def test_rouge_lsum():
    """Bugs: a number that another run does not give; the worse of two references."""
    notes = [{"long_answer": "a cat sat."}, {"long_answer": "running dogs. They ate."}]
    items = [
        item("Runs dog [1]. They ate.", annotations=notes),
        item("one two", answer="two three"),
    ]
    assert alce.rouge_lsum_of(items[0]) == 1.0  # stems, and sentences matched apart
    assert metrics.rouge_lsum(items) == {"rougeLsum": 75.0, "n": 2}
    cased = item("in The home. The left. In ran", answer="far The In Mr. In Dr. left.")
    assert alce.rouge_lsum_of(cased) == pytest.approx(3 / 7)  # split in lower case: In opens none
    items = [item("one two", answer="one" + count * " x") for count in range(9)]
    draws = set()
    for seed in range(2):
        np.random.seed(seed)
        draws.add(metrics.rouge_lsum(items, peer_compat=True)["rougeLsum"])
    mean = metrics.rouge_lsum(items)["rougeLsum"]
    assert len(draws) > 1 and max(abs(draw - mean) for draw in draws) < 5


@pytest.mark.parametrize(
    "output, wanted, rec, prec",
    [
        ("A [1]. B [2].", needs(), 100, 100),
        ("A [1]. B.", needs(), 50, 100),  # uncited: not in precision
        ("A [1]. B [9].", needs(), 50, 100),  # a ghost: not in precision either
        ("A [1][9].", needs(), 0, 0),
        ("A [1][2].", needs(1), 100, 50),  # 2 is not needed
        ("A [1][2].", needs(1, 2), 100, 100),  # neither is enough alone
        ("A [1][2].", needs(3), 0, 0),
        ("A [1][1].", needs(1), 100, 100),
        ("A [1][3][1].", needs(1, 3), 100, 100 / 3),  # the other 1 makes the first one needless
        ("A [1, 3].", needs(1), 100, 100),
        ("A [1-3].", needs(1), 100, 100),
        ("A [1.", needs(1), 100, 100),  # unclosed, and read
        ("A [ 1 ]. B (1).", needs(), 0, 0),
        ("A [1990].", needs(), 0, 0),
        ("One. [1] Two.", needs(1), 50, 100),
        ("A [1].\nB.", needs(1), 100, 100),  # the first line only
        ("A [2][1][3][1].", needs(1, 3), 100, 200 / 3),
        ("A [2][3][2][1].", needs(1), 0, 0),  # the fourth is not looked at
        ("A [2][3][2][9].", needs(3), 0, 0),  # but its being there is, before the cap
    ],
)
def test_citations_by_hand(output, wanted, rec, prec):
    """Bugs: recall or precision of another rule than ALCE's for one of these ways to cite."""
    for compat in (False, True):
        found = metrics.citation_scores([item(output)], wanted, peer_compat=compat)
        assert found["citation_rec"] == pytest.approx(rec)
        assert found["citation_prec"] == pytest.approx(prec)


def test_claims_have_no_citations_and_premises_are_documents():
    """Bug: a judge that reads `[1]`, or a document in other words than ALCE's."""
    asked = []
    docs = [DOCS[0] | {"sent": "short"}, {"text": "untitled"}, DOCS[2]]
    one = {"question": "q", "output": "Yes [1][2] so, 3]. Ja [3].", "docs": docs}
    metrics.citation_scores([one], lambda *pair: asked.append(pair))
    assert asked == [("Title: T1\nshort\nuntitled", "Yes so, 3."), ("Title: T3\nfact3", "Ja.")]
    metrics.citation_scores(
        [item("x [1], y", question="Q")], lambda *p: asked.append(p), qampari=True
    )
    assert asked[2:] == [("Title: T1\nfact1", "Q x")]


def test_citation_departures():
    """Bugs: an empty output that raises the mean by default; `[0]` as a source; peer_compat that
    is not the peer."""
    items = [item(" "), item("A [1].")]
    assert metrics.citation_scores(items, needs()) == {
        "citation_rec": 50.0, "citation_prec": 50.0, "n": 2,
        "citation_rec_answered": 100.0, "citation_prec_answered": 100.0, "n_answered": 1,
    }  # fmt: skip
    theirs = metrics.citation_scores(items, needs(), peer_compat=True)
    assert theirs == {"citation_rec": 100.0, "citation_prec": 100.0, "n": 2, "n_answered": 1}
    assert metrics.citation_scores(items[:1], needs())["citation_rec"] == 0.0
    assert math.isnan(metrics.citation_scores(items[:1], needs(), peer_compat=True)["citation_rec"])
    lists = metrics.citation_scores(items[:1], needs(), qampari=True, peer_compat=True)
    assert lists["citation_rec"] == 0.0 and lists["n_answered"] == 1  # one uncited item
    zero = [item("A [0].")]
    assert metrics.citation_scores(zero, needs(3))["citation_rec"] == 0.0
    assert metrics.citation_scores(zero, needs(3), peer_compat=True)["citation_rec"] == 100.0
    capless = metrics.citation_scores([item("A [2][3][2][1].")], needs(1), at_most_citations=None)
    assert capless["citation_rec"] == 100.0 and capless["citation_prec"] == 25.0


def test_claim_recall():
    """Bug: premise and hypothesis swapped; no claims at all taken for a score."""
    asked = []
    judge = lambda *pair: asked.append(pair) or pair[1] == "b"
    assert metrics.claim_recall([item("x [1]", claims=["a", "b"])], judge) == {
        "claims_nli": 50.0, "n": 1,
    }  # fmt: skip
    assert asked == [("x", "a"), ("x", "b")]
    with pytest.raises(ValueError, match="item 1 has no claims"):
        metrics.claim_recall([item("x", claims=["a"]), item("x", claims=[])], judge)


def test_alce_scores():
    """Bug: a task without its scores, or with scores that nobody measured."""
    one = item("A [1].", qa_pairs=[{"short_answers": ["a b"]}], answer="A", answers=[["a"]])
    asqa = metrics.alce_scores([one], "asqa", needs())
    assert {"length", "str_em", "rougeLsum", "citation_rec"} <= set(asqa)
    eli5 = metrics.alce_scores([one | {"claims": ["c"]}], "eli5", needs())
    assert eli5["claims_nli"] == 100.0 and "str_em" not in eli5
    lists = metrics.alce_scores([one], "qampari")
    assert "qampari_f1" in lists and "rougeLsum" not in lists and "citation_rec" not in lists
    with pytest.raises(ValueError, match="no task 'x'"):
        metrics.alce_scores([one], "x")
