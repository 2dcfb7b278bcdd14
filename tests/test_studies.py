"""Studies: intervals, verdicts, and what is made of the scores of runs."""

import functools
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from cosup_jax.config import Config
from cosup_jax.errors import UserError
from cosup_jax.studies import measures, page, results
from cosup_jax.studies import verdict as verdict_lib
from cosup_jax.studies.geometry import PAIRS
from cosup_jax.studies.run import NUMBER, POINTS, SHARE
from cosup_jax.studies.verdict import OPPOSITE, _shown, between, estimate


def verdict(differences, none=verdict_lib.POINT):
    return verdict_lib.verdict(estimate(differences), none)


KINDS = {
    "corpus/correct": SHARE,
    "corpus/recall@1": SHARE,
    "distance": NUMBER,
    "drift/to_last/step_1": NUMBER,
}


def drawn(rng, seeds, items, between_seeds, between_items, noise):
    """[S, I] around 0: an effect of the seed, one of the item, and of each pair."""
    of_seed = between_seeds * rng.standard_normal((seeds, 1))
    of_item = between_items * rng.standard_normal((1, items))
    return of_seed + of_item + noise * rng.standard_normal((seeds, items))


@pytest.mark.parametrize("between_seeds", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("between_items", [0.0, 0.4])
def test_intervals_hold_the_true_mean_as_often_as_they_say(between_seeds, between_items):
    """Bug: questions are taken for independent over seeds, or three seeds for many: intervals
    that are too narrow, and claims confirmed by chance."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(400):
        found = estimate(drawn(rng, 3, 60, between_seeds, between_items, 0.4))
        inside += found.low <= 0 <= found.high
    assert inside >= 371  # 380 less two standard deviations


def test_an_interval_over_seeds_alone_is_student_s():
    """Bug: a normal interval over three seeds; or one seed's number with an interval of width 0."""
    values = np.array([[0.2], [0.3], [0.7]])
    found = estimate(values)
    low, high = stats.t.interval(0.95, 2, values.mean(), stats.sem(values[:, 0]))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert estimate(values[:1])[:4] == (0.2, None, None, None)


def test_a_mean_of_few_answers_is_known_no_better_than_that():
    """Bugs: a mean over those for whom retrieval failed, five of sixteen answers, is as sure as one
    of two hundred questions; a seed without any of them counts as one with 0."""
    rng = np.random.default_rng(0)
    values = (rng.random((3, 200)) < 0.3).astype(float)
    few = np.where(rng.random((3, 200)) < 0.04, values, np.nan)
    found, held = estimate(few), np.isfinite(few)
    assert found.scores == held.sum() < 40 and found.mean == pytest.approx(np.nanmean(few))
    assert found.by_seed == pytest.approx(np.nanmean(few, axis=1))
    errors = []
    for along in (0, 1):  # the linearised ratio's, by loops
        terms = []
        for i in range(few.shape[1 - along]):
            own = np.take(few, i, axis=1 - along)
            terms += [np.nansum(own - found.mean) / held.sum()] if np.isfinite(own).any() else []
        n = len(terms)
        errors.append(stats.t.ppf(0.975, n - 1) * np.std(terms, ddof=1) * n**0.5)
    assert found.high - found.mean == pytest.approx(np.hypot(*errors), rel=1e-6)
    assert found.high - found.low > 0.2 > 2 * (estimate(values).high - estimate(values).low)
    few[1] = np.nan
    assert estimate(few).by_seed[1] is None and estimate(few).seeds == 2


def test_an_interval_of_a_mean_of_few_answers_holds_the_true_one():
    """Bug: the number of answers, which chance decides, is taken for fixed, or an item's answers
    under several seeds for independent ones."""
    rng, inside = np.random.default_rng(3), 0
    for _ in range(300):
        p_I = rng.choice([0.1, 0.9], 120)
        right = rng.random((3, 120)) < p_I
        missed = rng.random((3, 120)) < 0.3
        found = estimate(np.where(missed, right, np.nan))
        inside += found.low <= 0.5 <= found.high
    assert inside >= 277  # 285 less two standard deviations


def test_one_seed_has_an_interval_over_its_items():
    """Bug: one seed counts as if its mean were known without error."""
    values = np.array([[1.0, 0, 0, 1, 1, 0, 1, 1]])
    found = estimate(values)
    low, high = stats.t.interval(0.95, 7, values.mean(), stats.sem(values[0]))
    assert (found.low, found.high) == pytest.approx((low, high)) and found.detectable is None


def test_a_difference_as_large_as_detectable_shows_as_often_as_is_said():
    """Bug: a detectable difference without the power, which shows every other time only."""
    rng, sizes, shown = np.random.default_rng(1), [], 0
    for freedom in (2, 199):  # where one part alone varies, exactly
        ends = stats.nct.cdf(stats.t.ppf(0.975, freedom), freedom, _shown(freedom))
        assert ends == pytest.approx(0.2)
    for _ in range(300):
        sizes.append(estimate(drawn(rng, 3, 200, 0, 0.3, 0.3)).detectable)
    for _ in range(300):
        found = estimate(np.mean(sizes) + drawn(rng, 3, 200, 0, 0.3, 0.3))
        shown += found.low > 0
    assert 0.74 <= shown / 300 <= 0.9


def test_the_verdict_follows_the_rule():
    """Bug: a claim is confirmed although a seed speaks against it, by one seed alone, or by an
    interval that reaches 0; what is too uncertain to tell counts as not seen, or its opposite as
    shown."""
    steady = np.full((3, 40), 0.1)
    assert verdict(steady) == "confirmed"
    assert verdict(-steady) == OPPOSITE
    assert verdict(steady * 0.05) == "confirmed"  # small, and without doubt
    assert verdict(steady[:1]) == "undecided"
    jitter = np.tile([0.02, -0.02], (3, 20))
    assert verdict(jitter * 0.2) == "not seen"  # within a point of 0
    assert verdict(jitter * 0.2 - 1e-4) == "not seen"  # and on both sides of it
    assert verdict(jitter * 0.2, 0.0) == "undecided"  # of nats no difference is none worth naming
    assert verdict(jitter * 0.02 - 0.01, 0.0) == OPPOSITE
    assert verdict(jitter * 20) == "undecided"
    likely = np.tile([0.5, -0.4], (3, 20))  # every seed's mean is above 0, the interval is not
    assert verdict(likely) == "undecided" and estimate(likely).low < 0 < likely.mean()
    against = steady + np.array([[0.0], [0.0], [-0.101]])
    many = np.concatenate([np.full((20, 40), 0.1), np.full((1, 40), -0.001)])
    assert verdict(against) == "undecided" and estimate(many).low > 0
    assert verdict(many) == "undecided"
    assert estimate(-many).high < 0 and verdict(-many) == "not seen"


def test_a_difference_of_differences_pairs_seeds_and_not_questions():
    """Bugs: seeds that differ count as if each set had seeds of its own, or questions of unlike
    sets as paired; the other set is larger, and the first is said to be."""
    rng, inside = np.random.default_rng(2), 0
    for _ in range(400):
        seed = 0.3 * rng.standard_normal((3, 1))  # alike in both sets
        first = seed + 0.2 + drawn(rng, 3, 60, 0.05, 0.3, 0.3)
        found = between(first, seed + drawn(rng, 3, 90, 0.05, 0.3, 0.3))
        inside += found.low <= 0.2 <= found.high
    assert inside >= 371 and found.high - found.low < 0.8
    assert (found.seeds, found.items, len(found.by_seed)) == (3, 150, 3)
    given = lambda far, near: {
        "far": {"corpus/correct": dict.fromkeys("abc", far)},
        "near": {"corpus/correct": dict.fromkeys("de", near)},
    }
    runs = {"C": [given(0.9, 0.5), given(0.7, 0.5)], "N": [given(0.1, 0.4), given(0.1, 0.4)]}
    text = "C > N: corpus/correct; N > C: -corpus/correct; N > C: corpus/correct"
    rows = results.between_rows(runs, results.claims_of(text, runs), KINDS)
    assert [row["set"] for row in rows] == ["far - near"] * 3
    assert rows[0]["by_seed"] == pytest.approx([0.7, 0.5])
    assert rows[0]["mean"] == pytest.approx(0.6) == -rows[2]["mean"]
    far, near = np.log(5.3 / 1.7) - np.log(1.1 / 5.9), np.log(2.5 / 2.5) - np.log(2.1 / 2.9)
    assert rows[0]["log_odds"] == pytest.approx(far - near)
    assert [row["verdict"] for row in rows] == ["undecided"] * 3
    runs = {"C": [given(0.9, 0.5)] * 2, "N": [given(0.1, 0.4)] * 2}
    rows = results.between_rows(runs, results.claims_of(text, runs), KINDS)
    assert [row["verdict"] for row in rows] == ["confirmed", "confirmed", OPPOSITE]
    ends = {arm: [given(0.0, 1.0)] * 2 for arm in "CN"}
    in_one = {arm: [given(far, 0.0)] * 2 for arm, far in (("C", 0.9), ("N", 0.1))}
    for mute in (ends, in_one):  # nobody can do it in both sets, or in one
        rows = results.between_rows(mute, results.claims_of(text, mute), KINDS)
        assert {row["verdict"] for row in rows} == {"undecided"}


def scores(**items):
    return {"world.in_domain": {"corpus/correct": items}}


def test_claims_are_tested_on_the_questions_all_runs_answered():
    """Bug: arms compared on different questions, or seeds paired crosswise."""
    runs = {
        "C": [scores(a=1.0, b=1.0, c=1.0), scores(a=1.0, b=0.0, c=1.0), scores(a=0.0, b=0.0)],
        "N": [scores(a=0.0, b=1.0), scores(a=1.0, b=0.0, d=1.0)],
    }
    (claim,) = results.claims_of("C > N: corpus/correct", runs)
    (row,) = results.claim_rows(runs, [claim], KINDS)
    assert (row["items"], row["seeds"], row["by_seed"]) == (2, 2, [0.5, 0.0])
    assert row["set"] == "world.in_domain" and row["mean"] == 0.25
    c, n = results.arm_rows(runs, KINDS)
    assert (c["arm"], c["seeds"], c["by_seed"]) == ("C", 3, [1.0, 2 / 3, 0.0])
    assert (n["arm"], n["items"], n["scores"]) == ("N", 3, 5)


def test_a_claim_may_say_that_a_number_is_smaller():
    """Bug: fewer nats, which is better, count against the claim."""
    runs = {
        "C": [scores(a=1.0, b=1.1), scores(a=1.0, b=1.1)],
        "N": [scores(a=2.0, b=2.1), scores(a=2.0, b=2.1)],
    }
    claims = results.claims_of("C > N: -corpus/correct; N > C: -corpus/correct", runs)
    found = results.claim_rows(runs, claims, {"corpus/correct": NUMBER})
    assert [row["verdict"] for row in found] == ["confirmed", OPPOSITE]
    assert found[0]["mean"] == -1 and found[0]["claim"] == "C < N: corpus/correct"


def test_a_metric_less_another_is_taken_item_by_item():
    """Bugs: a difference of means over different questions; a verdict where nobody answers with
    either passage; an unknown metric behind the minus; of nats a point that is as good as none."""
    given = lambda right, wrong: {"w": {"gold/correct": right, "wrong/correct": wrong}}
    runs = {
        "C": [given({"a": 1.0, "b": 1.0, "c": 0.0}, {"a": 0.0, "b": 1.0})] * 2,
        "N": [given({"a": 0.0, "b": 1.0}, {"a": 0.0, "b": 1.0, "c": 1.0})] * 2,
    }
    metric = "gold/correct - wrong/correct"
    (claim,) = results.claims_of(f"C > N: {metric}", runs)
    assert claim.metric == metric and not claim.below
    (row,) = results.claim_rows(runs, [claim], {metric: POINTS})
    assert (row["items"], row["by_seed"], row["log_odds"]) == (2, [0.5, 0.5], None)
    (c, n) = results.arm_rows(runs, {metric: POINTS})
    assert (c["mean"], n["mean"]) == (0.5, 0.0)
    half = {"a": 1.0, "b": 0.0}  # right for some, whatever they are given
    runs = {arm: [given(half, half)] * 2 for arm in "CN"}
    (row,) = results.claim_rows(runs, [claim], {metric: POINTS})
    assert row["verdict"] == "undecided" and row["mean"] == 0
    less, more = ({f"q{i}": float(i < right) for i in range(1000)} for right in (500, 508))
    runs = {"C": [given(more, less)] * 2, "N": [given(less, more)] * 2}  # one way and the other
    (row,) = results.claim_rows(runs, [claim], {metric: POINTS})
    assert row["verdict"] == "confirmed" and row["mean"] == 0.016
    runs = {"C": [given(half, dict.fromkeys("ab", 0.0))] * 2, "N": [given(half, half)] * 2}
    (row,) = results.claim_rows(runs, [claim], {metric: POINTS})
    assert row["mean"] == 0.5
    runs = {arm: [given(dict.fromkeys("ab", 0.0), dict.fromkeys("ab", 0.0))] * 2 for arm in "CN"}
    (row,) = results.claim_rows(runs, [claim], {metric: POINTS})
    assert row["verdict"] == "undecided"
    always, never = dict.fromkeys("ab", 1.0), dict.fromkeys("ab", 0.0)
    runs = {arm: [given(always, never)] * 2 for arm in "CN"}
    (row,) = results.claim_rows(runs, [claim], {metric: POINTS})
    assert row["verdict"] == "undecided" and row["detectable"] is None
    kind = functools.partial(measures.kind_of, config=Config(), asked=["answers", "training"])
    assert kind(metric) == POINTS and kind("gold/correct - ntp_nats_per_token") == NUMBER
    assert kind("gold/correct - wrong/corect") is None
    with pytest.raises(UserError, match="'wrong/corect' is given by none"):
        measures.kinds("here", ["gold/correct - wrong/corect"], Config(), ["answers"])
    with pytest.raises(UserError, match="; a difference takes two metrics"):
        measures.kinds("here", [f"{metric} - none/correct"], Config(), ["answers"])
    assert results.claims_of("C > N: - distance", runs)[0].metric == "distance"


def test_what_nobody_can_answer_tells_nothing():
    """Bug: two arms that answer nothing right, or everything, count as shown to be alike."""
    zero, one = scores(a=0.0, b=0.0), scores(a=1.0, b=1.0)
    for same in (zero, one):
        runs = {"C": [same, same], "N": [same, same]}
        (row,) = results.claim_rows(runs, results.claims_of("C > N: corpus/correct", runs), KINDS)
        assert row["verdict"] == "undecided" and row["detectable"] is None
    runs = {"C": [one, one], "N": [zero, zero]}
    (row,) = results.claim_rows(runs, results.claims_of("C > N: corpus/correct", runs), KINDS)
    assert row["verdict"] == "confirmed"


TWO, BOTH = "C > N: recall, N > C: recall", "C < N: -recall"  # a ; is missing; < and -


@pytest.mark.parametrize("text", ["C beats N", "C > X: recall", "C > N", "C>N: recall", TWO, BOTH])
def test_a_claim_that_cannot_be_read_is_refused(text):
    """Bug: a typing error makes a claim vanish from the study."""
    with pytest.raises(UserError, match=r"config\.study\.claims"):
        results.claims_of(text, ["C", "N"])


def test_a_claim_can_be_copied_from_a_page():
    """Bug: a page says "C < N", and a study refuses it; a pair is said to be missing in arms."""
    (written,) = results.claims_of("C > N: -nats", ["C", "N"])
    assert str(written) == "C < N: nats"
    assert results.claims_of(str(written), ["C", "N"]) == [written]
    with pytest.raises(
        UserError, match=r"'C\|N' is no arm of C, N; add it to config.study.crossed"
    ):
        results.claims_of("C > C|N: recall", ["C", "N"])


def test_a_claim_of_a_metric_that_was_not_measured_is_named():
    """Bug: a typing error in a metric makes the claim vanish from the study."""
    runs = {"C": [scores(a=1.0)] * 2, "N": [scores(a=1.0)] * 2}
    claims = results.claims_of("C > N: corpus/correct, corpus/corect", runs)
    rows = results.claim_rows(runs, claims, KINDS)
    assert results.untested(rows, claims) == ["C > N: corpus/corect"]


def a_study():
    """As study.json has it, two arms and two claims."""
    rng = np.random.default_rng(0)
    draw = lambda p: {f"q{i}": float(rng.random() < p) for i in range(50)}
    one = lambda p, far: {
        "world.in_domain": {"corpus/correct": draw(p), "corpus/recall@1": draw(p)},
        "": {"distance": {"": far}, "drift/to_last/step_1": draw(0.5), PAIRS: draw(0.5)},
    }
    runs = {"C": [one(0.9, 2.0), one(0.8, 3.0)], "N|C": [one(0.2, 1.0), one(0.1, 1.5)]}
    text = (
        "C > N|C: corpus/correct, -distance; N|C > C: corpus/correct; C > N|C: drift/to_last/step_1"
    )
    claims = results.claims_of(text, runs)
    run = {"steps": 200, "parameters": 4_818_816, "flops": 1.5e15, "examples": 11_008}
    place = {"directory": "arms/0123", "command": "python -m x --config=a.py:C"}
    return {
        "name": "core",
        "question": "Is <C> better?",
        "state": "finished",
        "date": "2030-01-01",
        "measured_by_code": ["3fa9c1d2"],
        "measured_on": ["1 x cpu, jax 1"],
        "command": "python -m x --mode=study",
        "arms": ["N", *runs],
        "settings": {"N": {"loss.nsp_weight": 0.0}, "C": {}},
        "claims": results.claim_rows(runs, claims, KINDS),
        "between": [],
        "matrix": results.matrix_rows(runs, ["N", "C"]),
        "planes": [],
        "agreement": results.agreement_rows(runs),
        "matched": {"N@C": ["N", "N_3"]},
        "untested": ["N|C > C: corpus/corect"],
        "measured": results.arm_rows(runs, KINDS),
        "runs": [{"arm": "C", "seed": 0, **run, **place}],
    }


def test_the_page_and_the_markdown_say_what_the_study_found():
    """Bug: a column is missing or shifted; `|` in an arm's name breaks the table; text is taken for
    HTML; a number that is no share is drawn as one."""
    study = a_study()
    assert page.RUNS_NOTE not in page.markdown(study)
    study["runs"][0]["command"] += " --config.gen.init=runs/arms/0/export/gen"
    lines = page.markdown(study).splitlines()
    assert page.RUNS_NOTE in lines
    assert "- **C > N|C: corpus/correct**: confirmed in world.in_domain" in lines
    told = "not seen, the opposite holds in world.in_domain"
    assert f"- **N|C > C: corpus/correct**: {told}" in lines
    bars = lambda line: line.replace("\\|", "").count("|")
    for is_table, rows in itertools.groupby(lines, lambda line: line.startswith("|")):
        assert not is_table or len(set(map(bars, rows))) == 1
    assert any(
        line.startswith("| C > N\\|C: corpus/correct | world.in_domain | confirmed | +")
        for line in lines
    )
    (row,) = (r for r in study["measured"] if (r["arm"], r["metric"]) == ("C", "corpus/correct"))
    told = f"| C | {row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f}"
    seeds = ", ".join(f"{value:.3f}" for value in row["by_seed"])
    assert any(line.startswith(f"{told}; {seeds}) |") for line in lines)
    at = lines.index("| generator | C |")
    assert lines[at + 3].startswith(f"{told}) |") and lines[at + 2].startswith("| N | 0.")
    assert any(
        "`python -m x --config=a.py:C --config.gen" in line and "| 1,500.0 |" in line
        for line in lines
    )
    assert "- **N|C > C: corpus/corect**: not tested: a run" in page.markdown(study)
    assert "`python -m x --mode=study`" in lines
    (agreed, _), told = study["agreement"], f"{study['agreement'][0]['by_pair'][0]:.3f}"
    assert agreed["arm"] == "C" and f"| C | {told} | {told} | 50 |" in lines
    matched = "N@C has no run: it is read, question by question, off the curve of N, N_3, where"
    assert any(line.startswith(matched) for line in lines)
    html = page.page(study)
    assert f"<p class='note'>{matched}" in html
    assert "Is &lt;C&gt; better?" in html and html.count("<svg") >= 2
    assert "corpus/recall@1 <span" in html and "distance <span" not in html
    assert "drift/to_last/step_1" in html and "drift/to_last/step_1 <span" not in html
    assert "N|C &gt; C: corpus/corect" in html and "python -m x --mode=study" in html
    assert "| N | loss.nsp_weight=0.0 |" in lines and "| C | as the study's config |" in lines
    assert '<td class="left">loss.nsp_weight=0.0</td>' in html
    assert page.STARTS_NOTE not in page.markdown(study) and "A|B is A&#x27;s Gen" in html
    study["settings"]["C"] = {"gen.init": "start:a (b)"}
    study["arms"].remove("N|C")
    assert "gen.init=&#x27;start:a (b)&#x27;" in page.page(study)
    assert page.STARTS_NOTE in page.markdown(study) and page.PAIRS_NOTE not in page.markdown(study)
    matrix = html.partition("<section><h3>world.in_domain</h3>")[2].partition("</section>")[0]
    interval = f"<small>{row['low']:.3f} to {row['high']:.3f}</small>"
    assert f"{row['mean']:.3f}<br>{interval}" in matrix
    assert page.closing(study).count("\n") == 6
    assert "\nN|C > C: corpus/corect: not tested: a run" in page.closing(study)


def test_the_page_says_what_an_interval_is_of():
    """Bugs: an end beyond 0, by which a claim is confirmed, is written as 0; a mean of few answers
    looks like one of all; claims between sets are computed and not shown; a seed without a score
    ends the page."""
    study = a_study()
    study["between"] = [study["claims"][0] | {"set": "near - far", "low": 2e-4, "high": -3e-4}]
    for text in (page.markdown(study), page.page(study)):
        assert page.BETWEEN in text and "near - far" in text and "+0.0002 to -0.0003" in text
    (row,) = (r for r in study["measured"] if (r["arm"], r["metric"]) == ("C", "corpus/correct"))
    row |= {"scores": 5, "by_seed": [None, 0.4], "low": 0.0}
    (cells,) = (c for c in page.arm_cells([row], ["C"])[1:])
    assert cells[1] == f"{row['mean']:.3f} (0.000 to {row['high']:.3f}; -, 0.400; of 5)"


def on_a_plane(shift):
    """A run's scores, as `plane` gives them."""
    axes = lambda kind, places: {
        f"plane/{kind}/{axis}": {id: place[i] + shift for id, place in places.items()}
        for i, axis in enumerate("xy")
    }
    none = axes("passages", {"w/p": (0.11119, 0.2), "w/r": (0.3, -0.4)})
    none |= axes("vocabulary", {"7": (0.5, 0.6)})
    queries = axes("queries", {"q": (-0.7, 0.8)}), axes("queries", {"q": (-0.1, 0.9)})
    sets = dict(zip(("w.a", "w.b"), queries, strict=True))
    return {"": none | {"plane/share": {"": 0.25 + shift}}} | sets


def test_planes_are_of_each_arm_s_first_seed():
    """Bugs: the points of all seeds, each with axes of its own, in one picture; two sets' queries
    as one; an arm or a pair that was not measured so ends the study; digits without end."""
    runs = {"N": [scores(a=1.0)], "C": [on_a_plane(0.0), on_a_plane(0.5)], "C|N": [scores(a=0.0)]}
    points = {
        "vocabulary": [[0.5, 0.6]],
        "passages": [[0.1112, 0.2], [0.3, -0.4]],
        "queries w.a": [[-0.7, 0.8]],
        "queries w.b": [[-0.1, 0.9]],
    }
    assert results.planes(runs) == [{"arm": "C", "points": points, "share": 0.25}]


def test_seeds_agree_as_far_as_their_passages_lie_alike():
    """Bugs: pairs matched by place and not by name; a seed compared with itself; a space in which
    all lies in one point, which agrees with nothing, ends the study."""
    pairs = [f"p{i} p{i + 1}" for i in range(6)]
    one = lambda values, names=pairs: {"": {PAIRS: dict(zip(names, values, strict=True))}}
    rising, wave = np.arange(6.0), np.array([0.0, 2, 1, 0, 3, 1])
    runs = {
        "C": [one(rising), one(wave[::-1], pairs[::-1]), one(-rising)],
        "S": [one(np.full(6, 0.3)), one(rising)],
        "N": [one(rising)],
        "N|C": [{}, {}],
    }
    found = {row["arm"]: row["by_pair"] for row in results.agreement_rows(runs)}
    a, b = rising - rising.mean(), wave - wave.mean()
    r = a @ b / (a @ a * (b @ b)) ** 0.5
    assert found.keys() == {"C", "S"} and found["S"] == [None]
    assert found["C"] == pytest.approx([r, -1.0, -r])
    cells = page.agreement_cells(results.agreement_rows(runs))
    assert cells[1:] == [["C", "-0.333", f"{r:.3f}, -1.000, {-r:.3f}", "6"], ["S", "-", "-", "6"]]


def test_the_page_has_a_dot_for_each_point_of_a_plane():
    """Bugs: a point that is not drawn, or an arm's picture under another's name; a picture of
    nothing where nothing was measured; markdown that does not say where the pictures are."""
    study = a_study()
    assert page.PLANES not in page.page(study) + page.markdown(study)
    runs = {"C": [on_a_plane(0.0)], "N<": [on_a_plane(0.125)]}
    study["planes"] = results.planes(runs)
    html = page.page(study)
    section = html.partition(f"<h2>{page.PLANES}</h2>")[2].partition("<h2>")[0]
    found = re.findall("<figure>.*?</figure>", section, re.DOTALL)
    for figure, name, share in zip(found, ("C", "N&lt;"), ("25%", "38%"), strict=True):
        assert f"<figcaption>{name} <span" in figure and f">{share} of the variance" in figure
        assert [figure.count(f"series-{color}); fill-op") for color in range(1, 5)] == [1, 2, 1, 1]
        assert "<script" not in figure and not re.search(r"\b(nan|inf)\b", figure)
        assert all(f">{kind}</li>" in figure for kind in study["planes"][0]["points"])
    assert page.PLANES_NOTE in section and page.PLANES_PLACE in page.markdown(study).splitlines()


INTERVAL = r"([+-]?\d\.\d{3}) %s([+-]?\d\.\d{3}) to ([+-]?\d\.\d{3})"


RESULTS = Path(__file__).parent.parent / "docs/results"
ONE = r"[+-]?\d\.\d{3} \([+-]?\d\.\d{3} to [+-]?\d\.\d{3}\)"
ARMS = r"[\w.@|\\]+ [<>] [\w.@|\\]+"
# "C > N: +0.1 (...), -0.2 (...): undecided, *confirmed*", or so in the cells of a row.
JUDGED = rf"({ARMS})†?(?::| is| \||,)? ({ONE}(?:(?:, | \| ){ONE})*)(?:: |, | \| )([^.;|]*)"
ROW = rf"^\| ({ARMS}): [^|]+ \| [^|]+ \| ([^|]+) \| " + INTERVAL % r"\| "
OF_NO_PAGE = {"0.515", "0.016"}  # of a tower before its first step; chance, among 60


def _blocks(told):
    """Each paragraph, list item and row of a table, and the pages of results that it links to; a
    row without links has those of the paragraph before its table. Of a row that links to two, the
    cells of a scale with the page of that scale."""
    before = ()
    linked = lambda text: re.findall(r"\]\((?:docs/results/)?((?!README|method)[\w-]+\.md)", text)
    for part in re.split(r"\n\n|\n(?=- )", told):
        if not part.startswith("|"):
            before = linked(part)
            yield " ".join(part.split()), before
        for row in part.splitlines()[2:] if part.startswith("|") else ():
            cells = re.split(r" \| ", row)
            if len(pages := linked(row)) == 2 and len(cells) == 4:
                yield from zip(cells[1:3], ([page] for page in pages), strict=True)
            else:
                yield row, pages or before


def _judged(text):
    """{("C > N", mean, low, high): its verdicts} of all claims of a page."""
    found = {}
    for arms, verdict, *numbers in re.findall(ROW, text, re.MULTILINE):
        key = arms, *map(float, numbers)
        found.setdefault(key, set()).add(verdict.removeprefix("not seen, "))
    return found


@pytest.mark.parametrize("name", ["README.md", "docs/results/README.md"])
def test_the_numbers_told_are_on_the_pages_named(name):
    """Bug: a number, a difference with its interval, or a verdict, in the README or in the results'
    own, that no page beside it has: it was copied wrong, or the page was made anew."""
    told = (RESULTS.parents[1] / name).read_text()
    if name == "README.md":
        told = told.partition("### What they say so far")[2].partition("\n## ")[0]
    checked = verdicts = 0
    numbers = lambda text, before: {
        tuple(map(float, found)) for found in re.findall(INTERVAL % before, text)
    }
    for block, pages in _blocks(told):
        text = "".join((RESULTS / page).read_text() for page in pages)
        for number in set(re.findall(r"\d\.\d{3}", block)) - OF_NO_PAGE:
            assert number in text, (number, block)
        there = numbers(text, r"\| ") | numbers(text, r"\(")
        assert numbers(block, r"\(") <= there, (numbers(block, r"\(") - there, block)
        checked += len(numbers(block, r"\("))
        judged = _judged(text)
        for arms, differences, words in re.findall(JUDGED, block):
            found = re.findall("undecided|confirmed|not seen|the opposite holds", words)
            each = [tuple(map(float, one)) for one in re.findall(INTERVAL % r"\(", differences)]
            told = found * len(each) if len(found) == 1 else found
            for key, verdict in zip(each, told, strict=True) if found else ():
                assert verdict in judged[arms, *key], (arms, key, verdict)
                verdicts += 1
    assert checked > 40 and verdicts > 30


@pytest.mark.parametrize("page", sorted(RESULTS.glob("*.md")), ids=lambda page: page.stem)
def test_a_page_of_results_is_whole(page):
    """Bugs: a page that an older version has left; a claim's ">" that begins a line of a paragraph,
    which is then a quotation."""
    text = page.read_text()
    assert page.stem in ("README", "method") or "\n## Arms\n" in text
    assert not re.search("^> ", text, re.MULTILINE)


def test_a_study_that_has_just_begun_says_so():
    """Bug: a heading with an empty table below it."""
    for untested, told in ((["C > N: corpus/correct"], page.NO_CLAIMS), ([], page.NO_CLAIM)):
        study = a_study() | {"claims": [], "untested": untested}
        assert f"## Claims\n\n{told}\n\n## " in page.markdown(study)
        assert told in page.page(study) and "<th>claim" not in page.page(study)
        assert page.closing(study).startswith(told) and "verdict" not in page.closing(study)


def test_rows_stand_in_the_order_of_the_study():
    """Bugs: an arm that lacks the first metric falls behind those that have it; the one item of a
    mean over a set stands for the questions of the others."""
    distance = {"distance": {"": 1.0}}
    both = {"corpus/correct": {"a": 1.0, "b": 0.0}} | distance
    runs = {"N": [{"w": distance}] * 2, "C": [{"w": both}]}
    cells = page.arm_cells(results.arm_rows(runs, KINDS), ["Q", *runs])
    assert [(row[0], *row[-2:]) for row in cells[1:]] == [("N", "2", "1"), ("C", "1", "2")]
    assert cells[0][1:3] == ["corpus/correct", "distance"]


def test_no_difference_of_nats_is_as_good_as_none():
    """Bug: a loss that is some thousandths of a nat larger or smaller is "not seen", by a margin
    that was made for shares and their differences."""
    kinds = {"corpus/correct": SHARE, "slope/retrieval_hit": POINTS, "distance": NUMBER}
    runs = {
        arm: [{"w": {metric: {"a": 0.5, "b": b} for metric in kinds}}] * 3
        for arm, b in (("C", 0.5004), ("N", 0.5))
    }
    claims = results.claims_of(f"C > N: {', '.join(kinds)}", runs)
    rows = results.claim_rows(runs, claims, kinds)
    assert [row["verdict"] for row in rows] == ["not seen", "not seen", "undecided"]


def test_the_matrix_is_of_who_writes_and_where_the_passage_comes_from():
    """Bugs: a pair in its writer's column; the writer's recall beside another's retrieval; a row of
    an arm that never learned to write; arms in another order than the study's."""

    def runs_of(correct, hit=None, **more):
        shares = {"corpus/correct": correct, "corpus/retrieval_hit": hit}
        shares |= {name.replace("_", "/", 1): value for name, value in more.items()}
        return [{"w": {name: dict.fromkeys("ab", v) for name, v in shares.items() if v}}] * 2

    runs = {
        "S2": runs_of(0.01, 0.6, gold_correct=0.02, bm25_retrieval_hit=0.5),
        "S": runs_of(0.01, 0.7),
        "N": runs_of(0.1, 0.05, bm25_correct=0.14, bm25_retrieval_hit=0.97, majority_correct=0.3),
        "C": runs_of(0.2, 0.8, gold_correct=0.25, majority_correct=0.4),
        "C|S2": runs_of(0.22, 0.61),
        "N|C": runs_of(0.12, 0.81),
        "N|S2": runs_of(0.11, 0.62),
    }
    rows = results.matrix_rows(runs, ["N", "C"])
    cells = page.matrix_cells(rows, list(runs))
    assert [[cell.partition(" (")[0] for cell in row] for row in cells] == [
        ["generator", "S2", "N", "C", "BM25", "gold passage", "no retrieval"],
        ["N", "0.110", "0.100", "0.120", "0.140", "-", "-"],
        ["C", "0.220", "-", "0.200", "-", "0.250", "-"],
        ["majority", "-", "-", "-", "-", "-", "0.300"],
        ["retrieval_hit", "0.600", "0.050", "0.800", "0.970", "-", "-"],
    ]
    assert (rows[0]["set"], rows[0]["seeds"], rows[0]["items"]) == ("w", 2, 2)
    assert results.matrix_rows({"S": runs["S"]}, []) == []


def test_an_interval_of_a_share_ends_where_shares_do():
    """Bug: "0.81 (-0.34 to 1.96)" of a share; or an interval of nats that is cut off at 1."""
    rows = {(r["arm"], r["metric"]): r for r in a_study()["measured"]}
    assert (rows["C", "corpus/correct"]["low"], rows["C", "corpus/correct"]["high"]) == (0.0, 1.0)
    runs = {"C": [scores(a=1.0, b=1.0)] * 2, "N": [scores(a=0.0, b=0.0), scores(a=1.0, b=0.0)]}
    (row,) = results.claim_rows(runs, results.claims_of("C > N: corpus/correct", runs), KINDS)
    assert (row["low"], row["high"]) == (-1.0, 1.0)
    given = lambda gold, wrong: {"w": {"gold/correct": {"a": gold}, "wrong/correct": {"a": wrong}}}
    metric, slope = "gold/correct - wrong/correct", {"w": {"slope/retrieval_hit": {"": 1.5}}}
    runs = {"C": [given(1, 0), given(1, 0.2)], "N": [given(0, 1), given(0.2, 1)]}
    (row,) = results.claim_rows(runs, results.claims_of(f"C > N: {metric}", runs), {metric: POINTS})
    assert row["low"] < 1 < row["mean"] < row["high"] == 2
    (row,) = results.arm_rows({"C": [slope] * 2}, {"slope/retrieval_hit": POINTS})
    assert row["low"] == row["mean"] == row["high"] == 1.5
    assert rows["C", "distance"]["low"] < 0 and rows["C", "distance"]["high"] > 1


def test_log_odds_are_those_of_the_means():
    """Bug: a log-odds ratio upside down, or one of a number that is no share, or no count."""
    correct, smaller, other, cosine = a_study()["claims"]
    by_hand = lambda share, n: np.log((share * n + 0.5) / (n - share * n + 0.5))
    c, n = (r["mean"] for r in a_study()["measured"] if r["metric"] == "corpus/correct")
    assert correct["log_odds"] == pytest.approx(by_hand(c, 100) - by_hand(n, 100))
    assert other["log_odds"] == -correct["log_odds"] and smaller["log_odds"] is None
    assert cosine["log_odds"] is None  # though all values lie in 0 to 1
    runs = {arm: [{"w": {"corpus/recall@1": {"": 0.5}}}] * 2 for arm in "CN"}
    claims = results.claims_of("C > N: corpus/recall@1", runs)
    (whole,) = results.claim_rows(runs, claims, KINDS)
    assert whole["items"] == 1 and whole["log_odds"] is None
