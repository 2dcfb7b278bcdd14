"""An arm at another arm's gradient_ratio."""

from pathlib import Path

import pytest

from cosup_jax import config_files, study
from cosup_jax.config_files import File
from cosup_jax.errors import UserError
from cosup_jax.studies import equal_ratio, results
from cosup_jax.studies.design import Design

WEIGHT = str(Path(__file__).parent.parent / "configs/studies/weight.py")


def run(ratio, **hits):
    """Scores of a run in which NSP weighs so much in Gen at the start."""
    start = {"gradient_ratio/at_start": {"": ratio}} if ratio is not None else {}
    plane = {f"plane/queries/{axis}": {"q": 1.0} for axis in "xy"}
    return {"": start | {"drift": {"": ratio}}, "towns": {"hit": hits, **plane}}


def test_a_curve_is_read_question_by_question_between_its_neighbours():
    """Bugs: interpolated over the ratio itself and not its logarithm; arms taken in the order they
    are named in; an arm without a ratio, such as NTP alone; a mean over questions that only one run
    was right in; numbers of a whole run, which are none of what lies between two."""
    far, near = run(16.0, q=1.0, r=1.0), run(1.0, q=0.0, r=1.0)
    curve = [run(99.0, q=5.0, r=5.0), far, run(None, q=7.0, r=7.0), near]
    found = equal_ratio.interpolated(curve, run(2.0))
    assert found.keys() == {"towns"} and found["towns"]["hit"] == pytest.approx({"q": 0.25, "r": 1})
    assert equal_ratio.interpolated(curve, run(16.0))["towns"]["hit"]["q"] == pytest.approx(1.0)
    assert equal_ratio.interpolated([near, near], run(1.0))["towns"] == near["towns"]
    unlike = equal_ratio.interpolated([run(1.0, q=1.0), run(3.0, q=1.0, r=0.0)], run(2.0))
    assert "hit" not in unlike["towns"]
    assert results.planes({"C@T": [unlike]}) == []


@pytest.mark.parametrize("at", [0.5, 100.0, None, 0.0])
def test_beyond_its_ends_a_curve_says_nothing(at):
    """Bug: the end is taken for what lies beyond it."""
    assert equal_ratio.interpolated([run(1.0, q=1.0), run(99.0, q=1.0)], run(at)) == {}


def asked(root="runs", scale="", **told):
    file = File(WEIGHT + scale, {f"study.{key}": value for key, value in told.items()})
    return Design.of(config_files.frozen(*file), Path(root), file)


def test_a_curve_is_an_arm_at_all_its_weights(capsys):
    """Bugs: arms that differ in more than nsp_weight, such as T or another start, on the curve, or
    NTP alone, which has no ratio; a curve of one arm; a claim whose arms are there left out, or
    read together with the one before it; no measure that gives the ratio."""
    curve = ["C", "C_0.1", "C_0.3", "C_1.7", "C_3"]
    assert asked().matched == {"C@T": (curve, "T")}
    few = asked(arms="N,C,T,C_pre,C_0.1,C_3")  # claims are then joined without a space
    assert few.matched == {"C@T": (["C", "C_0.1", "C_3"], "T")}
    claims = "C > T: corpus/recall@5;C@T > T: corpus/correct"
    assert len(asked(arms="C,T,C_3", claims=claims, crossed="").claims) == 2
    capsys.readouterr()
    assert asked(arms="N,C,T").matched == {}
    said = "left out for want of arms: C > C_0.1: corpus/retrieval_hit; C > C_3: -ntp_nats_per_tok"
    assert said in (told := capsys.readouterr().out)
    assert "; T > C@T: corpus/retrieval_hit, -ntp_nats_per_token;" in told


@pytest.mark.parametrize(
    ("told", "match"),
    [
        ({"claims": "T > C@X: corpus/correct"}, r"'C@X': 'X' is no arm of N, C, .*study\.arms"),
        ({"claims": "T > T@C: corpus/correct"}, r"'T@C' .* differ from it in loss\.nsp_weight"),
        ({"claims": "T > C@C: corpus/correct"}, r"'C@C' .* C is C itself"),
        ({"measures": "answers,majority,geometry"}, "of C@T: .*; add training to"),
    ],
)
def test_what_cannot_be_matched_is_told_before_anything_is_trained(told, match):
    """Bug: hours of training, and then "not tested"."""
    with pytest.raises(UserError, match=match):
        asked(**told)


def test_without_the_first_batch_s_ratio_nothing_is_matched():
    """Bug: a scale that probes no gradients claims what needs one, and never judges it."""
    assert asked(measures="geometry").matched == {}
    assert all("@" not in str(claim) for claim in asked(scale=":small").claims)
    claims = "T > C@T: corpus/correct"
    with pytest.raises(UserError, match=r"of C@T: .*; set config\.log\.probe_every_steps"):
        asked(claims=claims, scale=":small")


OWN = """
from cosup_jax.studies import arms


def get_config(variant=""):
    own = {"C_less": {"loss.nsp_weight": 0.5}}
    return arms.config(
        variant,
        own,
        arms="C,C_less,T",
        claims="C > C_less: corpus/correct; C > C@T: corpus/correct",
        measures="answers,training",
    )
"""


def test_a_claim_of_an_absent_arm_s_ratio_is_left_out(capsys, tmp_path):
    """Bug: refused as a claim of no arm."""
    path = tmp_path / "own.py"
    path.write_text(OWN)
    file = File(str(path), {"study.arms": "C,C_less"})
    design = Design.of(config_files.frozen(*file), tmp_path, file)
    assert list(map(str, design.claims)) == ["C > C_less: corpus/correct"]
    assert "left out for want of arms: C > C@T: corpus/correct" in capsys.readouterr().out


def test_an_arm_at_another_s_ratio_is_compared_as_any_other(tmp_path):
    """Bugs: the last seed's ratio for all seeds; the curve of another seed; a study that never
    says finished."""
    claims = "T > C@T: corpus/retrieval_hit; C > C@T: corpus/retrieval_hit"
    given = {"arms": "C,T,C_3", "crossed": "", "measures": "answers,training"}
    found = study._Found(asked(tmp_path, seeds="2", claims=claims, **given))

    def scores(ratio, hit):
        hits = {"towns": {"corpus/retrieval_hit": {f"q{i}": hit for i in range(4)}}}
        return {"": {"gradient_ratio/at_start": {"": ratio}}} | hits

    for c, t, c_3 in [((1, 0.0), (2, 1.0), (4, 1.0)), ((1, 0.0), (8, 0.5), (16, 1.0))]:
        for name, told in (("C", c), ("T", t), ("C_3", c_3)):
            found._scores[name].append(scores(*map(float, told)))
        found.add_matched()
    said = found.summary()
    seeds = {row["claim"]: row["by_seed"] for row in said["claims"]}
    assert seeds["T > C@T: corpus/retrieval_hit"] == pytest.approx([0.5, -0.25])
    assert seeds["C > C@T: corpus/retrieval_hit"] == pytest.approx([-0.5, -0.75])
    assert said["state"] == "finished" and not said["untested"]
    (row,) = (row for row in said["measured"] if row["arm"] == "C@T" and row["set"])
    assert said["matched"] == {"C@T": ["C", "C_3"]}
    assert row["mean"] == pytest.approx(0.625) and row["items"] == 4
