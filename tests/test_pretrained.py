"""What weights and their files bring to a config: shapes, and how Ctx reads."""

import json

import pytest
from batches import config
from pretrained_files import write_llama

from cosup_jax import pretrained
from cosup_jax.config import make
from cosup_jax.errors import UserError
from cosup_jax.freeze import freeze
from cosup_jax.hf import sentence

DIRECTORY = "some/model"
MORE = ((2, "Dense"), (3, "Normalize"))


@pytest.mark.parametrize(
    ("keys", "flag", "message"),
    [
        ({"gen.init": DIRECTORY}, "gen.arch.layers", "gen takes its shape from 'some/model'"),
        ({"ctx.init": DIRECTORY}, "ctx.arch.rope_scaling.factor", "from 'some/model'"),
        (
            {},
            "ctx.arch.width",
            r"ctx takes its shape from 'gen'; drop it, or set config\.ctx\.init",
        ),
        ({"tie_ctx_to_gen": True, "ctx.init": "scratch"}, "ctx.arch.heads", "from 'gen'"),
        ({"ctx.init": "scratch"}, "ctx.arch.layers", ""),
        ({"gen.init": DIRECTORY}, "gen.arch.dtype", ""),
        ({}, "gen.arch.layers", ""),
    ],
)
def test_a_shape_that_would_be_ignored_is_refused(keys, flag, message):
    """Bug: --config.gen.arch.layers=6 beside pretrained weights does nothing, and says nothing."""
    told = make({"num_steps": 1, **keys}, {})
    assert freeze(told)  # in a config file it stands for runs from scratch
    if not message:
        assert freeze(told, frozenset({flag, "seed"}))
        return
    with pytest.raises(UserError, match=message):
        freeze(told, frozenset({flag, "seed"}))


def sentences(directory, pooling, prompts=None, default=None):
    """What sentence-transformers puts beside a model."""
    (directory / "1_Pooling").mkdir(exist_ok=True)
    modules = [{"path": "", "type": "a.Transformer"}, {"path": "1_Pooling", "type": "a.Pooling"}]
    about = {"prompts": prompts, "default_prompt_name": default}
    files = {"modules": modules, "1_Pooling/config": pooling, "config_sentence_transformers": about}
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("pooling", "found"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_ctx_reads_as_its_sentence_transformers_files_say(tmp_path, capsys, pooling, found):
    """Bug: MiniLM, whose vector is a mean, is pooled at a token that it never learned to use."""
    write_llama(tmp_path, 8)
    run = lambda **keys: pretrained.resolve(config(ctx__init=str(tmp_path), **keys)).ctx
    assert (run().pooling, run().prompt) == ("eos", "")
    sentences(tmp_path, pooling, {"passage": "p: ", "query": "q: "}, "passage")
    assert (run().pooling, run().prompt) == (found, "p: ")
    sentences(tmp_path, pooling, {"passage": "p: "})
    assert run().prompt == "" and capsys.readouterr().out == ""
    asked = run(ctx__pooling="token", ctx__prompt="mine: ")
    assert (asked.pooling, asked.prompt) == ("token", "mine: ")
    assert f"was trained with ctx.pooling={found}" in capsys.readouterr().out


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last", "eos", "token", "pad"])
def test_a_reading_that_is_written_is_read_again(tmp_path, pooling, normalize):
    """Bugs: an export that others pool elsewhere, whose raw dot products they norm or compare by
    cosine, or whose prompt they leave out of the mean."""
    prompt = "p: " * normalize
    sentence.save_modules(tmp_path, pooling, prompt, 9, normalize, (8, 8))
    theirs = "last" if pooling in ("eos", "token", "pad") else pooling  # their tokenizer appends
    assert sentence.read_modules(tmp_path) == sentence.Reading(theirs, prompt)
    read = lambda name: json.loads((tmp_path / name).read_text())
    kinds = [module["type"].split(".")[-1] for module in read("modules.json")]
    assert kinds == ["Transformer", "Pooling"] + ["Normalize"] * normalize
    about = read("config_sentence_transformers.json")
    assert about["similarity_fn_name"] == ("cosine" if normalize else "dot")
    assert about["default_prompt_name"] == ("passage" if prompt else None)
    assert read("1_Pooling/config.json")["include_prompt"]


def test_a_projection_that_is_not_read_is_told(tmp_path, capsys):
    """Bug: a model whose vectors pass a Dense layer, as of our own export, starts without it, and
    nothing says so."""
    write_llama(tmp_path, 8)
    sentences(tmp_path, {"pooling_mode": "mean"})
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules += [{"path": f"{i}_{kind}", "type": f"a.{kind}"} for i, kind in MORE]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    found = pretrained.resolve(config(ctx__init=str(tmp_path))).ctx
    assert found.pooling == "mean"
    assert capsys.readouterr().out == f"note: {tmp_path}: its Dense is left out\n"


def test_a_pooling_that_we_lack_is_refused_unless_another_is_set(tmp_path):
    """Bug: a maximum, or two poolings side by side, become the last token in silence."""
    write_llama(tmp_path, 8)
    run = lambda **keys: pretrained.resolve(config(ctx__init=str(tmp_path), **keys)).ctx.pooling
    both = {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}
    for pooling, name in ((both, "max"), ({"pooling_mode": "weightedmean"}, "weightedmean")):
        sentences(tmp_path, pooling)
        with pytest.raises(UserError, match=f"pools by .*{name}.* set config.ctx.pooling"):
            run()
        assert run(ctx__pooling="mean") == "mean"
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(UserError, match=r"modules\.json cannot be read"):
        run()
