"""What a study measures of each finished run."""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from cosup_jax import assemble, evaluate, held_out, optim
from cosup_jax.answer import asked, records
from cosup_jax.answer.records import Record
from cosup_jax.config import ARMS, Config
from cosup_jax.data.plan import Plan, left_out
from cosup_jax.errors import UserError
from cosup_jax.evaluation import nli, scoring
from cosup_jax.rehearsal import model_flops
from cosup_jax.runtime import telemetry
from cosup_jax.studies import evidence, geometry, gradients, plane, spaces
from cosup_jax.studies.equal_ratio import AT_START
from cosup_jax.studies.run import LESS, NUMBER, POINTS, POSITIVE, SHARE, Gives, Run, Scores, whole

_SCORE = (  # all that `scoring.scored` may find, by a judge of some prefix, and `correct`
    r"correct|(KILT-)?(accuracy|em|f1|rougel)|acc_substring|rougeLsum|str_em"
    r"|Rprec|(precision|answer_in_context)@(1|5|10)|(recall|success_rate)@(5|10)"
    r"|retrieval_hit|retrieval_precision|{prefix}(citation_rec|citation_prec|grounding)"
)


# Of the corpora that an arm searches, those through whose recall a line is laid.
_SLOPES = {"slope": r"corpus(_\d+)?", "slope_hard": rf"corpus|{asked.HARD}\d+"}


def answers(run: Run, folder: str = "evaluation") -> Scores:
    """All that --mode=evaluate scores, as `ARM/SCORE`: `corpus/retrieval_hit`, `gold/correct`, ...

    Beside these corpus_NAME/SCORE, of the questions of which training reads the evidence (NAME is
    seen) or not (unseen), and of those that need one passage (one) or more (several);
    corpus_hit/correct and corpus_miss/correct, of those for which retrieval succeeded or failed,
    which are others in each run; slope/retrieval_hit, of the line through a question's over log10
    of the passages searched, and slope_hard/retrieval_hit where those are the ones that BM25 ranks
    best.

    Written to WORKDIR/evaluation, or another folder of the run's.
    """
    config = run.trained.config
    judge = nli.judge_named(config.eval.judge)
    summary = evaluate.Evaluation(run.trained, judge, run.workdir, folder).summary()
    found = {}
    for part in summary["sets"]:
        files, names = run.workdir / folder / part["name"], [arm["arm"] for arm in part["arms"]]
        answered = {name: records.read(files / f"{name}.jsonl") for name in names}
        searched = {arm["arm"]: arm["passages"] for arm in part["arms"]}
        found[part["name"]] = of_set(answered, searched)
    return found


def of_set(
    answered: Mapping[str, Sequence[Record]], passages: Mapping[str, int | None]
) -> dict[str, dict[str, float]]:
    """The metrics of `answers`, from the records of each arm and how many passages it searched."""
    found: dict[str, dict[str, float]] = {}
    for arm, own in answered.items():
        for record in own:
            scores = dict(record["scores"])
            if record["correct"] is not None:
                scores["correct"] = record["correct"]
            names = [arm]
            if arm == "corpus" and record["seen"] is not None:  # it asks for passages
                names.append("corpus_seen" if record["seen"] else "corpus_unseen")
                names.append("corpus_one" if len(record["evidence"]) == 1 else "corpus_several")
            for name, (score, value) in itertools.product(names, scores.items()):
                found.setdefault(f"{name}/{score}", {})[record["id"]] = float(value)
    hits, right = (found.get(f"corpus/{name}", {}) for name in ("retrieval_hit", "correct"))
    for name, hit in (("hit", 1.0), ("miss", 0.0)):
        if values := {id: right[id] for id in right if hits.get(id) == hit}:
            found[f"corpus_{name}/correct"] = values
    for slope, pattern in _SLOPES.items():
        searched = {
            arm: count
            for arm, count in passages.items()
            if count and re.fullmatch(pattern, arm) and f"{arm}/retrieval_hit" in found
        }
        if len(set(searched.values())) > 1:
            of_arms = [found[f"{arm}/retrieval_hit"] for arm in searched]
            ids = [id for id in of_arms[0] if all(id in one for one in of_arms)]
            hits_AxQ = [[one[id] for id in ids] for one in of_arms]
            along_Q = np.polyfit(np.log10([*searched.values()]), hits_AxQ, 1)[0]
            found[f"{slope}/retrieval_hit"] = dict(zip(ids, along_Q.tolist(), strict=True))
    return found


def _answers_give(config: Config) -> Gives:
    arms, score = config.eval.arm_names, _SCORE.format(prefix=nli.prefix_of(config.eval.judge))
    if "corpus" in arms:
        parts = ("seen", "unseen", "one", "several", *map(str, config.eval.sizes))
        arms = [*arms, *(f"corpus_{part}" for part in parts)]
        arms += [f"{asked.HARD}{size}" for size in config.eval.hard_sizes]
    found = {rf"({'|'.join(arms)})/({score})": SHARE}
    if "corpus" in arms:
        found |= {r"corpus_(hit|miss)/correct": SHARE, r"slope(_hard)?/retrieval_hit": POINTS}
    return found


def majority(run: Run) -> Scores:
    """`majority/correct` of each question that `answers` asks: is the most frequent answer right?

    No model is asked; see `evaluate.majority`.
    """
    trained, found = run.trained, {}
    given = (trained.data.held_out, trained.tokenizers, trained.config, run.workdir / "data")
    unread = left_out(run.store, trained.config)
    for part in held_out.asked_sets(*given, run.store, unread):
        facts = [asked.about(part, question) for question in range(len(part.examples))]
        if any(fact["answers"] for fact in facts):
            correct = scoring.judged_by(part.split_sample())
            said = [(r["id"], r["scores"]) for r in evaluate.majority(part, facts)[1]]
            right = {id: scores[correct] for id, scores in said if correct in scores}
            found[part.name] = {"majority/correct": right}
    return found


def training(run: Run) -> Scores:
    """What training itself has logged: of each set the last held-out `ntp_nats_per_token`,
    `recall_at_1`, ... over eval.examples questions; and `gradient_ratio/at_start`, as `gradients`
    has it, of the first batch, if log.probe_every_steps has it probed."""
    lines, name = telemetry.lines(run.workdir / "metrics.jsonl"), "grad/nsp_over_ntp_gen"
    probed = [line[name] for line in lines if line["step"] == 0 and line.get(name) is not None]
    found: Scores = {"": whole(**{AT_START: probed[0]})} if probed else {}
    for key, value in lines[-1].items():
        group, _, rest = key.partition("/")
        if group == "eval":
            held_out, _, metric = rest.rpartition("/")
            found.setdefault(held_out, {})[metric] = {"": value}
    return found


def _training_gives(config: Config) -> Gives:
    score = _SCORE.format(prefix=nli.prefix_of(config.eval.judge))
    return {
        r"ntp_nats_per_token": POSITIVE,
        **({AT_START: POSITIVE} if config.log.probe_every_steps else {}),
        r"(recall_at_1|recall_at_10|mrr_at_10)(_seen|_unseen)?|top1_in_batch": SHARE,
        rf"answers_({score})": SHARE,
    }


def facts(run: Run) -> dict[str, Any]:
    """How large the run was: {"steps", "parameters", "flops", "examples"}.

    FLOPs are those of `rehearsal.model_flops` for all steps; examples are counted as often as they
    were read.
    """
    trained, config = run.trained, run.trained.config
    plan = Plan(run.store, config)
    volumes = [plan.volume(step) for step in range(trained.step)]
    tx = optim.make(config, 1, 1)
    state = assemble.abstract_state(config, trained.towers, tx, trained.mesh)
    return {
        "steps": trained.step,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(trained.params)),
        "flops": trained.step * model_flops(config, trained.towers, state),
        "examples": sum(examples for _, examples in volumes),
    }


class Measure(NamedTuple):
    """What is measured of a run, and the metrics that it may give, by the study's config."""

    scores: Callable[[Run], Scores]
    gives: Callable[[Config], Gives]


MEASURES = {
    "answers": Measure(answers, _answers_give),
    "majority": Measure(majority, lambda _: {r"majority/correct": SHARE}),
    "training": Measure(training, _training_gives),
    "geometry": Measure(geometry.geometry, lambda _: geometry.GIVES),
    "spaces": Measure(spaces.spaces, lambda _: spaces.GIVES),
    "spaces_over_training": Measure(
        spaces.spaces_over_training, lambda _: spaces.OVER_TRAINING_GIVES
    ),
    "plane": Measure(plane.plane, lambda _: plane.GIVES),
    "evidence": Measure(evidence.evidence, lambda _: evidence.GIVES),
    "closed_book": Measure(evidence.closed_book, lambda _: evidence.CLOSED_BOOK_GIVES),
    "gradients": Measure(gradients.gradients, lambda _: gradients.GIVES),
}


def kind_of(metric: str, config: Config, asked: Iterable[str]) -> str | None:
    """As `run.Gives` has it, also of `"A - B"`; None of what none of these measures gives."""
    if LESS in metric:
        kinds = [kind_of(one, config, asked) for one in metric.split(LESS)]
        if len(kinds) > 2 or None in kinds:
            return None
        return POINTS if set(kinds) == {SHARE} else NUMBER
    for name in asked:
        for pattern, kind in MEASURES[name].gives(config).items():
            if re.fullmatch(pattern, metric):
                return kind
    return None


def kinds(
    where: str, metrics: Iterable[str], config: Config, asked: Sequence[str]
) -> dict[str, str]:
    """`kind_of` each. Raises UserError for a metric without one, named by `where` it stands."""
    found = {metric: kind_of(metric, config, asked) for metric in metrics}
    for metric, kind in found.items():
        if kind is None:
            missing = (one for one in metric.split(LESS) if not kind_of(one, config, asked))
            metric = next(missing, metric)
            others = [name for name in MEASURES if kind_of(metric, config, [name])]
            arm = metric.partition("/")[0]
            mend = "docs/results/method.md has a table of metrics"
            if metric.count(LESS) > 1:
                mend = "a difference takes two metrics"
            elif others:
                mend = f"add {others[0]} to config.study.measures"
            elif arm in ARMS and arm not in config.eval.arm_names:
                mend = f"config.eval.arms={config.eval.arms} lacks {arm}"
            raise UserError(
                f"{where}: {metric!r} is given by none of {', '.join(asked)} "
                f"(cosup_jax/studies); {mend}"
            )
    return found
