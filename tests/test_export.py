"""Two unlike pretrained towers in, trained together, exported, and read back."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from untrained import TINY

from cosup_jax import assemble, export, parity, train
from cosup_jax import config as config_lib
from cosup_jax import step as step_lib
from cosup_jax.checkpoint import restore_params
from cosup_jax.config import ArchConfig
from cosup_jax.data import tokenizer
from cosup_jax.dotted import replace_dotted
from cosup_jax.errors import UserError
from cosup_jax.freeze import freeze
from cosup_jax.hf import saving
from cosup_jax.model.transformer import Transformer
from cosup_jax.parity import Ours
from cosup_jax.towers import Towers

TOWNS = ["ulm", "bonn", "kiel", "jena", "trier", "fulda", "worms", "celle"]
RIVERS = ["danube", "rhine", "schwentine", "saale", "mosel", "fuld", "ried", "aller"]
WORDS = ["lies", "on", "the", ".", "where", "?", "town", "::", "##", "input:", "output:"]
SHAPE = {"layers": 2, "heads": 2, "head_dim": 8, "mlp_width": 32, "max_positions": 128}
LLAMA = ArchConfig(family="llama", width=16, kv_heads=1, tie_embeddings=False, **SHAPE)
BERT = ArchConfig(family="bert", width=24, kv_heads=2, **{**SHAPE, "head_dim": 12})


def pretrained(directory, arch: ArchConfig, seed: int):
    """A Hugging Face directory with random weights and a tokenizer of the family's kind."""
    bert = arch.family == "bert"
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"] if bert else ["<unk>", "</s>", "<s>"]
    words = special + WORDS + TOWNS + RIVERS
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, special[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bert:
        frame = [("[CLS]", 1), ("[SEP]", 2)]
        backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, frame)
        names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        names["pad_token"] = "[PAD]"
    else:
        names = {"unk_token": "<unk>", "eos_token": "</s>", "bos_token": "<s>"}
        names |= {"chat_template": "{{ messages }}", "padding_side": "left"}
        frame = [("<s>", 2)]
        backend.post_processor = processors.TemplateProcessing("<s> $A", None, frame)
    directory.mkdir()
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(directory)
    model = Transformer(arch, len(words), has_head=not bert)
    params = jax.tree.map(lambda x: 4 * x, jax.jit(model.init)(jax.random.key(seed)))
    saving.save(directory, params, arch, len(words), has_head=not bert)
    return directory


def data(directory) -> str:
    """A town, the river it lies on, and questions about it."""
    rows, passages = [], []
    for town, river in zip(TOWNS, RIVERS, strict=True):
        text = f"{town} lies on the {river} . [Emb] town </s>"  # cut, and not all it seems
        passages.append({"id": town, "title": town, "text": text})
        question = f"where lies {town} ?"
        row = {"id": town, "task": "open_qa", "question": question, "answers": [river]}
        rows.append(row | {"evidence": [town], "split": "test" if town == "celle" else "train"})
    for name, found in (("towns.jsonl", rows), ("towns.passages.jsonl", passages)):
        (directory / name).write_text("\n".join(map(json.dumps, found)) + "\n")
    return str(directory / "towns.jsonl")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained workdir: an adapted Llama, and an adapted BERT of another width and vocabulary."""
    home = tmp_path_factory.mktemp("export")
    source = data(home)
    keys = {
        "num_steps": 2,
        "batch_size": 8,
        "gen.init": str(pretrained(home / "llama", LLAMA, 0)),
        "ctx.init": str(pretrained(home / "bert", BERT, 1)),
        "gen.arch.lora.rank": 2,
        "ctx.arch.lora.rank": 3,
        "ctx.arch.frozen_layers": 1,
        "ctx.pooling": "mean",
        "ctx.prompt": "town :: ",
        "data.train": source,
        "data.eval": source,
        "data.max_gen_tokens": 64,
        "data.max_ctx_tokens": 12,
        "data.ctx_rows": 8,
        "data.ctx_row_tokens": 24,
        "generate.max_tokens": 64,
        "generate.examples": 0,
        "log.probe_every_steps": 0,
    }
    config = freeze(config_lib.make(keys, {}))
    train.train(config, str(home / "run"))
    export.export(config, str(home / "run"))
    return config, home


@pytest.mark.slow
def test_unlike_towers_train_and_the_report_says_how_close_the_export_is(run):
    """Bugs: width, tokenizer or family of the one tower is taken for the other's; an export is not
    compared, or with itself."""
    _, home = run
    lines = [json.loads(line) for line in (home / "run/metrics.jsonl").open()]
    assert all(np.isfinite(line.get("loss/total", 0.0)) for line in lines)
    report = json.loads((home / "run/export/parity.json").read_text())
    names = [check["what"] for check in report["checks"]]
    assert report["gen_tokens"] > 7 * 20 and report["ctx_tokens"] == 8 * 12
    assert names[:4] == [
        f"{what}, {how}"
        for how in ("adapters merged", "read back")
        for what in ("gen logits", "passage vectors")
    ]
    assert all(check["largest"] > 0 for check in report["checks"])
    assert 0 < report["checks"][0]["difference"] < 1e-4  # another order of sums, no more


@pytest.mark.parity
def test_those_who_serve_it_agree(run):
    """Bugs: a name or a shape that only our reader understands; another pooling or prompt; rounded
    files compared with what was not rounded, or computed in their own dtype."""
    config, home = run
    report = json.loads((home / "run/export/parity.json").read_text())
    names = [check["what"] for check in report["checks"]]
    assert names[4:] == ["gen logits, transformers", "passage vectors, sentence-transformers"]
    assert report["not_asked"] == {}
    for check in report["checks"]:
        print(f"{check['what']}: {check['difference']:.1e} of {check['largest']:.2f}")
    for dtype in ("bfloat16", "float16"):
        export.export(replace_dotted(config, "export.dtype", dtype), str(home / "run"))
        rounded = json.loads((home / "run/export/parity.json").read_text())["checks"]
        assert [check["what"] for check in rounded] == names[2:]


@pytest.mark.slow
def test_gen_is_a_causal_lm_of_the_tokenizers_size(run):
    """Bugs: the padded vocabulary is exported; token ids, frozen layers, the chat template, the
    length or the side of padding are lost; eos stands behind a prompt."""
    _, home = run
    gen = home / "run/export/gen"
    config = json.loads((gen / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(gen)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["vocab_size"] == len(tokenizer) and len(tokenizer) % 128
    pad = tokenizer.convert_tokens_to_ids("<pad>")
    ids = {"eos_token_id": 1, "pad_token_id": pad}
    assert json.loads((gen / "generation_config.json").read_text()) == ids
    assert (ids | {"bos_token_id": 2}).items() <= config.items()
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, pad)
    assert tokenizer.padding_side == "left"  # where a batch of prompts is answered
    assert tokenizer.model_max_length == 128 and tokenizer.chat_template == "{{ messages }}"
    named = json.loads((gen / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert named == "PreTrainedTokenizerFast"  # what transformers 5 writes, 4 does not know
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("where lies ulm [Ret]")["input_ids"])
    assert tokens == ["<s>", "where", "lies", "ulm", "[Ret]"]  # a prompt is not ended
    tensors = load_file(gen / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].shape == (len(tokenizer), 16)
    assert "model.layers.1.mlp.up_proj.weight" in tensors
    assert not [name for name in tensors if "lora" in name]


@pytest.mark.slow
def test_a_rotation_is_exported_and_has_not_moved(tmp_path):
    """Bugs: vectors of the files that are not rotated, or rotated the other way; a rotation that
    weight decay or a gradient has bent; one that a config without it leaves out."""
    source = data(tmp_path)
    keys = TINY | {
        **{"data.train": source, "data.eval": source, "ctx.rotate": True, "num_steps": 3},
        **{"generate.examples": 0, "log.probe_every_steps": 0, "optim.weight_decay": 0.5},
    }
    config, home = freeze(config_lib.make(keys, {})), str(tmp_path / "run")
    train.train(config, home)
    export.export(config, home)
    report = json.loads((tmp_path / "run/export/parity.json").read_text())
    names = [check["what"] for check in report["checks"]]
    assert "passage vectors, read back" in names
    (dense,) = load_file(tmp_path / "run/export/ctx/2_Dense/model.safetensors").values()
    np.testing.assert_allclose(dense @ dense.T, np.eye(len(dense)), atol=1e-5)
    assert np.abs(dense - np.eye(len(dense))).max() > 0.1
    if not parity.missing("torch", "sentence_transformers"):
        assert "passage vectors, sentence-transformers" in names
    with pytest.raises(
        UserError, match=r"made with config\.ctx\.rotate=True, this config has False"
    ):
        export.export(replace_dotted(config, "ctx.rotate", False), home)


@pytest.mark.slow
def test_ctx_reads_texts_as_in_training(run):
    """Bugs: [CLS] and [SEP] are lost or doubled; the wrong pooling; the projection is transposed or
    left out; the prompt is not named."""
    _, home = run
    ctx = home / "run/export/ctx"
    tokenizer = AutoTokenizer.from_pretrained(ctx)
    ids = tokenizer("ulm :: danube")["input_ids"]
    tokens = ["[CLS]", "ulm", "::", "danube", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    literal = tokenizer("ulm [Emb] ulm")["input_ids"]
    assert tokenizer.convert_tokens_to_ids("[Emb]") not in literal
    read = lambda name: json.loads((ctx / name).read_text())
    assert [m["type"].split(".")[-1] for m in read("modules.json")] == [
        *("Transformer", "Pooling", "Dense", "Normalize")
    ]
    assert read("1_Pooling/config.json") == {
        "word_embedding_dimension": 24,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_lasttoken": False,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
        "include_prompt": True,
    }
    assert read("sentence_bert_config.json") == {"max_seq_length": 12}
    assert read("config.json")["tie_word_embeddings"] is False
    dense = read("2_Dense/config.json")
    assert (dense["in_features"], dense["out_features"]) == (24, 16)
    assert read("config_sentence_transformers.json") == {
        "prompts": {"passage": "town :: "},
        "default_prompt_name": "passage",
        "similarity_fn_name": "cosine",
    }
    assert read("contract.json")["pooling"] == "mean"
    assert not [name for name in load_file(ctx / "model.safetensors") if "lora" in name]


@pytest.mark.slow
def test_params_are_an_orbax_checkpoint(run):
    """Bugs: export/params is half-written, or is another step's; its adapters are merged."""
    _, home = run
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shape = jax.ShapeDtypeStruct((24, 16), np.float32, sharding=place)
    low = jax.ShapeDtypeStruct((2, 16, 2), np.float32, sharding=place)
    wanted = {"gen": {"blocks": {"mlp": {"up_lora_a": low}}}, "ctx": {"projection": shape}}
    found = restore_params(home / "run/export/params", wanted)
    assert found.step == 2 and found.meta["contract"]["pooling"] == "mean"
    assert np.abs(flatten_dict(found.state)["ctx", "projection"]).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value"),
    [("gen.arch.lora.alpha", 64.0), ("gen.arch.norm_eps", 0.1), ("ctx.arch.layers", 3)],
)
def test_another_config_is_refused(run, monkeypatch, key, value):
    """Bug: what was trained with one alpha is merged with another, and passes for right."""
    config, home = run
    resolve = assemble.resolve
    other = lambda given: replace_dotted(resolve(given), key, value)
    monkeypatch.setattr(assemble, "resolve", other)
    with pytest.raises(UserError, match=r"use the config (that )?it was made with"):
        export.export(config, str(home / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["a kernel", "the disk"])
def test_a_bad_export_leaves_the_old_one(run, monkeypatch, fault):
    """Bugs: a model that computes something else is exported; a full disk is a traceback, or costs
    the export that was there."""
    config, home = run
    before = (home / "run/export/parity.json").read_text()
    (home / "run/export/mine").write_text("kept")
    write = saving._assemble

    def broken(pieces, vocab_size):
        if fault == "the disk":
            raise OSError(28, "No space left on device")
        return write(pieces, vocab_size) * 1.0005

    monkeypatch.setattr(saving, "_assemble", broken)
    monkeypatch.setattr(parity, "missing", lambda *names: names)  # our own reading is enough
    message = {"a kernel": "nothing is exported", "the disk": "No space left"}[fault]
    with pytest.raises(UserError, match=message):
        export.export(config, str(home / "run"))
    assert (home / "run/export/parity.json").read_text() == before
    assert (home / "run/export/mine").read_text() == "kept"
    assert not (home / "run/.export.new").exists()


@pytest.mark.slow
def test_what_a_killed_export_left_is_put_back(run, tmp_path):
    """Bug: killed between two renames, the next export deletes the only one that there is."""
    config, _ = run
    for name in (export.OLD, export.NEW):
        (tmp_path / name).mkdir()
        (tmp_path / name / "whose").write_text(name)
    with pytest.raises(UserError, match="holds no checkpoint"):
        export.export(config, str(tmp_path))
    assert (tmp_path / "export/whose").read_text() == export.OLD


@pytest.mark.slow
def test_an_export_to_a_bucket_leaves_no_older_file(run, tmp_path, monkeypatch):
    """Bug: files of an older export stay beside the new, and transformers or we read those."""
    config, home = run
    monkeypatch.setenv("COSUP_CACHE", str(tmp_path / "mirror"))
    shutil.copytree(home / "run", tmp_path / "bucket")
    stale = tmp_path / "bucket/export/gen/model.safetensors.index.json"
    stale.write_text("{}")
    export.export(config, f"file://{tmp_path}/bucket")
    assert (tmp_path / "bucket/export/parity.json").exists() and not stale.exists()


@pytest.mark.slow
def test_a_file_in_the_way_is_one_line(run, tmp_path):
    """Bug: a file named "export" is replaced in silence, and the next export is a traceback."""
    config, _ = run
    (tmp_path / "export").write_text("mine")
    with pytest.raises(UserError, match=r"export is no directory; move it away"):
        export.export(config, str(tmp_path))
    assert (tmp_path / "export").read_text() == "mine"


def test_dtype_and_normalisation_reach_the_files(tmp_path):
    """Bugs: config.export.dtype is ignored, or config.json names another; others norm the vectors
    that training compares by dot product."""
    keys = TINY | {"export.dtype": "bfloat16", "loss.normalize": False, "loss.temperature": 1.0}
    config = assemble.resolve(freeze(config_lib.make(keys, {})))
    tokens = tokenizer.train(["a passage"], 300)
    tokenizers = assemble.Tokenizers(tokens, tokens)
    towers = assemble.make_towers(config, tokenizers)
    params = jax.jit(lambda key: step_lib.init_params(key, towers, config))(jax.random.key(0))
    contract = assemble.embedding_contract(config, tokenizers, "weights")
    export._write(tmp_path, Ours(towers, params, None, config), tokenizers, contract, config)
    for name in ("gen", "ctx"):
        tensors = load_file(tmp_path / name / "model.safetensors")
        assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == "bfloat16"
    modules = json.loads((tmp_path / "ctx/modules.json").read_text())
    assert [m["type"].split(".")[-1] for m in modules] == ["Transformer", "Pooling"]


@pytest.mark.parametrize("first", [True, False])
def test_an_older_export_is_replaced(tmp_path, first):
    """Bug: the older one, gigabytes of it, stays under another name."""
    for name in (export.NEW,) if first else (export.NEW, export.OLD, "export"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    export._put(tmp_path / export.NEW, tmp_path / "export", tmp_path / export.OLD)
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")] == [
        *("export", f"export/{export.NEW}")
    ]


def test_towers_are_compared_in_float32(devices):
    """Bugs: a run of arch.dtype=bfloat16 is refused for its rounding; one of arch.attention=cudnn,
    which has no float32, is not exported at all."""
    plain = Transformer(LLAMA, 40)
    params = {"gen": jax.jit(plain.init)(jax.random.key(0))}
    fast = dataclasses.replace(LLAMA, attention="cudnn", dtype="bfloat16")
    mesh = assemble.mesh_for(freeze(config_lib.make(TINY, {})), devices[:1])
    found, wanted = (
        Ours(Towers(gen, gen, tied=True), params, mesh, None)._logits([np.arange(5)])[0]
        for gen in (dataclasses.replace(plain, arch=fast), plain)
    )
    np.testing.assert_array_equal(found, wanted)
