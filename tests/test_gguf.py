"""GGUF files: weights in Hugging Face's layout, and the tokenizer."""

import itertools
import random
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from cosup_jax.data import tokenizer as tokenizers
from cosup_jax.errors import UserError
from cosup_jax.hf.gguf import GgufFile
from cosup_jax.hf.gguf_tokenizer import read_tokenizer

N, D, H, G, E, F, V = 2, 64, 4, 2, 16, 96, 40
LLAMA = {
    "block_count": N,
    "context_length": 128,
    "embedding_length": D,
    "feed_forward_length": F,
    "attention.head_count": H,
    "attention.head_count_kv": G,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 500000.0,
    "rope.dimension_count": E,
}
LAYER_NORM = {
    **{key: LLAMA[key] for key in ("block_count", "context_length", "embedding_length")},
    "feed_forward_length": F,
    "attention.head_count": H,
    "attention.layer_norm_epsilon": 1e-5,
}


def write(path: Path, arch: str, settings: dict, tensors: dict, kind=Kind.F32, **metadata) -> Path:
    """Matrices are stored as `kind`; `metadata` goes under tokenizer.ggml."""
    writer = gguf.GGUFWriter(path, arch)
    keys = {f"{arch}.{key}": value for key, value in settings.items()}
    keys |= {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    if template := keys.pop("tokenizer.ggml.chat_template", None):
        writer.add_chat_template(template)
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            (writer.add_string if isinstance(value, str) else writer.add_array)(key, value)
    for name, array in tensors.items():
        stored = kind if array.ndim == 2 else Kind.F32
        if stored == Kind.F64:
            writer.add_tensor(name, array.astype(np.float64))
        else:
            writer.add_tensor(name, gguf.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama(bias=False) -> dict[str, np.ndarray]:
    """By Hugging Face's names."""
    rng = np.random.default_rng(0)
    make = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    found = {"embed_tokens.weight": make(V, D), "norm.weight": make(D)}
    for n in range(N):
        at = f"layers.{n}."
        found |= {f"{at}{x}_layernorm.weight": make(D) for x in ("input", "post_attention")}
        for x, rows in (("q", H * E), ("k", G * E), ("v", G * E)):
            found[f"{at}self_attn.{x}_proj.weight"] = make(rows, D)
            if bias:
                found[f"{at}self_attn.{x}_proj.bias"] = make(rows)
        found[f"{at}self_attn.o_proj.weight"] = make(D, H * E)
        found |= {f"{at}mlp.{x}_proj.weight": make(F, D) for x in ("gate", "up")}
        found[f"{at}mlp.down_proj.weight"] = make(D, F)
    return found


def interleaved(array: np.ndarray) -> np.ndarray:
    """Row by row: llama.cpp turns rows 2j and 2j + 1 of a head, Hugging Face j and j + E / 2."""
    out = np.empty_like(array)
    for head in range(len(array) // E):
        for j in range(E // 2):
            out[head * E + 2 * j] = array[head * E + j]
            out[head * E + 2 * j + 1] = array[head * E + j + E // 2]
    return out


def stored_llama(found: dict[str, np.ndarray], permuted=True) -> dict[str, np.ndarray]:
    """By llama.cpp's names and in its layout."""
    short = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    short |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"}
    short |= {"self_attn.o_proj": "attn_output", "lm_head": "output"}
    short |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    short |= {f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"}
    short |= {"embed_tokens": "token_embd", "norm": "output_norm"}
    out = {}
    for name, array in found.items():
        at, _, kind = name.rpartition(".")
        _, layer, rest = at.split(".", 2) if at.startswith("layers.") else ("", "", at)
        turned = permuted and short[rest] in ("attn_q", "attn_k")
        key = f"blk.{layer}.{short[rest]}.{kind}" if layer else f"{short[rest]}.{kind}"
        out[key] = interleaved(array) if turned else array
    return out


def check_equal(file: GgufFile, expected: dict[str, np.ndarray]) -> None:
    assert file.names == expected.keys()
    for name, array in expected.items():
        assert file.tensor(name).get_shape() == list(array.shape), name
        np.testing.assert_array_equal(file.tensor(name)[...], array, err_msg=name)


# Weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_a_llama_comes_back_as_hugging_face_has_it(bias, tmp_path):
    """Catches queries or keys left in llama.cpp's row order, or turned the wrong way round."""
    expected = llama(bias)
    path = write(tmp_path / "m.gguf", "llama", LLAMA, stored_llama(expected))
    file = GgufFile(path)
    check_equal(file, expected)
    assert file.config == {
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": D,
        "num_hidden_layers": N,
        "num_attention_heads": H,
        "num_key_value_heads": G,
        "head_dim": E,
        "intermediate_size": F,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "vocab_size": V,
        "tie_word_embeddings": True,
        "attention_bias": bias,
        "mlp_bias": False,
    }


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_qwen_is_not_permuted(arch, tmp_path):
    """Catches Llama's row order applied to Qwen, a head taken for tied, head_dim guessed."""
    expected = llama(bias=arch == "qwen2")
    expected["lm_head.weight"] = expected["embed_tokens.weight"] + 1
    if arch == "qwen3":
        norms = {f"layers.{n}.self_attn.{x}_norm.weight": n + 2 for n in range(N) for x in "qk"}
        expected |= {name: np.full(E, value, np.float32) for name, value in norms.items()}
    settings = {**LLAMA, "attention.key_length": 20, "rope.dimension_count": 10}
    path = write(tmp_path / "m.gguf", arch, settings, stored_llama(expected, permuted=False))
    file = GgufFile(path)
    check_equal(file, expected)
    wanted = {"model_type": arch, "head_dim": 20, "partial_rotary_factor": 0.5}
    assert wanted.items() <= file.config.items()
    assert not file.config["tie_word_embeddings"]


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1])
def test_quantised_weights_are_near_and_in_place(kind, tmp_path):
    """Catches blocks of a row mixed up by the row order, or a type's blocks read as another's."""
    expected = llama()
    path = write(tmp_path / "m.gguf", "llama", LLAMA, stored_llama(expected), kind)
    file = GgufFile(path)
    bits = {Kind.F16: 11, Kind.BF16: 8, Kind.Q8_0: 7, Kind.Q4_0: 3, Kind.Q4_1: 3}[kind]
    for name, array in expected.items():
        found = file.tensor(name)[...]
        assert found.dtype == np.float32
        assert np.abs(found - array).max() <= np.abs(array).max() * 2.0**-bits, name


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_1])
def test_blocks_by_hand(kind, tmp_path):
    """Catches a scale, an offset or the order of the nibbles taken wrongly."""
    array = llama()["embed_tokens.weight"]
    raw = gguf.quantize(array, kind).tobytes()
    size, expected = {Kind.Q8_0: 34, Kind.Q4_1: 20}[kind], []
    for at in range(0, len(raw), size):
        scale = np.frombuffer(raw[at : at + 2], np.float16)[0].astype(np.float32)
        if kind == Kind.Q8_0:
            expected += [scale * np.float32(x) for x in np.frombuffer(raw[at + 2 : at + 34], "i1")]
        else:
            least = np.frombuffer(raw[at + 2 : at + 4], np.float16)[0].astype(np.float32)
            packed = raw[at + 4 : at + 20]
            nibbles = [x & 15 for x in packed] + [x >> 4 for x in packed]
            expected += [scale * np.float32(x) + least for x in nibbles]
    path = write(tmp_path / "m.gguf", "llama", LLAMA, stored_llama(llama()), kind)
    found = GgufFile(path).tensor("embed_tokens.weight")[...]
    np.testing.assert_array_equal(found, np.array(expected, np.float32).reshape(V, D))


def test_a_part_is_the_part_of_the_whole_and_only_its_rows_are_read(tmp_path, monkeypatch):
    """Catches a slice cut before the row order is undone, and whole tensors read for some rows."""
    stored = stored_llama(llama(bias=True))
    file = GgufFile(write(tmp_path / "m.gguf", "llama", LLAMA, stored, Kind.Q8_0))
    read, dequantize = [], gguf.dequantize
    monkeypatch.setattr(gguf, "dequantize", lambda x, k: read.append(len(x)) or dequantize(x, k))
    for name in file.names:
        tensor, whole = file.tensor(name), file.tensor(name)[...]
        cut = (slice(3, 17), slice(5, 50))[: whole.ndim]
        np.testing.assert_array_equal(tensor[cut], whole[cut], err_msg=name)
        np.testing.assert_array_equal(tensor[3:17], whole[3:17], err_msg=name)
        assert read[-2:] == ([14, 14] if whole.ndim == 2 else [len(whole)] * 2), name


def test_gpt2_has_its_matrices_transposed(tmp_path):
    """Catches GPT-2's Conv1D weights, [in, out] in Hugging Face, left [out, in]."""
    rng = np.random.default_rng(1)
    make = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    expected, stored = {}, {}
    for theirs, name, rows, columns in (
        ("token_embd", "wte", V, D),
        ("position_embd", "wpe", 128, D),
        ("blk.1.attn_qkv", "h.1.attn.c_attn", D, 3 * D),
        ("blk.1.attn_output", "h.1.attn.c_proj", D, D),
        ("blk.1.ffn_up", "h.1.mlp.c_fc", D, F),
        ("blk.1.ffn_down", "h.1.mlp.c_proj", F, D),
    ):
        expected[f"{name}.weight"] = make(rows, columns)
        is_conv = theirs.startswith("blk")
        array = expected[f"{name}.weight"]
        stored[f"{theirs}.weight"] = np.ascontiguousarray(array.T) if is_conv else array
    expected["h.1.attn.c_attn.bias"] = stored["blk.1.attn_qkv.bias"] = make(3 * D)
    file = GgufFile(write(tmp_path / "m.gguf", "gpt2", LAYER_NORM, stored))
    check_equal(file, expected)
    cut = (slice(5, 9), slice(70, 90))
    np.testing.assert_array_equal(
        file.tensor("h.1.attn.c_attn.weight")[cut], expected["h.1.attn.c_attn.weight"][cut]
    )
    assert {"model_type": "gpt2", "n_embd": D, "n_positions": 128}.items() <= file.config.items()


def test_neox_has_query_key_value_head_by_head(tmp_path):
    """Catches llama.cpp's order, all queries first, left in GPT-NeoX's fused matrix."""
    rng = np.random.default_rng(2)
    for shape, suffix in (((3 * D, D), "weight"), ((3 * D,), "bias")):
        array = rng.standard_normal(shape).astype(np.float32)
        heads = np.split(array, 3 * H)  # q, k, v of head 0, then of head 1, ...
        stored = {
            "token_embd.weight": np.zeros((V, D), np.float32),
            f"blk.0.attn_qkv.{suffix}": np.concatenate([*heads[0::3], *heads[1::3], *heads[2::3]]),
        }
        settings = {**LAYER_NORM, "rope.dimension_count": 4, "use_parallel_residual": False}
        file = GgufFile(write(tmp_path / f"{suffix}.gguf", "gptneox", settings, stored))
        tensor = file.tensor(f"layers.0.attention.query_key_value.{suffix}")
        np.testing.assert_array_equal(tensor[...], array)
        np.testing.assert_array_equal(tensor[20:70], array[20:70])
    assert file.config["rotary_pct"] == 0.25 and file.config["use_parallel_residual"] is False


def test_bert_by_name(tmp_path):
    """Catches the two norms of a BERT layer exchanged."""
    names = {
        "token_embd.weight": "embeddings.word_embeddings.weight",
        "token_types.weight": "embeddings.token_type_embeddings.weight",
        "token_embd_norm.bias": "embeddings.LayerNorm.bias",
        "blk.1.attn_k.bias": "encoder.layer.1.attention.self.key.bias",
        "blk.1.attn_output_norm.weight": "encoder.layer.1.attention.output.LayerNorm.weight",
        "blk.1.layer_output_norm.weight": "encoder.layer.1.output.LayerNorm.weight",
        "blk.1.ffn_down.weight": "encoder.layer.1.output.dense.weight",
    }
    stored = {name: np.full((2, D), i, np.float32) for i, name in enumerate(names)}
    file = GgufFile(write(tmp_path / "m.gguf", "bert", LAYER_NORM, stored))
    check_equal(file, {names[name]: array for name, array in stored.items()})
    assert file.config["type_vocab_size"] == 2 and file.config["layer_norm_eps"] == 1e-5


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling_is_recovered(factor, tmp_path):
    """Catches a Llama 3.1 or 3.2 read as unscaled, and other factors taken for its."""
    head_dim, expected = 64, []
    for i in range(0, head_dim, 2):  # as Llama's reference code has it
        wavelength = 2 * np.pi * 500000.0 ** (i / head_dim)
        smooth = (8192 / wavelength - 1) / 3
        between = 1 / ((1 - smooth) / factor + smooth)
        expected.append(1 if wavelength < 2048 else factor if wavelength > 8192 else between)
    settings = {**LLAMA, "attention.key_length": 64, "rope.dimension_count": 64}
    stored = {
        "token_embd.weight": np.zeros((V, D), np.float32),
        "rope_freqs.weight": np.array(expected, np.float32),
    }
    file = GgufFile(write(tmp_path / "m.gguf", "llama", settings, stored))
    assert file.names == {"embed_tokens.weight"}
    assert file.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    path = write(tmp_path / "two.gguf", "llama", settings | {"rope.scaling.factor": 2.0}, stored)
    check_error(lambda: GgufFile(path), path, "rope.scaling beside rope_freqs.weight")
    stored["rope_freqs.weight"][20] *= 1.01
    path = write(tmp_path / "other.gguf", "llama", settings, stored)
    check_error(lambda: GgufFile(path), path, "rope_freqs.weight")


@pytest.mark.parametrize(
    ("stored", "factor"),
    [
        ({"scaling.factor": 4.0}, 4.0),
        ({"scale_linear": 4.0}, 4.0),
        ({"scaling.factor": 2.0, "scale_linear": 4.0}, 2.0),
        ({"scaling.type": "linear", "scale_linear": 4.0}, 4.0),
        ({"scaling.type": "none", "scaling.factor": 4.0}, 0),
        ({"scaling.type": "linear", "scaling.factor": 1.0}, 0),
        ({"scaling.factor": 0.0, "scaling.original_context_length": 64}, 0),
    ],
)
def test_a_rope_scaling_without_a_type_is_linear(stored, factor, tmp_path):
    """Bug: positions that llama.cpp divides by a factor are read as they are."""
    settings = LLAMA | {f"rope.{key}": value for key, value in stored.items()}
    tensors = {"token_embd.weight": np.zeros((V, D), np.float32)}
    config = GgufFile(write(tmp_path / "m.gguf", "llama", settings, tensors)).config
    expected = {"rope_type": "linear", "factor": factor} if factor else None
    assert config.get("rope_scaling") == expected


def test_what_else_the_file_says(tmp_path):
    """Catches Mistral's window lost with its name, and a linear or YaRN scaling dropped."""
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 64, "finetuned": True}
    settings = {**LLAMA, **{f"rope.scaling.{key}": value for key, value in scaling.items()}}
    settings["attention.sliding_window"] = 32
    stored = {"token_embd.weight": np.zeros((V, D), np.float32)}
    config = GgufFile(write(tmp_path / "m.gguf", "llama", settings, stored)).config
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 32)
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert config["rope_scaling"] == expected
    for number, known in enumerate((settings, LLAMA)):  # without a type as well
        scaled = known | {"rope.scaling.attn_factor": 2.0}
        path = write(tmp_path / f"{number}.gguf", "llama", scaled, stored)
        check_error(lambda path=path: GgufFile(path), path, "attn_factor")


# Errors -----------------------------------------------------------------------------------------


def check_error(call, path: Path, *words: str) -> None:
    with pytest.raises(UserError) as found:
        call()
    line = str(found.value)
    assert "\n" not in line and len(line) < 400
    assert str(path) in line and all(word in line for word in words), line


def test_a_file_cut_short_is_refused(tmp_path):
    """Catches a traceback, or zeros, from a download that broke off."""
    metadata = byte_level("smollm", [])
    whole = write(tmp_path / "m.gguf", "llama", LLAMA, stored_llama(llama()), **metadata)
    data = whole.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (*range(300), *range(300, len(data), len(data) // 12), len(data) - 1):
        cut.write_bytes(data[:size])
        check_error(lambda: GgufFile(cut), cut, "whole")


def test_what_is_no_model_of_ours_is_refused_in_a_line(tmp_path):
    """Catches a model that would load as another, and tracebacks of the reader."""
    good = stored_llama(llama())
    text = tmp_path / "text.gguf"
    text.write_text("version https://git-lfs.github.com/spec/v1\n" * 9)
    for path in (text, tmp_path, tmp_path / "absent.gguf"):
        check_error(lambda path=path: GgufFile(path), path)
    experts = {**good, "blk.0.ffn_gate_exps.weight": np.zeros((4, D), np.float32)}
    headless = {name: x for name, x in good.items() if name != "token_embd.weight"}
    odd = {**good, "blk.0.attn_q.weight": np.zeros((H * E + 1, D), np.float32)}
    eps = "attention.layer_norm_rms_epsilon"
    for i, (arch, settings, tensors, words) in enumerate(
        (
            ("gemma2", LLAMA, good, ("gemma2", "qwen3")),
            ("llama", LLAMA, experts, ("blk.0.ffn_gate_exps.weight",)),
            ("llama", LLAMA, headless, ("token_embd.weight",)),
            ("llama", LLAMA, odd, ("blk.0.attn_q.weight",)),
            ("llama", {k: v for k, v in LLAMA.items() if k != eps}, good, (eps,)),
            ("llama", {**LLAMA, "attention.head_count": 0}, good, ("head_count",)),
            ("llama", {**LLAMA, "attention.head_count": 65}, good, ("head_count",)),
            ("llama", {**LLAMA, "attention.key_length": 1}, good, ("attn_q",)),
            ("llama", {**LLAMA, "attention.head_count_kv": [2, 4]}, good, ("head_count_kv",)),
        )
    ):
        path = write(tmp_path / f"{i}.gguf", arch, settings, tensors)
        check_error(lambda path=path: GgufFile(path), path, *words)
    path = write(tmp_path / "f64.gguf", "llama", LLAMA, good, Kind.F64)
    check_error(lambda: GgufFile(path).tensor("embed_tokens.weight")[:], path, "F64", "token_embd")


def test_other_forms_of_the_file_are_refused(tmp_path):
    """Catches one part taken for the model, and swapped bytes for numbers."""
    path, swapped = tmp_path / "m-00001-of-00003.gguf", tmp_path / "swapped.gguf"
    for where, order in ((path, gguf.GGUFEndian.LITTLE), (swapped, gguf.GGUFEndian.BIG)):
        writer = gguf.GGUFWriter(where, "llama", endianess=order)
        writer.add_uint16("split.count", 3)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    check_error(lambda: GgufFile(path), path, "3 parts", "--merge")
    check_error(lambda: GgufFile(swapped), swapped, "byte order")


# Tokenizer --------------------------------------------------------------------------------------

TEXTS = [
    "Hello world, hello  you",
    "  leading, trailing \t\n\n\r\n ",
    "In 2024: 1234567 * 3.14 = ?",
    "def f(x):\n\tif x != 3:\n        return x**2  # I'll, HE'S",
    "naïve Ünïcödé, 日本語, Привет, 🚀👩‍👧",
    "</s> <|end|> [Ret] \u2581 <0x41>",
    "",
]


def spelling() -> list[str]:
    """GPT-2's printable character for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b if b in plain else next(others)) for b in range(256)]


def byte_level(pre: str | None, words: list[str], **more) -> dict:
    """Metadata of a vocabulary in which each of `words` is one entry, built from the left."""
    table = spelling()
    tokens, merges = ["<|end|>", "<|start|>", "<think>", *table], []
    for word in (*words, "qj"):  # an empty list cannot be stored
        letters = [table[b] for b in word.encode()]
        for i in range(1, len(letters)):
            merge = f"{''.join(letters[:i])} {letters[i]}"
            if merge not in merges:
                merges.append(merge)
                tokens.append(merge.replace(" ", ""))
    return {
        "model": "gpt2",
        **({} if pre is None else {"pre": pre}),
        "tokens": tokens,
        "token_type": [3, 3, 4] + [1] * (len(tokens) - 3),
        "merges": merges,
        "eos_token_id": 0,
        "bos_token_id": 1,
        **more,
    }


def tokenizer_file(path: Path, metadata: dict) -> Path:
    return write(path, "llama", {}, {"token_embd.weight": np.zeros((2, 2), np.float32)}, **metadata)


SPLITS = {  # by hand, from llama.cpp's table of patterns
    "gpt-2": "camelCase| | 12345|,|\n\n| I|'|LL| x|.|Y| .|Z",
    "olmo": "camelCase| | 12345|,|\n\n| I|'|LL| x|.|Y| .|Z",
    "smollm": "camelCase|  |1|2|3|4|5|,|\n\n| I|'|LL| x|.|Y| .|Z",
    "starcoder": "camelCase|  |1|2|3|4|5|,|\n\n| I|'|LL| x|.|Y| .|Z",
    "llama-bpe": "camelCase| | |123|45|,\n\n| I|'LL| x|.Y| .|Z",
    "qwen2": "camelCase| | |1|2|3|4|5|,\n\n| I|'LL| x|.Y| .|Z",
    "tekken": "camel|Case| | |1|2|3|4|5|,\n\n| I|'LL| x|.Y| .|Z",
    "default": "camelCase| | |123|45|,|\n\n| I|'|LL| x|.|Y| |.|Z",
}


@pytest.mark.parametrize("pre", SPLITS)
def test_words_are_split_as_the_file_says(pre, tmp_path):
    """Catches another model's splitting of words and digits, which gives other ids unnoticed."""
    fast = read_tokenizer(tokenizer_file(tmp_path / "m.gguf", byte_level(pre, [])))
    text = SPLITS[pre].replace("|", "")
    found = [word for word, _ in fast.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert "|".join(found).translate({0x120: " ", 0x10A: "\n"}) == SPLITS[pre]


@pytest.mark.parametrize("pre", SPLITS)
def test_byte_level_texts_come_back(pre, tmp_path):
    """Catches bytes lost by the splitting, and a control token made of text."""
    path = tokenizer_file(tmp_path / "m.gguf", byte_level(pre, [" hello", "  ", "日本", "</s>"]))
    ours = tokenizers.Tokenizer(read_tokenizer(path))
    for text in TEXTS:
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        assert not {0, 1} & set(ids)
    assert len(ours.encode("x hello")) == 2


def test_entries_keep_ids_and_roles(tmp_path):
    """Catches special tokens appended anew, and roles, bos, eos or template of the file dropped."""
    metadata = byte_level("smollm", [" hello"], padding_token_id=0, unknown_token_id=0)
    path = tokenizer_file(tmp_path / "m.gguf", metadata)
    fast = read_tokenizer(path)
    assert fast.convert_ids_to_tokens(range(len(fast))) == metadata["tokens"]
    roles = (fast.bos_token_id, fast.eos_token_id, fast.pad_token_id, fast.unk_token_id)
    assert roles == (1, 0, 0, 0)
    assert fast.encode("<think><|end|>") == [2, 0]
    metadata |= {"add_bos_token": True, "add_eos_token": True, "chat_template": "{{ x }}"}
    fast = read_tokenizer(tokenizer_file(tmp_path / "both.gguf", metadata))
    assert fast.encode("") == [1, 0] and fast.chat_template == "{{ x }}"


def test_llama3_has_bos_and_whole_words(tmp_path):
    """Catches bos left out where the file need not ask for it, and words built by merges only."""
    metadata = byte_level("llama-bpe", [])
    metadata["tokens"].append("hello")
    metadata["token_type"].append(1)
    word = len(metadata["tokens"]) - 1
    fast = read_tokenizer(tokenizer_file(tmp_path / "m.gguf", metadata))
    assert fast.encode("hello") == [1, word]
    assert tokenizers.Tokenizer(fast).prefix == (1,)
    without = tokenizer_file(tmp_path / "w.gguf", metadata | {"add_bos_token": False})
    assert read_tokenizer(without).encode("hello") == [word]
    other = tokenizer_file(tmp_path / "o.gguf", metadata | {"pre": "gpt-2"})
    assert len(read_tokenizer(other).encode("hello")) == 5


def test_composed_characters(tmp_path):
    """Catches the Unicode normalization of Qwen, which llama.cpp leaves out, left out here too."""
    for pre, same in (("qwen2", True), ("olmo", True), ("smollm", False)):
        fast = read_tokenizer(tokenizer_file(tmp_path / f"{pre}.gguf", byte_level(pre, [])))
        assert (fast.encode("e\u0301") == fast.encode("\u00e9")) == same


def sentencepiece(**more) -> dict:
    words = [
        "\u2581",
        *"abcd<>/s",
        "ab",
        "\u2581a",
        "cd",
        "abc",
        "bcd",
        "\u2581\u2581",
        "dd",
        "</",
        "s>",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-1.0 - i for i in range(len(words))],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def test_sentencepiece_merges_the_best_first(tmp_path):
    """Catches merges in another order than the scores', and bytes, prefix or bos lost."""
    metadata = sentencepiece()
    ids = {token: i for i, token in enumerate(metadata["tokens"])}
    score = dict(zip(metadata["tokens"][259:], metadata["scores"][259:], strict=True))
    fast = read_tokenizer(tokenizer_file(tmp_path / "m.gguf", metadata))
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("abcd  é") for _ in range(rng.randint(1, 12)))
        parts = list("\u2581" + text.replace(" ", "\u2581"))
        while found := [
            (score[a + b], -i)
            for i, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in score
        ]:
            at = -max(found)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        expected = [1]
        for part in parts:
            expected += [ids[part]] if part in ids else [3 + b for b in part.encode()]
        assert fast.encode(text) == expected, text
        assert fast.decode(fast.encode(text), skip_special_tokens=True) == text
    bare = tokenizer_file(tmp_path / "b.gguf", sentencepiece(add_space_prefix=False))
    assert read_tokenizer(bare).encode("a", add_special_tokens=False) == [ids["a"]]


def test_sentencepiece_text_is_no_control_token(tmp_path):
    """Catches "</s>" put together from "</" and "s>" by a merge of the control token's own."""
    ours = tokenizers.Tokenizer(
        read_tokenizer(tokenizer_file(tmp_path / "m.gguf", sentencepiece()))
    )
    assert ours.prefix == (1,)
    for text in TEXTS:
        assert not {1, 2} & set(ours.encode(text))
        assert ours.decode(ours.encode(text)) == text.replace("\u2581", " ")  # one to it


def wordpiece(cased: bool) -> dict:
    hello = "\u2581Hello" if cased else "\u2581hello"
    words = [hello, "\u2581read", "ing", "\u2581,", "\u2581caf", "e"]
    return {
        "model": "bert",
        "tokens": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words],
        "token_type": [3, 3, 3, 3, *[1] * len(words)],
        "unknown_token_id": 1,
        "bos_token_id": 2,
        "seperator_token_id": 3,
        "padding_token_id": 0,
    }


@pytest.mark.parametrize("cased", [False, True])
def test_wordpiece(cased, tmp_path):
    """Catches llama.cpp's marks, at the first piece of a word, left for BERT's, at the others."""
    fast = read_tokenizer(tokenizer_file(tmp_path / "m.gguf", wordpiece(cased)))
    assert fast.encode("Hello, reading ing") == [2, 4, 7, 5, 6, 1, 3]
    assert fast.encode("café") == ([2, 1, 3] if cased else [2, 8, 9, 3])
    assert (fast.cls_token, fast.sep_token) == ("[CLS]", "[SEP]")
    told = wordpiece(cased) | {"normalizer.lowercase": cased}  # whatever its entries look like
    told = read_tokenizer(tokenizer_file(tmp_path / "told.gguf", told))
    assert told.encode("READ") == ([2, 5, 3] if cased else [2, 1, 3])
    assert fast.backend_tokenizer.encode("reading", "ing").type_ids == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("metadata", "frame"),
    [
        (sentencepiece(), ((1,), ())),
        (byte_level("llama-bpe", [" hello"], add_eos_token=True), ((1,), (0,))),
        (wordpiece(cased=True), ((2,), (3,))),
    ],
)
def test_it_survives_saving(metadata, frame, tmp_path):
    """Catches what lives in the Python object only, and is lost with a checkpoint."""
    ours = tokenizers.load(tokenizer_file(tmp_path / "m.gguf", metadata))
    ours.save(tmp_path / "saved")
    again = tokenizers.load(tmp_path / "saved")
    assert again.fingerprint == ours.fingerprint
    assert (again.prefix, again.suffix) == (ours.prefix, ours.suffix) == frame
    assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]


def test_a_tokenizer_that_is_not_known_is_refused_in_a_line(tmp_path):
    """Catches an unknown splitting of text taken for GPT-2's, and tracebacks of tokenizers."""
    good = byte_level("smollm", [])
    twice = {**good, "tokens": [*good["tokens"][:-1], good["tokens"][5]]}
    for i, (metadata, words) in enumerate(
        (
            (byte_level("kimi-k2", []), ("kimi-k2", "llama-bpe")),
            (byte_level(None, []), ("None", "llama-bpe")),
            ({**good, "model": "t5"}, ("t5", "bert")),
            ({}, ("tokenizer None",)),
            (twice, ("twice",)),
            ({k: v for k, v in good.items() if k != "merges"}, ("merges",)),
            ({**good, "merges": ["q w", "qw zzz"]}, ()),
            ({**good, "token_type": [1, 1]}, ()),
            ({**good, "eos_token_id": 10**6}, ()),
            ({k: v for k, v in good.items() if k != "bos_token_id"} | {"pre": "tekken"}, ("bos",)),
        )
    ):
        path = tokenizer_file(tmp_path / f"{i}.gguf", metadata)
        check_error(lambda path=path: read_tokenizer(path), path, *words)
