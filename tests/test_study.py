"""--mode=study: what is trained, what is shared, what is said of a mistake."""

import functools
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from declared import held_to_its_word

from cosup_jax import assemble, config_files, export, optim, study
from cosup_jax import main as main_lib
from cosup_jax.config import SHAPE, Config
from cosup_jax.config_files import File
from cosup_jax.dotted import differing, replace_dotted
from cosup_jax.errors import UserError
from cosup_jax.pretrained import resolve
from cosup_jax.runtime import processes
from cosup_jax.studies import arms, measures, page
from cosup_jax.studies import run as run_lib
from cosup_jax.studies.design import Design, of_pair
from cosup_jax.studies.scales import SCALES

ROOT = Path(__file__).parent.parent
STUDIES = sorted((ROOT / "configs/studies").glob("*.py"))
CROSSED = {"study.crossed": "N|C", "study.claims": ""}
CORE = str(ROOT / "configs/studies/core.py")


def asked(path=f"{CORE}:small", root="runs", **overrides):
    file = File(str(path), {name.replace("__", "."): v for name, v in overrides.items()})
    return Design.of(config_files.frozen(*file), Path(root), file)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_names_arms_measures_and_metrics_that_there_are(path):
    """Bug: a study that ends after hours of training with an arm or a measure that is none."""
    found = asked(path)
    assert found.config.study.question and found.claims
    assert {"answers", "majority"} <= set(found.measures)  # of which the matrix is made
    assert {writer for writer, _ in found.crossed} <= set(found.writers)
    docstring = path.read_text().partition('"""\n\n')[0]
    assert f"--config=configs/studies/{path.name}" in docstring
    page = f"docs/results/{path.stem}.md"
    assert (page if (ROOT / page).is_file() else "not run yet") in docstring
    assert found.config.study.question in docstring


OWN_DATA = {"data__train": "own.jsonl", "data__eval": "own.jsonl"}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_has_its_arms_and_steps_at_every_scale(path, scale):
    """Bug: an arm that a scale cannot train; a claim about a step of which no checkpoint is kept; a
    batch that is halved without twice the steps."""
    given = OWN_DATA if scale.startswith("smollm2") else {}
    found = asked(f"{path}:{scale}", **given)
    one = found.config
    every, last = one.checkpoint.every_steps, one.num_steps
    kept = {*range(every, last, every), last}
    assert len(kept) <= one.checkpoint.keep
    named = {*found.shown, *(claim.metric for claim in found.claims)}
    assert {int(name.partition("/step_")[2]) for name in named if "/step_" in name} <= kept
    for name in found.arms:
        arm = found.arm(name, 0).config
        assert arm.num_steps * arm.batch_size == one.num_steps * one.batch_size
        room = 3 if "mined/" in arm.data.train else 1  # for hard negatives
        assert arm.num_steps * arm.data.ctx_rows == room * one.num_steps * one.data.ctx_rows
        assert arm.bank.kind == "off" or 0 < arm.bank.start_step < arm.num_steps


def test_smollm2_is_trained_as_its_config_file_trains_it():
    """Bug: a learning rate, a dtype or a length of `world` for pretrained weights."""
    aside = ("data.train", "data.eval", "data.ctx_rows", "data.vocab_size", "loss.mask_evidence")
    aside += ("num_steps", "batch_size", "checkpoint.", "eval.", "generate.", "log.", "study.")
    for scale, variant in (("smollm2", ""), ("smollm2_cpu", ":laptop")):
        wanted = config_files.load(f"{ROOT}/configs/smollm2.py{variant}").to_dict()
        found = config_files.load(f"{CORE}:{scale}+C").to_dict()
        shape = [f"gen.arch.{name}" for name in SHAPE]
        unlike = [key for key in differing(wanted, found) if key not in shape]
        assert [key for key in unlike if not key.startswith(aside)] == []
    assert found["num_steps"] == wanted["num_steps"]
    with pytest.raises(
        UserError, match=r"config\.data\.train names no source; give --config\.data"
    ):
        asked(f"{CORE}:smollm2")


@pytest.mark.parametrize("scale", ["", "small"])
def test_a_random_ctx_is_another_gen(scale):
    """Bug: Ctx by random weights is of another size than the one it is compared with."""
    path = f"{ROOT}/configs/studies/ctx.py:{scale}"
    config = resolve(asked(path).arm("C_random_ctx", 0).config)
    shape = lambda tower: [getattr(getattr(config, tower).arch, name) for name in SHAPE]
    assert shape("gen") == shape("ctx") and config.ctx.init == "scratch"


@pytest.mark.parametrize(
    ("path", "arms"), [("ctx", "C_minilm"), ("negatives", "C_detached,C_full")]
)
def test_what_is_not_trained_by_default_can_be_asked_for(path, arms):
    """Bug: an arm that needs the hub, or that is no variant of C, in every run of a study; or one
    that no longer is a config."""
    path = f"{ROOT}/configs/studies/{path}.py"
    names = arms.split(",")
    assert not set(names) & set(asked(path).arms)
    for scale in ("", *SCALES):
        given = OWN_DATA if scale.startswith("smollm2") else {}
        assert asked(f"{path}:{scale}", study__arms=arms, **given).arms == names


def test_an_arm_is_shared_by_all_studies_that_name_it():
    """Bug: every study trains its own C; or two arms, or seeds, that differ share one run."""
    directories = {}
    for path in STUDIES:
        found = asked(path)
        for name in found.arms:
            directories.setdefault(name, set()).add(found.arm(name, 0).directory)
    assert all(len(places) == 1 for places in directories.values())
    assert len(set.union(*directories.values())) == len(directories)
    core = asked()
    assert core.arm("C", 0).directory != core.arm("C", 1).directory


def test_a_pair_is_answered_once_for_all_studies_that_name_it():
    """Bugs: a study of larger corpora has the answers of a pair in each of them; others have them
    anew, or from among passages that only it searches."""
    configs = [of_pair(asked(path).config) for path in STUDIES]
    told = {(config.eval, config.generate, config.index) for config in configs}
    assert {config.eval.arms for config in configs} == {"corpus"}
    assert sorted(config.eval.corpus for config in configs)[-2:] == ["", "tfds:world/30000"]
    assert len(told) == 2


def test_what_a_model_does_not_depend_on_does_not_train_it_anew():
    """Bug: another number of questions to evaluate, and hours of training begin again; or another
    learning rate, and they do not."""
    place = lambda **keys: asked(**keys).arm("C", 0).directory
    same = {"eval.questions": "7", "generate.max_tokens": "9", "log.every_steps": "1"}
    assert place() == place(**same) == place(study__seeds="5")
    assert place() != place(optim__gen_learning_rate="1e-3")
    assert place() != place(data__world_entities="200")


@pytest.mark.parametrize(
    ("path", "key", "value", "arm"),
    [
        (CORE, "loss.nsp_weight", "0.5", "N"),
        (CORE, "tie_ctx_to_gen", "true", "S"),
        (f"{ROOT}/configs/studies/weight.py", "data.train", "tfds:world", "stage0"),
    ],
)
def test_an_override_that_would_undo_an_arm_is_refused(path, key, value, arm):
    """Bug: N trains NSP after all, as C does, in C's very run, and C's gain is "not seen"; stage 0
    learns the questions instead of the passages."""
    with pytest.raises(UserError, match=f"--config.{key} would undo what arm {arm} consists in"):
        asked(path, **{key: value})
    asked(path, data__max_gen_tokens="200")


def test_a_run_that_diverged_is_named(tmp_path):
    """Bug: hours of training end in a traceback of the JSON encoder, and in half a file."""
    arm = asked(root=tmp_path).arm("C", 0)
    with pytest.raises(UserError, match="C, seed 0: geometry is not finite: the run has diverged"):
        study._kept(arm, "geometry", lambda: {"w": {"alignment": {"": float("nan")}}})
    assert not list(tmp_path.rglob("geometry*"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_whoever_retrieves_is_a_column_of_the_matrix(path):
    """Bug: an arm that retrieves and does not write is in no pair, so that the matrix says nothing
    of it, and a page does not say so."""
    found = asked(path)
    answered = {retriever for _, retriever in found.crossed} | set(found.writers)
    assert set(found.arms) <= answered


def test_an_arm_named_twice_is_one():
    """Bug: twice the seeds, of the same runs, and pairs of unlike seeds."""
    assert asked(study__arms="C,N,S2,C", study__crossed="C|N,C|N", study__claims="").arms == [
        *("C", "N", "S2")
    ]


OWN = """
from cosup_jax.studies import arms

def get_config(variant=""):
    own = {"C_same": {"loss.temperature": 0.1}, "C_warm": {"loss.temperature": 0.2}}
    told = {"question": "?", "arms": "C,C_same", "claims": "C > C_same: gold/correct"}
    return arms.config(variant, own, **told)
"""


def test_two_arms_that_are_one_run_are_refused(tmp_path):
    """Bug: an arm whose one difference is the default is compared with itself, and found to make no
    difference."""
    path = tmp_path / "own.py"
    path.write_text(OWN)
    with pytest.raises(UserError, match=r"arms: C_same has the settings of C, .* in .*own\.py"):
        asked(f"{path}:small")
    other = {"study__arms": "C,C_warm", "study__claims": "C > C_warm: gold/correct"}
    assert asked(f"{path}:small", **other).arms == ["C", "C_warm"]


def test_an_override_that_leaves_an_arm_nothing_is_named():
    """Bug: whoever weighs NSP with 0 for all arms is told what is wrong with S2, not by what."""
    with pytest.raises(UserError, match=r"arm S2, with --config\.loss\.nsp_weight: .* both 0"):
        asked(study__arms="S2,C", loss__nsp_weight="0")


def test_a_pair_that_was_moved_is_the_same(tmp_path, monkeypatch):
    """Bug: all pairs are answered anew where the studies' directory has another path; or answers by
    another run's pair are taken for these."""
    monkeypatch.setattr(measures, "answers", lambda run, name: {})
    monkeypatch.setattr(study, "opened", lambda config, directory: asked_by.append(config))
    monkeypatch.setattr(study, "Workdir", lambda *_, **__: SimpleNamespace(close=lambda: None))
    names, asked_by = [], []
    for root in (tmp_path / "a", tmp_path / "b"):
        design = asked(root=root)
        writer, *retrievers = (design.arm(name, 0) for name in ("C", "S2", "T"))
        for retriever in retrievers:
            study._Found(design).add_crossed(writer, retriever)
        assert [Path(c.generate.retriever) for c in asked_by] == [r.directory for r in retrievers]
        asked_by.clear()
        names.append(sorted(path.name for path in (writer.directory / "measured").iterdir()))
    assert names[0] == names[1] and len(names[0]) == 2


def measured(arm):
    """The names of what is measured of a run, as it was not measured before."""
    return study._kept(arm, "answers", lambda: {})["found"], sorted(
        path.name for path in (arm.directory / "measured").iterdir()
    )


def test_what_is_measured_is_measured_anew_where_its_settings_change(tmp_path):
    """Bug: answers by vectors of another dtype, or to other questions, are taken for these."""
    place = lambda **keys: asked(root=tmp_path, **keys).arm("C", 0)
    names = [
        measured(place(**keys))[1]
        for keys in (
            {},
            {},
            {"index.dtype": "int8"},
            {"eval.questions": "7"},
            {"log.every_steps": "1"},
        )
    ]
    assert [len(found) for found in names] == [1, 1, 2, 3, 3]


def test_a_page_names_the_machines_that_measured(tmp_path, monkeypatch):
    """Bug: what a GPU measured is published under the laptop that wrote the page last; measures of
    a version that did not note theirs end in a KeyError."""
    arm = asked(root=tmp_path).arm("C", 0)
    for name, machine in (("facts", "1 x a GPU"), ("answers", "1 x a TPU")):
        monkeypatch.setattr(study, "_machine", lambda machine=machine: machine)
        study._kept(arm, name, dict)
    monkeypatch.undo()
    (old,) = (arm.directory / "measured").glob("answers-*")

    def summary(*names):
        found = study._Found(asked(root=tmp_path))
        for name in names:
            found._kept(arm, name, dict)
        return found.summary()

    assert summary("facts", "answers")["measured_on"] == ["1 x a GPU", "1 x a TPU"]
    old.write_text(json.dumps({"code": "0", "found": {}}))
    assert summary("facts", "answers")["measured_on"] == ["1 x a GPU"]
    told = page.markdown(summary("facts", "training"))
    machine = study._machine()
    assert re.fullmatch(rf"8 x cpu( \(.+\))?, jax {jax.__version__}, flax [\d.]+", machine)
    assert f"1 x a GPU and {machine}" in told


def test_the_code_that_measured_is_a_commit_where_it_is_one(tmp_path, monkeypatch):
    """Bugs: a commit stands for files that were changed since, or that lie in somebody else's
    repository, as an environment below a project does; without git a study ends."""
    package = tmp_path / "cosup_jax"
    package.mkdir()
    (package / "study.py").write_text("")
    (tmp_path / ".gitignore").write_text(".venv\n")
    monkeypatch.setattr(study, "__file__", str(package / "study.py"))
    digest = f"{processes.code_digest()}, no commit"
    assert study._code() == digest

    def git(*told):
        who = ["-c", "user.name=n", "-c", "user.email=e"]
        command = ["git", "-C", str(tmp_path), *who, *told]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    assert study._code() == git("rev-parse", "HEAD")[:12]
    (package / "study.py").write_text("# changed\n")
    assert study._code() == digest
    git("commit", "-qam", "second")
    installed = tmp_path / ".venv/cosup_jax/study.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    monkeypatch.setattr(study, "__file__", str(installed))
    assert study._code() == digest
    monkeypatch.setenv("PATH", str(tmp_path))
    assert study._code() == digest


def test_a_study_may_have_a_name_of_its_own(tmp_path):
    """Bugs: the pages of other arms replace those of all; a name that is a path, or that of the
    runs, leaves the workdir or mixes with them; a name that trains all arms anew."""
    own, plain = asked(root=tmp_path, study__name="minilm"), asked(root=tmp_path)
    assert (own.directory, plain.directory) == (tmp_path / "minilm", tmp_path / "core-small")
    assert own.arm("C", 0).directory == plain.arm("C", 0).directory
    assert study._Found(own).summary()["name"] == "minilm"
    for name in ("arms", "../there", "a/b", ".."):
        with pytest.raises(UserError, match=r"study\.name="):
            asked(root=tmp_path, study__name=name)


def test_runs_of_unlike_data_are_not_compared(tmp_path):
    """Bug: a file changes between two arms, and what it makes is taken for theirs."""
    found = study._Found(asked(root=tmp_path))
    arms = [asked(root=tmp_path).arm(name, 0) for name in ("C", "N", "S")]
    for arm, data in zip(arms, ("world 1", "world 1", "world 2"), strict=True):
        path = arm.directory / "evaluation/training.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"facts": {"data": data}}))
    assert [found._data_of(arm) for arm in arms[:2]] == ["world 1", "world 1"]
    with pytest.raises(UserError, match="S, seed 0 was trained on world 2, and C, seed 0 on"):
        found._data_of(arms[2])


def test_the_command_of_a_run_is_one_that_a_shell_can_read(tmp_path, monkeypatch):
    """Bugs: `>` of a claim makes a file; a path of this machine in what is published; two studies'
    commands of one arm name one workdir, which is another study's then."""
    monkeypatch.chdir(tmp_path)
    keys = {"study.claims": "C_pre > C: alignment", "data.max_gen_tokens": "200"}
    weight = f"{ROOT}/configs/studies/weight.py:small"
    found = asked(weight, root=tmp_path / "runs", **keys)
    one = study._command(found.arm("C_pre", 1), found)
    start = found.arm("stage0", 0).directory.name
    assert shlex.split(one)[4:] == [
        "--config.data.max_gen_tokens=200",
        f"--config.gen.init=runs/arms/{start}/export/gen",
        "--config.seed=1",
        "--workdir=runs/again/weight-small-C_pre-1",
    ]
    whole = study._Found(found).summary()["command"]
    assert "'--config.study.claims=C_pre > C: alignment'" in whole
    assert whole.endswith("--mode=study --workdir=runs")


def test_a_study_whose_crossed_answers_are_missing_is_not_finished(tmp_path):
    """Bug: "finished" beside a matrix that lacks its last seed."""
    found = study._Found(asked(root=tmp_path, study__seeds="1", study__arms="N,C", **CROSSED))
    for name in ("N", "C"):
        found._scores[name].append({})
    assert found.summary()["state"] == "0 of 2 runs"
    found._scores["N|C"].append({})
    assert found.summary()["state"] == "finished"


def test_an_arm_s_settings_are_those_in_which_it_differs():
    """Bug: a page that calls an arm by a letter and nowhere says what it is, or lists what the
    scale or the command line sets for all of them."""
    found = asked(f"{ROOT}/configs/studies/weight.py:small", num_steps="7").file
    assert found.settings("C") == {} and found.settings("C_3") == {"loss.nsp_weight": 3.0}
    assert found.settings("S") == {"loss.ntp_weight": 0.0, "tie_ctx_to_gen": True}
    assert found.settings("C_pre") == arms.PRETRAINED


def test_a_run_that_starts_from_another_is_another_when_that_one_is(monkeypatch):
    """Bug: what stage 0 is trained on changes, and the arms that start from it do not; or its path,
    which differs on every machine, is in the key."""
    weight = f"{ROOT}/configs/studies/weight.py:small"
    place = lambda **keys: asked(weight, **keys).arm("C_pre", 0)
    first = place()
    start = first.config.gen.init.removesuffix("/export/gen")
    assert start == str(asked(weight).arm("stage0", 0).directory)
    assert first.config.gen.init.endswith("/export/gen")
    assert place(root="elsewhere").directory.name == first.directory.name
    other = arms.ARMS["stage0"] | {"optim.gen_learning_rate": 5e-4}
    monkeypatch.setitem(arms.ARMS, "stage0", other)
    assert place().directory.name != first.directory.name


def test_a_run_on_mined_data_is_another_when_the_miner_is(monkeypatch):
    """Bug: other hard negatives, and the run on them is not trained anew; the miner's path, which
    differs on every machine, is in the key; questions are held out of other data."""
    hard = lambda **keys: asked(f"{ROOT}/configs/studies/negatives.py:small", **keys)
    first, miner = (hard().arm(name, 0) for name in ("C_hard", "C"))
    assert first.config.data.train == first.config.data.eval == f"{miner.directory}/mined/*.jsonl"
    assert list(hard().starts(first)) == [(miner, arms.MINED)]
    assert hard(root="elsewhere").arm("C_hard", 0).directory.name == first.directory.name
    assert hard().arm("C_hard", 1).config.data == first.config.data  # one miner for all seeds
    assert "C_hard" not in asked(f"{ROOT}/configs/studies/negatives.py:smollm2", **OWN_DATA).arms
    more = hard(index__mine_keep="8")
    assert more.arm("C_hard", 0).directory.name != first.directory.name
    assert more.arm("C", 0).directory == miner.directory
    monkeypatch.setitem(arms.ARMS, "C", {"optim.gen_learning_rate": 5e-4})
    assert hard().arm("C_hard", 0).config.data.train != first.config.data.train
    assert hard().arm("C_hard", 0).directory.name != first.directory.name


def test_what_was_mined_last_is_what_counts(tmp_path, monkeypatch):
    """Bug: other index.mine_* have replaced the mined files, and the first ones' run trains on
    them, as its own are noted as mined."""
    mined = []
    monkeypatch.setattr(study.mine, "mine", lambda config, _: mined.append(config.index.mine_keep))
    for keep in ("3", "8", "8", "3"):
        arm = asked(root=tmp_path, index__mine_keep=keep).arm("C", 0)
        study._kept(arm, "hard_negatives", functools.partial(study._mined, arm))
    assert mined == [3, 8, 3]


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("study.arms", "C,Q", "unknown config variant 'Q'"),
        ("study.arms", "", "is empty; name some"),
        ("study.crossed", "C|Q", r"study\.crossed: 'C\|Q'"),
        ("study.crossed", "C|N|C", r"study\.crossed: 'C\|N\|C'"),
        ("study.measures", "answers,vibes", r"study\.measures: 'vibes' is none of answers"),
        ("study.claims", "C > Q: corpus/correct", r"study\.claims: 'Q' is no arm"),
        ("study.claims", "C > N: corpus/corect", r"study\.claims: 'corpus/corect' is given by"),
        ("study.claims", "C > N: corpus_9/correct", "'corpus_9/correct' is given by none of"),
        (
            "study.claims",
            "C > N|C: gold/correct",
            r"of pairs: .*eval\.arms=corpus lacks gold",
        ),
        ("study.shown", "corpus/grounding", r"study\.shown: 'corpus/grounding' is given by none"),
        ("study.shown", "candidates/correct", r"eval\.arms=corpus,gold,bm25,wrong,none lacks cand"),
        ("study.shown", "alignment", r"add geometry to config\.study\.measures"),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained(key, value, match):
    """Bug: a typing error in the last arm is found hours later."""
    with pytest.raises(UserError, match=match):
        asked(**{key: value})


def test_fewer_measures_leave_out_what_the_others_would_show(capsys, tmp_path):
    """Bug: whoever leaves out a costly measure must empty what is shown of it by hand; or a typing
    error is left out with it."""
    spaces = f"{ROOT}/configs/studies/spaces.py:small"
    found = asked(spaces, study__measures="spaces")
    assert "mutual_knn10" in found.shown and "gradient_cosine/gen/step_4" not in found.shown
    said = "left out for want of measures: gradient_cosine/gen/step_2, gradient_cosine/gen/step_4, "
    assert said in capsys.readouterr().out
    own = tmp_path / "own.py"
    own.write_text(
        "from cosup_jax.studies import arms\n\n\ndef get_config(variant):\n"
        "    return arms.config(variant, arms='C', measures='training,geometry', shown='alinment')"
    )
    with pytest.raises(UserError, match=r"study\.shown: 'alinment' is given by none of training"):
        asked(f"{own}:small", study__measures="training")


@pytest.mark.parametrize(("key", "value"), [("claims", "C > N: alignment"), ("shown", "alignment")])
def test_what_is_asked_for_is_not_left_out(key, value):
    """Bug: a study that trains for an hour and drops the one claim that the command line makes."""
    weight = f"{ROOT}/configs/studies/weight.py:small"
    told = {"study.measures": "training", f"study.{key}": value}
    with pytest.raises(UserError, match=rf"study\.{key}: 'alignment' .*; add geometry to config"):
        asked(weight, **told)


def test_what_training_logged_last_is_read_by_set(tmp_path):
    """Bug: numbers of an evaluation half-way stand for those of the end; a set's name is cut at its
    dot; the ratio of a later step, which says what was learned, stands for that of the first."""
    lines = [
        {"step": 0, "eval/w.a/ntp_nats_per_token": 9.0},
        {"step": 0, "grad/nsp_over_ntp_gen": 2.0},
        {"step": 10, "grad/nsp_over_ntp_gen": 7.0},
        {"step": 20, "loss/total": 0.5, "eval/w.a/ntp_nats_per_token": 3.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found = measures.training(SimpleNamespace(workdir=tmp_path))
    assert found[""] == {"gradient_ratio/at_start": {"": 2.0}}
    assert found["w.a"] == {"ntp_nats_per_token": {"": 3.0}}
    held_to_its_word("training", found)
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines[2:]))
    assert measures.training(SimpleNamespace(workdir=tmp_path)) == {"w.a": found["w.a"]}


def test_fewer_arms_leave_out_what_is_said_of_the_others(capsys):
    """Bug: whoever asks for two arms of five must empty the pairs and claims of the others by hand,
    one error at a time; or a claim of an arm that is there is left out with them."""
    found = asked(study__arms="N,C")
    assert found.crossed == [("N", "C")] and {c.better for c in found.claims} == {"C"}
    assert {c.other for c in found.claims} == {"N"} and len(found.claims) == 5
    assert "left out for want of arms: C|S; C|S2; C|T; N|S; N|S2; N|T" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"study\.crossed: 'C\|S2'"):
        asked(study__arms="N,C", study__crossed="C|S2")


def test_fewer_pairs_leave_out_what_is_said_of_the_others(capsys):
    """Bug: whoever asks for one pair must empty the claims of the others by hand; or all claims go
    with them."""
    everything = asked()
    capsys.readouterr()
    found = asked(study__crossed="C|T")
    gone = [claim for claim in everything.claims if claim not in found.claims]
    assert gone and all({"N|C", "N|S2"} & {claim.better, claim.other} for claim in gone)
    assert len(found.claims) + len(gone) == len(everything.claims) and found.arms == everything.arms
    assert "left out for want of arms: " in capsys.readouterr().out


def record(id, correct, hit=1.0, seen=True, evidence="p"):
    scores = {"retrieval_hit": hit}
    return {"id": id, "scores": scores, "correct": correct, "seen": seen, "evidence": [*evidence]}


def test_metrics_of_answers_are_those_of_the_records():
    """Bug: means where retrieval failed hold answers where it succeeded; a slope over passages
    instead of tenfolds, or over hard corpora and drawn ones together; questions of two passages
    among those of one."""
    answered = {
        "corpus": [record("a", 1.0), record("b", 0.0, 0.0, False, "pq"), record("c", 1.0)],
        "corpus_100": [record("a", 1.0), record("b", 0.0), record("c", 1.0)],
        "corpus_hard_1000": [record("a", 1.0), record("b", 0.0, 0.0), record("c", 1.0, 0.0)],
        "gold": [record("a", 1.0), record("b", 1.0)],
        "wrong": [record("a", 0.0), record("b", 1.0), record("c", 1.0)],
        "none": [record("a", 0.0), record("b", 0.5)],
    }
    passages = {"corpus": 10_000, "corpus_100": 100, "corpus_hard_1000": 1000, "gold": None}
    sized = replace_dotted(Config(), "eval.corpus_sizes", "100")
    sized = replace_dotted(sized, "eval.hard_corpus_sizes", "1000")
    found = measures.of_set(answered, passages)
    assert found["corpus/correct"] == {"a": 1.0, "b": 0.0, "c": 1.0}
    assert found["corpus_seen/correct"] == {"a": 1.0, "c": 1.0}
    assert found["corpus_unseen/retrieval_hit"] == {"b": 0.0}
    assert found["wrong/correct"] == {"a": 0.0, "b": 1.0, "c": 1.0}
    assert found["corpus_one/correct"] == {"a": 1.0, "c": 1.0}
    assert found["corpus_several/correct"] == {"b": 0.0}
    assert found["corpus_hit/correct"] == {"a": 1.0, "c": 1.0}
    assert found["corpus_miss/correct"] == {"b": 0.0}
    assert found["slope/retrieval_hit"] == pytest.approx({"a": 0, "b": (0 - 1) / 2, "c": 0})
    assert found["slope_hard/retrieval_hit"] == pytest.approx({"a": 0, "b": 0, "c": 1})
    held_to_its_word("answers", {"": found}, sized)


def test_without_a_right_passage_recall_has_no_slope():
    """Bug: a set of questions without evidence, searched in two corpora, ends the study."""
    passages = {"corpus": 1000, "corpus_100": 100, "corpus_hard_100": 100}
    one = {"id": "a", "scores": {}, "correct": 1.0, "seen": None}
    found = measures.of_set({arm: [one] for arm in passages}, passages)
    assert found == {f"{arm}/correct": {"a": 1.0} for arm in passages}


@pytest.mark.slow
def test_a_small_study_runs_resumes_and_says_what_it_found(tmp_path, capsys):
    """Bug: a finished run is trained again; the second arm's numbers stand beside the first one's
    name; the command beside a run does not repeat it."""
    flags = [f"--config={CORE}:small", f"--workdir={tmp_path}", "--mode=study"]
    flags += ["--config.study.arms=N,C", "--config.study.crossed=N|C", "--config.study.seeds=1"]
    flags += ["--config.study.claims=C > N: gold/correct"]
    assert main_lib.main(flags) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "core-small/study.json").read_text())
    assert said.count("finished after") == 2 and found["state"] == "finished"
    assert [run["arm"] for run in found["runs"]] == ["N", "C"]
    n, c = found["runs"]
    assert n["parameters"] == c["parameters"]
    assert n["flops"] < c["flops"] and n["examples"] == c["examples"] > 0
    assert {row["arm"] for row in found["measured"]} == {"N", "C", "N|C"}
    own = [row for row in found["measured"] if row["metric"] == "corpus/retrieval_hit"]
    by_arm = {row["arm"]: row["by_seed"] for row in own if row["set"] == "world.in_domain"}
    places = {(row["row"], row["column"]) for row in found["matrix"]}
    assert {("N", "N"), ("N", "C"), ("C", "C"), ("C", "gold"), ("majority", "none")} <= places
    assert by_arm["N|C"] == by_arm["C"]  # the first [Ret] of another Gen, asked by the same pair
    for path in tmp_path.glob("arms/*/measured/*.json"):
        measure, kept = path.name.partition("-")[0], json.loads(path.read_text())["found"]
        if measure != "facts":
            held_to_its_word(measure, kept, asked().config)
    again = shlex.split(n["command"].replace("runs/again/core-small-N-0", str(tmp_path / "again")))[
        3:
    ]
    assert main_lib.main(again) == 0
    one, two = (
        (tmp_path / place / "metrics.jsonl").read_text().splitlines()[-1]
        for place in (f"{n['directory']}", "again")
    )
    told = lambda line: {k: v for k, v in json.loads(line).items() if not k.startswith("perf/")}
    assert told(one) == told(two)
    capsys.readouterr()
    assert main_lib.main(flags) == 0
    assert "finished after" not in capsys.readouterr().out
    page = (tmp_path / "core-small/index.html").read_text()
    assert (
        "<svg" in page and "C &gt; N: gold/correct" in page and "http" not in page.split("xmlns")[0]
    )


NEXT = """
from cosup_jax.studies import arms
OWN = {"next": {"gen.init": "start:C", "data.train": "mined:C", "data.eval": "mined:C"}}
STUDY = {"question": "?", "arms": "next", "measures": "training", "shown": "ntp_nats_per_token"}
def get_config(variant=""):
    return arms.config(variant, OWN, **STUDY)
"""
SETS = {f"world.{split}" for split in ("in_domain", "unseen_entities", "unseen_task")}


@pytest.mark.slow
def test_a_run_starts_from_what_another_has_made(tmp_path, capsys):
    """Bugs: an arm that starts from random weights after all, or from an export that a kill has cut
    off; one that trains without the hard negatives that were mined for it; a first run that is
    trained or mined again for each that starts from it."""
    (tmp_path / "next.py").write_text(NEXT)
    flags = [f"--config={tmp_path}/next.py:small", f"--workdir={tmp_path}", "--mode=study"]
    flags += ["--config.study.seeds=1"]
    assert main_lib.main(flags) == 0
    said = capsys.readouterr().out
    places = [said.index(f"--- {name}, seed 0: finished") for name in ("C", "next")]
    assert places[0] < said.index("hard negatives for") < places[1]
    told = json.loads((tmp_path / "next-small/study.json").read_text())
    assert list(told["settings"]) == ["next", "C"]
    start, run = told["runs"]
    assert [start["arm"], run["arm"]] == ["C", "next"] and "/next.py:small+C " in start["command"]
    arm = tmp_path / run["directory"]
    config = json.loads((arm / "config.json").read_text())
    start = Path(config["gen"]["init"])
    assert start.parents[2] == arm.parent and config["ctx"]["init"] == "gen"
    other = start.parent.parent
    first = assemble.trained(config_files.frozen(f"{other}/config.json", {}), other)
    learned, rows = first.params["gen"]["embed"]["table"], first.tokenizers.gen.vocab_size
    own = config_files.frozen(f"{arm}/config.json", {})
    parts = assemble.make_towers(own, first.tokenizers), first.tokenizers, optim.make(own, 1, 1)
    abstract = assemble.abstract_state(own, parts[0], parts[2], first.mesh)
    begun = assemble.initial_state(own, *parts, abstract).params
    for tower in ("gen", "ctx"):
        np.testing.assert_array_equal(begun[tower]["embed"]["table"][:rows], learned[:rows])
    opened = run_lib.opened(own, arm)
    given = [len(opened.store.negatives(example)) for example in range(20)]
    assert sum(given) > 20 and {part.name for part in opened.sets} == SETS
    # A kill within the export, and within the run that starts from it.
    shutil.move(start.parent, other / export.NEW)
    (arm / "status.json").write_text(json.dumps({"state": "running", "step": 2}))
    assert main_lib.main(flags) == 0
    said = capsys.readouterr().out
    assert "--- C, seed 0: finished after" not in said and "writing the towers" in said
    assert start.is_dir() and "--- next, seed 0: finished after" in said
    assert "hard negatives for" not in said
