"""From config to towers: whose shape counts, and which towers cannot be compared."""

import json

import numpy as np
import pytest
from batches import config
from safetensors.numpy import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from cosup_jax import assemble, optim, parity
from cosup_jax.contract import check_match
from cosup_jax.data import tokenizer
from cosup_jax.errors import UserError
from cosup_jax.hf import weights as hf

GATE = {"gen__arch__lora__rank": 2, "gen__arch__lora__kernels": "gate"}
WORDS = ["</s>", "a", "b", "c", "d", "e"]
PADDING = 100.0  # what the file holds in rows that its tokenizer has no entry for


def pretrained(directory, rows):
    """A Llama of one layer whose table has `rows` rows, six of them its tokenizer's."""
    D, rng = 8, np.random.default_rng(0)
    make = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    padded = lambda: np.append(make(len(WORDS), D), np.full((rows - len(WORDS), D), PADDING), 0)
    names = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up")
    weights = {f"layers.0.{name}_proj": make(D, D) for name in (*names, "mlp.down")}
    weights |= {f"layers.0.{name}_layernorm": make(D) for name in ("input", "post_attention")}
    weights |= {"embed_tokens": padded(), "lm_head": padded(), "norm": make(D)}
    found = {f"{name}.weight": array.astype(np.float32) for name, array in weights.items()}
    save_file(found, directory / "model.safetensors")
    shape = {"hidden_size": D, "intermediate_size": D, "vocab_size": rows, "num_hidden_layers": 1}
    (directory / "config.json").write_text(json.dumps({"num_attention_heads": 2, **shape}))
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "a"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(directory)
    return found


def test_a_ctx_that_starts_as_gen_has_its_shape():
    """Bug: Ctx keeps the default shape, or loses its own numerics."""
    found = assemble.resolve(config(gen__arch__width=64, ctx__arch__dtype="bfloat16"))
    assert found.ctx.arch.width == 64 and found.ctx.arch.dtype == "bfloat16"


def test_a_tied_ctx_has_all_of_gens_parameters():
    """Bug: Ctx reads Gen's parameters as a tower without adapters, which then do nothing there."""
    keys = {"tie_ctx_to_gen": True, "gen__arch__lora__rank": 4, "ctx__arch__dtype": "bfloat16"}
    found = assemble.resolve(config(**keys))
    assert found.ctx.arch.lora.rank == 4 and found.ctx.arch.dtype == "bfloat16"
    assert assemble.resolve(config(gen__arch__lora__rank=4)).ctx.arch.lora.rank == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"ctx__init": "scratch", "ctx__arch__width": 32, "compat": "official"},
            r"ctx\.arch\.width=32 differ; compat='official' has no projection",
        ),
        ({"gen__arch__family": "bert"}, "a bert sees what it should predict"),
        (
            {"gen__arch__family": "gpt2", "gen__arch__max_positions": 20},
            "max_gen_tokens=24 is beyond the 20 positions that gen's gpt2 has learned",
        ),
        (
            {"ctx__init": "scratch", "ctx__arch__family": "bert", "ctx__arch__max_positions": 8},
            "max_ctx_tokens=10 is beyond the 8 positions that ctx's bert has learned",
        ),
        ({"gen__arch__window": 4}, r"config\.gen\.arch\.window=4: a llama has none"),
        (
            {"gen__arch__family": "gpt2", "gen__arch__heads": 4, "gen__arch__kv_heads": 2},
            "kv_heads=2 must be heads=4 in a gpt2",
        ),
        (
            {"gen__arch__family": "gpt_neox", "gen__arch__kv_heads": 4, **GATE},
            r"config\.gen\.arch\.lora\.kernels=gate names none that a gpt_neox has",
        ),
        (
            {"gen__arch__rope_fraction": 0.33},
            r"rope_fraction=0\.33 of head_dim=64 is no even number",
        ),
    ],
)
def test_towers_that_cannot_do_it_are_refused(keys, message):
    """Bugs: a projection in an objective that knows none; an encoder that reads its own targets;
    positions beyond the table, which a gather would clamp in silence; what trains here, and an
    export of it cannot say or computes otherwise."""
    with pytest.raises(UserError, match=message):
        assemble.resolve(config(**keys))


def test_a_batch_that_does_not_split_is_refused():
    """Bug: an uneven batch, told by a sharding error after compilation."""
    with pytest.raises(UserError, match=r"ctx_rows=12 is no multiple of 8 .* try 16"):
        assemble.mesh_for(config(data__ctx_rows=12))


@pytest.mark.parametrize("ctx_init", ["gen", "the same"])
@pytest.mark.parametrize("rows", [8, 192], ids=["some new tokens beyond", "padded further than we"])
def test_added_tokens_never_start_in_the_padding_of_a_table(tmp_path, rows, ctx_init):
    """Bug: [Ret] and [Emb] start at whatever a padded table holds behind its tokenizer's rows."""
    file, init = pretrained(tmp_path, rows), str(tmp_path)
    keys = {"gen__init": init, "ctx__init": init if ctx_init == "the same" else "gen"}
    found = assemble.resolve(config(**keys))
    tokenizers = assemble.read_tokenizers(found, tmp_path, assemble.Sources([], [], {}))
    assert tokenizers.gen.emb == 9 and tokenizers.gen.vocab_size == 11
    towers, tx = assemble.make_towers(found, tokenizers), optim.make(found, 10, 10)
    abstract = assemble.abstract_state(found, towers, tx, assemble.mesh_for(found))
    params = assemble.initial_state(found, towers, tokenizers, tx, abstract).params
    for ours_VxD, name in (
        (params["gen"]["embed"]["table"], "embed_tokens.weight"),
        (params["gen"]["head"]["kernel"].T, "lm_head.weight"),
        (params["ctx"]["embed"]["table"], "embed_tokens.weight"),
    ):
        ours_VxD, old_VxD = np.asarray(ours_VxD), file[name][: len(WORDS)]
        np.testing.assert_array_equal(ours_VxD[: len(WORDS)], old_VxD)
        off = np.abs(ours_VxD[len(WORDS) :] - old_VxD.mean(axis=0)) / old_VxD.std(axis=0)
        assert ours_VxD.shape[0] == 128 and 0 < off.max() < 6 * hf.NEW_ROW_NOISE


def test_a_tied_tower_pools_at_a_token_of_its_own():
    """Bug: the config is refused, or vectors read at eos and at [Emb] are compared."""
    tokens = tokenizer.train(["a passage"], 300)
    shared = assemble.Tokenizers(tokens, tokens)
    at_eos, at_emb = (
        assemble.embedding_contract(
            config(tie_ctx_to_gen=True, ctx__pooling=pooling), shared, "weights"
        )
        for pooling in ("eos", "token")
    )
    assert at_emb.emb == tokens.emb
    assert at_emb.emb not in (at_emb.ret, at_emb.cs, at_emb.ce, at_emb.pad, at_emb.eos)
    with pytest.raises(UserError, match="made with pooling='eos', this model has pooling='token'"):
        check_match(at_emb, at_eos, "the index")


def test_contract_names_the_emb_that_ctx_reads():
    """Bug: with two tokenizers the contract carries an id at which no passage is read."""
    gen, ctx = (tokenizer.train(["a passage"], size) for size in (258, 261))
    contract = assemble.embedding_contract(config(), assemble.Tokenizers(gen, ctx), "weights")
    assert contract.emb == ctx.emb != gen.emb


def test_a_check_of_parity_is_strict():
    """Bug: a tolerance that lets a wrong model through, or NaN."""
    check = lambda difference, largest: parity.Check("", difference, largest).passed
    assert check(0.9e-4, 0.1) and check(2.9e-4, 3.0)
    assert not check(1.1e-4, 0.1) and not check(3.1e-4, 3.0) and not check(float("nan"), 1.0)
