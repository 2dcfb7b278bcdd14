"""An arm at another arm's gradient_ratio."""

from pathlib import Path

import pytest

from cosup_jax import config_files, study
from cosup_jax.config_files import File
from cosup_jax.errors import UserError
from cosup_jax.studies import equal_ratio
from cosup_jax.studies.design import Design

WEIGHT = str(Path(__file__).parent.parent / "configs/studies/weight.py:small")


def run(ratios, **hits):
    """Scores of a run whose NSP weighs so much in Gen at its checkpoints."""
    weighs = {f"gradient_ratio/step_{step}": {"a": r, "b": r} for step, r in enumerate(ratios)}
    return {"": weighs, "towns": {"hit": hits, "miss": {"q": 0.0}}}


def test_a_ratio_is_the_mean_over_training():
    """Bugs: that of the last checkpoint alone; 0 of an arm that has none."""
    assert equal_ratio.ratio(run([1.0, 3.0], q=1.0)) == 2.0
    assert equal_ratio.ratio({"": {"gradient_cosine/gen/step_1": {"a": 0.5}}}) is None
    assert equal_ratio.ratio({}) is None


def test_a_curve_is_read_question_by_question_between_its_neighbours():
    """Bugs: interpolated over the ratio itself and not its logarithm; arms taken in the order they
    are named in; a question that one arm lacks; an arm without a ratio, such as NTP alone."""
    far, near = run([16.0], q=1.0, r=1.0, s=1.0), run([1.0, 1.0], q=0.0, r=1.0, t=1.0)
    curve = [run([99.0], q=5.0), far, {"towns": {"hit": {"q": 7.0}}}, near]
    found = equal_ratio.read(curve, 2.0)
    assert found["towns"]["hit"] == pytest.approx({"q": 0.25, "r": 1.0})
    assert equal_ratio.read(curve, 16.0)["towns"]["hit"]["q"] == pytest.approx(1.0)
    assert equal_ratio.read([near, near], 1.0)["towns"]["hit"] == near["towns"]["hit"]


@pytest.mark.parametrize("at", [0.5, 100.0, None, 0.0])
def test_beyond_its_ends_a_curve_says_nothing(at):
    """Bug: the end is taken for what lies beyond it."""
    assert equal_ratio.read([run([1.0], q=1.0), run([99.0], q=1.0)], at) == {}


def asked(root="runs", **told):
    file = File(WEIGHT, {f"study.{key}": value for key, value in told.items()})
    return Design.of(config_files.frozen(*file), Path(root), file)


def test_a_curve_is_an_arm_at_all_its_weights(capsys):
    """Bugs: arms that differ in more than nsp_weight, such as T or another start, on the curve, or
    NTP alone, which has no ratio; a claim of an absent arm; no measure that gives the ratio."""
    curve = ["N", "C", "C_0.1", "C_0.3", "C_3"]  # N weighs 0, and says nothing where it is read
    assert asked().equated == {"C@T": (curve, "T"), "C@C_pre": (curve, "C_pre")}
    assert asked(arms="C,T,C_3").equated == {"C@T": (["C", "C_3"], "T")}
    assert "C@C_pre > C_pre: corpus/retrieval_hit" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"'T@X' is no arm of .*C@T"):
        asked(claims="C@T > T@X: corpus/correct")
    with pytest.raises(UserError, match="add gradients_over_training to"):
        asked(measures="answers,majority,training,geometry")


OWN = """
from cosup_jax.studies import arms


def get_config(variant=""):
    own = {"C_less": {"loss.nsp_weight": 0.5}}
    return arms.config(
        variant,
        own,
        arms="C,C_less,T",
        claims="C > C_less: corpus/correct; C > C@T: corpus/correct",
        measures="answers,gradients_over_training",
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
    given = {"arms": "C,T,C_3", "crossed": "", "measures": "answers,gradients_over_training"}
    found = study._Found(asked(tmp_path, seeds="2", claims=claims, **given))

    def scores(ratio, hit):
        hits = {"towns": {"corpus/retrieval_hit": {f"q{i}": hit for i in range(4)}}}
        return {"": {"gradient_ratio/step_1": {"a": ratio}}} | hits

    for c, t, c_3 in [((1, 0.0), (2, 1.0), (4, 1.0)), ((1, 0.0), (8, 0.5), (16, 1.0))]:
        for name, told in (("C", c), ("T", t), ("C_3", c_3)):
            found._scores[name].append(scores(*map(float, told)))
        found.add_equated()
    said = found.summary()
    seeds = {row["claim"]: row["by_seed"] for row in said["claims"]}
    assert seeds["T > C@T: corpus/retrieval_hit"] == pytest.approx([0.5, -0.25])
    assert seeds["C > C@T: corpus/retrieval_hit"] == pytest.approx([-0.5, -0.75])
    assert said["state"] == "finished" and not said["untested"]
    (row,) = (row for row in said["measured"] if row["arm"] == "C@T" and row["set"])
    assert row["mean"] == pytest.approx(0.625) and row["items"] == 4
