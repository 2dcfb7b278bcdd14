"""Hugging Face directories <-> our parameters."""

import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cosup_jax.config import ArchConfig
from cosup_jax.errors import UserError
from cosup_jax.hf import saving
from cosup_jax.hf import weights as hf
from cosup_jax.hf.configs import arch_fields, config_json

N, D, H, G, E, F, V = 2, 8, 4, 2, 6, 12, 10
CONFIG = {
    "model_type": "llama",
    "hidden_size": D,
    "num_hidden_layers": N,
    "num_attention_heads": H,
    "num_key_value_heads": G,
    "head_dim": E,
    "intermediate_size": F,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "vocab_size": V,
}
GPT2 = {"model_type": "gpt2", "n_embd": D, "n_layer": N, "n_head": H, "n_positions": 64}
SOME_WINDOWS = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}
RELATIVE = {"model_type": "bert", "position_embedding_type": "relative_key"}
SPLIT = {  # every axis that the mesh splits in training, and the layers
    "embed": {"table": P("tensor", "fsdp")},
    "blocks": {
        "attn_norm": {"scale": P(None, "fsdp")},
        "attn": {
            "q": P(None, "fsdp", "tensor"),
            "k": P(None, "fsdp", "tensor"),
            "v": P("tensor", "fsdp", None, "data"),
            "o": P(None, "tensor", None, "fsdp"),
        },
        "mlp_norm": {"scale": P()},
        "mlp": {
            "gate": P(None, "fsdp", "tensor"),
            "up": P("data", "fsdp", "tensor"),
            "down": P(None, "tensor", "fsdp"),
        },
    },
    "final_norm": {"scale": P("fsdp")},
    "head": {"kernel": P("fsdp", "tensor")},
}


def tensors(seed=0):
    """The file's tensors, as HF names and lays them out."""
    rng = np.random.default_rng(seed)
    make = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    found = {"model.embed_tokens.weight": make(V, D), "model.norm.weight": make(D)}
    for n in range(N):
        at = f"model.layers.{n}."
        found |= {
            f"{at}input_layernorm.weight": make(D),
            f"{at}post_attention_layernorm.weight": make(D),
            f"{at}self_attn.q_proj.weight": make(H * E, D),
            f"{at}self_attn.k_proj.weight": make(G * E, D),
            f"{at}self_attn.v_proj.weight": make(G * E, D),
            f"{at}self_attn.o_proj.weight": make(D, H * E),
            f"{at}mlp.gate_proj.weight": make(F, D),
            f"{at}mlp.up_proj.weight": make(F, D),
            f"{at}mlp.down_proj.weight": make(D, F),
        }
    return found | {"lm_head.weight": make(V, D)}


def write(directory, found, **config):
    directory.mkdir(exist_ok=True)
    save_file(found, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    return directory


def abstract(devices, vocab=V, head=True, dtype=jnp.float32):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    shapes = {
        "embed": {"table": (vocab, D)},
        "blocks": {
            "attn_norm": {"scale": (N, D)},
            "attn": {"q": (N, D, H, E), "k": (N, D, G, E), "v": (N, D, G, E), "o": (N, H, E, D)},
            "mlp_norm": {"scale": (N, D)},
            "mlp": {"gate": (N, D, F), "up": (N, D, F), "down": (N, F, D)},
        },
        "final_norm": {"scale": (D,)},
        "head": {"kernel": (D, vocab)},
    }
    split = dict(SPLIT)
    if not head:
        del shapes["head"], split["head"]
    leaf = lambda shape, spec: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, spec)
    )
    return jax.tree.map(leaf, shapes, split, is_leaf=lambda x: isinstance(x, tuple))


def project(params, layer, name, x_D):
    return np.einsum("d,dhe->he", x_D, np.asarray(params["blocks"]["attn"][name])[layer])


@pytest.mark.parametrize("at_once", [hf.AT_ONCE_BYTES, 0])
def test_every_tensor_lands_transposed_on_its_shard(tmp_path, devices, monkeypatch, at_once):
    """Bug: a kernel is not transposed, heads and features are swapped, or a shard holds another's
    rows, or its layers lie in another order; checked against the products of HF's nn.Linear."""
    monkeypatch.setattr(hf, "AT_ONCE_BYTES", at_once)
    found, want = tensors(), abstract(devices)
    params = hf.load_gen(write(tmp_path, found), want)
    for leaf, like in zip(jax.tree.leaves(params), jax.tree.leaves(want), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (like.shape, like.dtype, like.sharding)
    x_D, x_F = np.arange(D) / D, np.arange(F) / F
    x_HxE = np.arange(H * E).reshape(H, E) / 7.0
    blocks = jax.tree.map(np.asarray, params["blocks"])
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for n in range(N):
        of = lambda name, n=n: found[f"model.layers.{n}.{name}.weight"]
        close(project(params, n, "q", x_D), (of("self_attn.q_proj") @ x_D).reshape(H, E))
        close(project(params, n, "k", x_D), (of("self_attn.k_proj") @ x_D).reshape(G, E))
        close(project(params, n, "v", x_D), (of("self_attn.v_proj") @ x_D).reshape(G, E))
        out_D = np.einsum("he,hed->d", x_HxE, blocks["attn"]["o"][n])
        close(out_D, of("self_attn.o_proj") @ x_HxE.reshape(-1))
        close(x_D @ blocks["mlp"]["gate"][n], of("mlp.gate_proj") @ x_D)
        close(x_D @ blocks["mlp"]["up"][n], of("mlp.up_proj") @ x_D)
        close(x_F @ blocks["mlp"]["down"][n], of("mlp.down_proj") @ x_F)
        close(blocks["attn_norm"]["scale"][n], of("input_layernorm"))
        close(blocks["mlp_norm"]["scale"][n], of("post_attention_layernorm"))
    close(np.asarray(params["embed"]["table"]), found["model.embed_tokens.weight"])
    close(np.asarray(params["final_norm"]["scale"]), found["model.norm.weight"])
    close(np.asarray(params["head"]["kernel"]).T, found["lm_head.weight"])


def test_ctx_takes_either_naming_and_no_head(tmp_path, devices):
    """Bug: a LlamaModel directory (no "model.") or a causal LM's head stops the Ctx tower."""
    found, want = tensors(), abstract(devices, head=False)
    bare = {n.removeprefix("model."): t for n, t in found.items() if n != "lm_head.weight"}
    from_causal = hf.load_ctx(write(tmp_path / "causal", found), want)
    from_bare = hf.load_ctx(write(tmp_path / "bare", bare), want)
    jax.tree.map(np.testing.assert_array_equal, from_causal, from_bare)


def test_several_files_in_bfloat16(tmp_path, devices):
    """Bug: sharded checkpoints or bfloat16 files cannot be read, or are not cast."""
    found = {n: t.astype(ml_dtypes.bfloat16) for n, t in tensors().items()}
    whole = hf.load_gen(write(tmp_path / "whole", found), abstract(devices))
    parts = write(tmp_path / "parts", found)
    (parts / "model.safetensors").unlink()
    where = {name: f"model-{i % 2 + 1}-of-2.safetensors" for i, name in enumerate(found)}
    for file in set(where.values()):
        save_file({n: t for n, t in found.items() if where[n] == file}, parts / file)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    jax.tree.map(np.testing.assert_array_equal, whole, hf.load_gen(parts, abstract(devices)))
    table = np.asarray(whole["embed"]["table"])
    assert table.dtype == np.float32
    np.testing.assert_array_equal(table, found["model.embed_tokens.weight"].astype(np.float32))
    (parts / "model-2-of-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-2-of-2\.safetensors cannot be read"):
        hf.load_gen(parts, abstract(devices))


@pytest.mark.parametrize("old_vocab", [None, 7])
def test_new_rows_start_at_the_mean_of_the_old(tmp_path, devices, old_vocab):
    """Bug: [Ret] starts at zero or at a copy of another new token, in table or head; or an old row
    is touched; or a shard that straddles the border mixes them up."""
    directory = write(tmp_path, tensors())
    params = hf.load_gen(directory, abstract(devices, vocab=32), old_vocab)
    known = old_vocab or V
    for ours, name in (
        (np.asarray(params["embed"]["table"]), "model.embed_tokens.weight"),
        (np.asarray(params["head"]["kernel"]).T, "lm_head.weight"),
    ):
        old_VxD = tensors()[name][:known]
        np.testing.assert_array_equal(ours[:known], old_VxD)
        off = np.abs(ours[known:] - old_VxD.mean(axis=0)) / old_VxD.std(axis=0)
        assert 0 < off.max() < 6 * hf.NEW_ROW_NOISE
        assert len(np.unique(ours[known:, 0])) == 32 - known
    again = hf.load_gen(directory, abstract(devices, vocab=32), old_vocab)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    other = hf.load_gen(directory, abstract(devices, vocab=32), old_vocab, seed=1)
    assert (other["embed"]["table"][known:] != params["embed"]["table"][known:]).any()


def test_a_padded_table_is_read_up_to_the_tokenizer(tmp_path, devices):
    """Bug: weights padded further than our vocabulary are refused, for rows that no token has."""
    directory = write(tmp_path, tensors())
    params = hf.load_gen(directory, abstract(devices, vocab=8), old_vocab=7)
    file_VxD = tensors()["model.embed_tokens.weight"]
    table_VxD = np.asarray(params["embed"]["table"])
    np.testing.assert_array_equal(table_VxD[:7], file_VxD[:7])
    assert np.abs(table_VxD[7] - file_VxD[:7].mean(axis=0)).max() < 0.5
    assert np.abs(table_VxD[7] - file_VxD[7]).max() > 0.5
    with pytest.raises(UserError, match=r"embed_tokens\.weight is \[10, 8\].*expects \[8, 8\]"):
        hf.load_gen(directory, abstract(devices, vocab=8), old_vocab=9)


def test_tied_embeddings(tmp_path, devices):
    """Bug: a tied file (no lm_head) cannot be loaded, or an untied head is dropped unasked."""
    tied = {name: t for name, t in tensors().items() if name != "lm_head.weight"}
    directory = write(tmp_path / "tied", tied, tie_word_embeddings=True)
    assert "head" not in hf.load_gen(directory, abstract(devices, head=False))
    params = hf.load_gen(directory, abstract(devices))
    np.testing.assert_array_equal(params["head"]["kernel"].T, params["embed"]["table"])
    with pytest.raises(UserError, match=r"gen\.arch\.tie_embeddings=false"):
        hf.load_gen(write(tmp_path / "untied", tensors()), abstract(devices, head=False))
    with pytest.raises(UserError, match=r"tensor lm_head\.weight is missing"):
        hf.load_gen(write(tmp_path / "headless", tied), abstract(devices))


def test_what_does_not_fit_is_named(tmp_path, devices):
    """Bug: a bias or a fifth layer is left out in silence; a lost or odd tensor is a traceback."""
    found = tensors()
    lost = {n: t for n, t in found.items() if n != "model.layers.1.mlp.up_proj.weight"}
    with pytest.raises(UserError, match=r"tensor layers\.1\.mlp\.up_proj\.weight is missing;"):
        hf.load_gen(write(tmp_path, lost), abstract(devices))
    bias = {"model.layers.0.self_attn.q_proj.bias": np.zeros(H * E, np.float32)}
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj\.bias is unknown"):
        hf.load_gen(write(tmp_path, found | bias), abstract(devices))
    odd = {"model.layers.1.self_attn.k_proj.weight": np.zeros((H * E, D), np.float32)}
    with pytest.raises(
        UserError, match=r"k_proj\.weight is \[24, 8\], the model expects \[12, 8\]"
    ):
        hf.load_gen(write(tmp_path, found | odd), abstract(devices))
    with pytest.raises(UserError, match=r"embed_tokens\.weight is \[10, 8\].*expects \[8, 8\]"):
        hf.load_gen(write(tmp_path, found), abstract(devices, vocab=8))
    (tmp_path / "model.safetensors").write_bytes(b"git-lfs pointer")
    with pytest.raises(UserError, match="cannot be read"):
        hf.load_gen(tmp_path, abstract(devices))
    with pytest.raises(UserError, match=r"absent/config\.json cannot be read"):
        hf.load_gen(tmp_path / "absent", abstract(devices))


@pytest.mark.parametrize(
    "found", [None, ["a"], dict.fromkeys(tensors(), 5)], ids=["null", "list", "numbers"]
)
def test_an_index_that_is_none_is_one_line(tmp_path, devices, found):
    """Bug: an odd index of sharded weights is a traceback."""
    directory = write(tmp_path, tensors())
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": found}))
    with pytest.raises(UserError, match=r"index\.json: weight_map does not say"):
        hf.load_gen(directory, abstract(devices))


def test_quantised_weights_are_refused(tmp_path, devices):
    """Bug: integers of a quantised model are taken for weights; 8-bit floats are a traceback; a
    table without a row gives NaN."""
    for kind, name in ((np.int8, "I8"), (ml_dtypes.float8_e4m3fn, "F8_E4M3")):
        found = {name: array.astype(kind) for name, array in tensors().items()}
        with pytest.raises(UserError, match=f"has values of type {name}, not one of F64, F32"):
            hf.load_gen(write(tmp_path, found), abstract(devices))
    told = write(tmp_path, tensors(), quantization_config={"quant_method": "gptq"})
    with pytest.raises(UserError, match="quantised weights are not supported"):
        hf.load_gen(told, abstract(devices))
    empty = tensors() | {"model.embed_tokens.weight": np.zeros((0, D), np.float32)}
    with pytest.raises(UserError, match=r"embed_tokens\.weight is \[0, 8\]"):
        hf.load_gen(write(tmp_path, empty), abstract(devices))


def test_arch_of_old_and_new_config_files(tmp_path):
    """Bug: the rotary base of a transformers 5 file is not found and the default taken instead."""
    expected = {
        **{"family": "llama", "layers": N, "width": D, "heads": H, "kv_heads": G, "head_dim": E},
        **{"mlp_width": F, "activation": "silu", "rope_theta": 500.0, "norm_eps": 1e-5},
        **{"tie_embeddings": False, "window": 0, "max_positions": 2048, "vocab_size": V},
        "rope_fraction": 1.0,
    }
    new = {**CONFIG, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    del new["rope_theta"]
    for config in (CONFIG, new, CONFIG | {"rope_scaling": None}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert hf.arch_from_hf(tmp_path) == expected
    plain = {n: v for n, v in CONFIG.items() if n not in ("head_dim", "num_key_value_heads")}
    (tmp_path / "config.json").write_text(json.dumps(plain))
    assert hf.arch_from_hf(tmp_path) == expected | {"kv_heads": H, "head_dim": D // H}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("num_attention_heads", value) for value in (0, "2", None, -4, 1.5)),
        *(("max_position_embeddings", 0), ("num_key_value_heads", 3), ("rms_norm_eps", math.nan)),
        *(("rope_theta", -1.0), ("rope_theta", "x"), ("tie_word_embeddings", "no")),
        ("rope_scaling", {"rope_type": "linear", "factor": 0}),
        (
            "rope_scaling",
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": "8"},
        ),
    ],
)
def test_a_number_that_is_none_is_one_line(tmp_path, key, value):
    """Bug: heads of 0, or in quotes, are a traceback, or compute NaN."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {key: value}))
    with pytest.raises(UserError, match=r"config\.json: .*; get the file anew$"):
        hf.arch_from_hf(tmp_path)


def test_what_a_file_leaves_out_is_as_in_transformers(tmp_path):
    """Bug: Mistral's 8 key/value heads or Qwen3's heads of 128 are taken for Llama's defaults; the
    length of pretraining beside the scaling, or Pythia's share of rotated features, is missed."""

    def read(kind, without=(), **change):
        config = {k: v for k, v in CONFIG.items() if k not in without} | {"model_type": kind}
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        return hf.arch_from_hf(tmp_path)

    absent = ("num_key_value_heads", "head_dim")
    heads = lambda kind, count: read(kind, absent, num_attention_heads=count, hidden_size=64)
    assert (heads("mistral", 32)["kv_heads"], heads("mistral", 32)["head_dim"]) == (8, 2)
    assert (heads("qwen2", 64)["kv_heads"], heads("qwen3", 64)["head_dim"]) == (32, 128)
    assert heads("llama", 32)["kv_heads"] == 32
    assert heads("mistral", 32)["window"] == 4096
    assert read("mistral", sliding_window=None)["window"] == 0
    yarn = {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "max_position_embeddings": 64}
    assert read("llama", **yarn)["rope_scaling"].original == 64
    told = read("llama", **yarn, original_max_position_embeddings=32)
    assert told["rope_scaling"].original == 32
    assert read("gpt_neox", ("rope_theta",))["rope_fraction"] == 0.25
    for share in ({"rotary_pct": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}):
        assert read("gpt_neox", **share)["rope_fraction"] == 0.5
    whole = {"rope_parameters": {"partial_rotary_factor": 1.0}}
    assert read("gpt_neox", **whole)["rope_fraction"] == 1.0


def test_a_gpt2_of_another_mlp_is_written_as_such():
    """Bug: its width or its activation is taken for GPT-2's own."""
    fields = arch_fields(GPT2 | {"vocab_size": V, "n_inner": 20, "activation_function": "gelu"}, "")
    assert (fields["mlp_width"], fields["activation"]) == (20, "gelu")
    arch = ArchConfig(**{name: x for name, x in fields.items() if name != "vocab_size"})
    assert arch_fields(config_json(arch, V, True), "") == fields


def test_qwens_windows_begin_above_a_layer(tmp_path):
    """Bugs: the default of max_window_layers, 28, is overlooked; a window is written unused."""
    told = CONFIG | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9}
    for layers, full, window in ((28, None, 0), (40, None, None), (2, 0, 9), (2, 2, 0)):
        config = told | {"num_hidden_layers": layers}
        config |= {} if full is None else {"max_window_layers": full}
        (tmp_path / "config.json").write_text(json.dumps(config))
        if window is None:
            with pytest.raises(UserError, match="in some layers only"):
                hf.arch_from_hf(tmp_path)
        else:
            fields = hf.arch_from_hf(tmp_path)
            assert fields["window"] == window
            arch = ArchConfig(**{name: x for name, x in fields.items() if name != "vocab_size"})
            assert arch_fields(config_json(arch, V, True), tmp_path) == fields


def test_written_in_several_files_and_read_again(tmp_path, devices, monkeypatch):
    """Bugs: the index names another file; the padding of the vocabulary is written; rotary settings
    are written where transformers 4 does not look for them."""
    rope = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 700.0}
    source = write(tmp_path / "source", tensors(), **rope)
    params = hf.load_gen(source, abstract(devices, vocab=16))
    fields = hf.arch_from_hf(source)
    arch = ArchConfig(**{name: value for name, value in fields.items() if name != "vocab_size"})
    monkeypatch.setattr(saving, "FILE_BYTES", 2000)
    (tmp_path / "out").mkdir()
    saving.save(tmp_path / "out", params, arch, V, has_head=True)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert rope.items() <= config.items() and "rope_parameters" not in config
    assert hf.arch_from_hf(tmp_path / "out") == fields
    again = hf.load_gen(tmp_path / "out", abstract(devices, vocab=16))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    total = 0
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}  # transformers 4 asks for it
        for name, array in load_file(file).items():
            total += array.nbytes
            assert len(array) == V or not name.endswith(("embed_tokens.weight", "lm_head.weight"))
            assert index["weight_map"][name] == file.name
    assert index["metadata"] == {"total_size": total}


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("rope scaling 'dynamic'", {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}),
        ("rope scaling 'longrope'", {"rope_scaling": {"type": "longrope", "factor": 2.0}}),
        ("rope scaling 'yarn'", {"rope_scaling": {"rope_type": "yarn", "mscale": 1.0}}),
        ("attention_bias True", {"attention_bias": True}),
        (r"partial_rotary_factor 0\.5", {"partial_rotary_factor": 0.5}),
        (r"partial_rotary_factor 0\.5", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
        ("activation 'relu'", {"hidden_act": "relu"}),
        ("sliding_window .* in some layers only", {"model_type": "qwen2", **SOME_WINDOWS}),
        ("model_type 'gemma2'", {"model_type": "gemma2"}),
        (r"model_type \['llama'\]", {"model_type": ["llama"]}),
        ("position_embedding_type 'relative_key'", RELATIVE),
        ("type_vocab_size 1", {"model_type": "bert", "type_vocab_size": 1}),
        ("mlp_bias True", {"mlp_bias": True}),
        ("scale_attn_by_inverse_layer_idx True", {**GPT2, "scale_attn_by_inverse_layer_idx": True}),
        ("scale_attn_weights False", {**GPT2, "scale_attn_weights": False}),
    ],
)
def test_unsupported_arch_is_named(tmp_path, key, change):
    """Bug: a model that we compute differently loads, and is quietly worse."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(UserError, match=f"{key} is not supported"):
        hf.arch_from_hf(tmp_path)


def test_the_same_weights_are_downloaded_once(tmp_path, monkeypatch):
    """Bug: Mistral's consolidated.safetensors, 14 GB, comes too, and nothing reads it."""
    there = ["config.json", "model-1-of-2.safetensors", "consolidated.safetensors", "README.md"]
    there += ["model.safetensors.index.json", "1_Pooling/config.json", "pytorch_model.bin"]
    wanted = []

    def download(_, allow_patterns, ignore_patterns, **__):
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        wanted.extend(filter_repo_objects(there, **patterns))
        return tmp_path

    monkeypatch.setattr(hf, "snapshot_download", download)
    monkeypatch.setattr(hf, "_offline", lambda: False)
    assert hf.resolve("some/model") == tmp_path
    assert wanted == [name for name in there if name.startswith(("config", "model", "1_"))]


def test_missing_model_is_one_line(tmp_path, monkeypatch):
    """Bug: without a network the hub client retries for a minute, then prints its traceback."""
    assert hf.resolve(tmp_path) == tmp_path
    with pytest.raises(UserError, match="no such directory or file; check the path"):
        hf.resolve(tmp_path / "absent")
    monkeypatch.setattr(hf.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        UserError, match=r"'no/such-model'.*127\.0\.0\.1:9 is out of reach"
    ) as error:
        hf.resolve("no/such-model")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"absent\.gguf': no such directory or file"):
        hf.resolve(tmp_path / "absent.gguf")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="'hidden_size' is missing"):
        hf.arch_from_hf(tmp_path)
