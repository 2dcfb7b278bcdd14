"""Every config file and variant builds, and means what its name says."""

import json
import runpy
from pathlib import Path

import pytest

from cosup_jax import config_files
from cosup_jax.config import make, set_dotted, to_dict
from cosup_jax.config_files import File
from cosup_jax.dotted import get_dotted, replace_dotted
from cosup_jax.errors import UserError
from cosup_jax.freeze import OFFICIAL, freeze

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
CASES = [
    (path, variant)
    for path in CONFIGS
    for variant in ("", *sorted(runpy.run_path(str(path))["VARIANTS"]))
]


def build(name, variant=""):
    path = next(path for path in CONFIGS if path.stem == name)
    return freeze(runpy.run_path(str(path))["get_config"](variant))


@pytest.mark.parametrize(
    ("path", "variant"), CASES, ids=lambda value: getattr(value, "stem", value)
)
def test_every_variant_freezes(path, variant):
    """Catches a variant that names a renamed key, or values that contradict each other."""
    freeze(runpy.run_path(str(path))["get_config"](variant))


@pytest.mark.parametrize(
    ("path", "variant"), CASES, ids=lambda value: getattr(value, "stem", value)
)
def test_a_run_s_config_json_is_its_config(tmp_path, path, variant):
    """Catches a key that is lost or changes its type on the way through config.json."""
    config = freeze(runpy.run_path(str(path))["get_config"](variant))
    written = tmp_path / "config.json"
    written.write_text(json.dumps(to_dict(config)))
    assert config_files.frozen(str(written), {}) == config
    again = config_files.frozen(str(written), {"seed": "7"})
    assert again == replace_dotted(config, "seed", 7)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_says_how_to_run(path):
    """Catches a config whose docstring names another file, or no command, hardware or result."""
    header = runpy.run_path(str(path))["__doc__"]
    assert f"--config=configs/{path.name}" in header
    for word in ("Hardware", "Expected", "Command", "Variants"):
        assert f"\n{word} " in header
    for variant in runpy.run_path(str(path))["VARIANTS"]:
        assert f"{variant}:" in header


def test_llama2_7b_is_what_the_official_code_runs():
    """Catches a drift from the official code's values, except for those that it has by mistake."""
    config = build("llama2_7b")
    for key, value in OFFICIAL.items():
        if key != "loss.remote_negatives":
            assert get_dotted(config, key) == value, key
    assert (config.seed, config.num_epochs, config.batch_size) == (2, 3, 64)
    optim = config.optim
    assert (optim.gen_learning_rate, optim.ctx_learning_rate) == (2e-5, 2e-5)
    assert (optim.schedule, optim.epoch_decay, optim.warmup_steps) == ("epoch", 0.85, 0)
    assert (optim.b1, optim.b2, optim.eps) == (0.9, 0.999, 1e-8)
    assert (optim.weight_decay, optim.clip_norm) == (0.0, 1.0)
    assert config.data.max_gen_tokens == 1024
    assert (config.mesh.data, config.mesh.fsdp) == (1, -1)
    for tower in (config.gen, config.ctx):
        assert (tower.arch.dtype, tower.arch.remat) == ("bfloat16", "full")
    assert build("llama2_7b", "official").loss.remote_negatives == "detached"


def test_unknown_key_is_refused():
    """Catches a typo in a config file that would train with the default and say nothing."""
    with pytest.raises(UserError, match=r"optim\.gen_learning_rat'"):
        make({"optim.gen_learning_rat": 1.0}, {})


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("num_steps", 3.5, "int"),
        ("num_epochs", 1, "exactly one"),
        ("bank.kind", "on", "off"),
        ("seed", 2**32, "must fit 32 bits"),
        ("generate.seed", 2**32, "must fit 32 bits"),
        ("num_steps", 10**20, "2147483647 or less"),
        ("optim.clip_norm", float("inf"), "finite"),
        ("loss.temperature", float("nan"), "finite"),
        ("optim.b2", 1.0, "less than 1"),
        ("optim.final_fraction", 10.0, "1.0 or less"),
        ("micro_batches", 5, "multiple"),
        ("gen.arch.head_dim", 47, "even"),
        ("gen.init", "gen", "circular"),
        ("ctx.init", "", "scratch"),
        ("gen.pooling", "last", "Gen reads no passages"),
        ("gen.prompt", "passage: ", "Gen reads no passages"),
        ("gen.rotate", True, "Gen reads no passages"),
        ("gen.arch.rope_fraction", 1.5, "is a share"),
        ("ctx.arch.rope_scaling.factor", 8.0, "rope_scaling.factor means nothing with kind=none"),
        ("data.train", "world@heavy", "weight"),
        ("data.eval", "tfds:world,x.jsonl@0.5", r"eval: x\.jsonl@0\.5 means nothing"),
        ("loss.remote_negatives", "detached", "official"),
    ],
)
def test_nonsense_is_refused_in_one_line(key, value, says):
    """Catches a bad value that surfaces minutes later, as a shape error inside the step."""
    config = make({"num_steps": 10}, {})
    set_dotted(config, key, value)
    with pytest.raises(UserError, match=says) as caught:
        freeze(config)
    assert "\n" not in str(caught.value)


def test_a_bank_needs_identities():
    """Bug: stored passages masked by identity, live ones not."""
    config = make({"num_steps": 10, "loss.identity_mask": False, "bank.kind": "passage"}, {})
    with pytest.raises(UserError, match=r"set bank\.kind=off"):
        freeze(config)


def test_compat_refuses_an_explicit_contradiction():
    """Catches compat=official silently overruling a value given on the command line."""
    config = make({"num_steps": 10, "compat": "official", "loss.nsp_weight": 1.0}, {})
    assert freeze(config).loss.nsp_weight == 0.01
    with pytest.raises(UserError, match=r"loss\.nsp_weight"):
        freeze(config, frozenset({"loss.nsp_weight"}))
    with pytest.raises(UserError, match="by position"):
        freeze(config, frozenset({"loss.identity_mask"}))
    set_dotted(config, "data.pure_steps", True)  # which its plan does not read
    with pytest.raises(UserError, match=r"data\.pure_steps=True contradicts compat"):
        freeze(config)


def test_variants_are_joined_and_the_last_one_counts():
    """Bug: of small+C only one is taken, or what C consists in is undone by small."""
    variants = {"a": {"num_steps": 1, "batch_size": 8}, "b": {"num_steps": 2}}
    joined = make({"num_steps": 9}, variants, "a+b")
    assert (joined.num_steps, joined.batch_size) == (2, 8)
    with pytest.raises(UserError, match="unknown config variant 'c'; this file has: a, b"):
        make({}, variants, "a+c")
    file = File("configs/x.py:small", {})
    assert (file.of("C"), file.name) == ("configs/x.py:small+C", "x-small")
    assert (File("x.py", {}).of("C"), File("x.py", {}).name) == ("x.py:C", "x")
