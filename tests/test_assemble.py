"""From config to towers: whose shape counts, and which towers cannot be compared."""

import numpy as np
import pytest
from batches import config
from flax.traverse_util import flatten_dict
from pretrained_files import WORDS, write_llama

from cosup_jax import assemble, optim, parity
from cosup_jax.config import to_dict
from cosup_jax.contract import check_match
from cosup_jax.data import tokenizer
from cosup_jax.dotted import replace_dotted
from cosup_jax.errors import UserError
from cosup_jax.hf import weights as hf

GATE = {"gen__arch__lora__rank": 2, "gen__arch__lora__kernels": "gate,up"}
NEOX = {"gen__arch__family": "gpt_neox", "gen__arch__kv_heads": 4}
GPT2 = {"gen__arch__family": "gpt2", "gen__arch__kv_heads": 4}


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
        (
            {"ctx__init": "scratch", "ctx__arch__width": 32, "ctx__rotate": True},
            "of 32 features pass a learned matrix to Gen's 256 already",
        ),
        ({"ctx__rotate": True, "tie_ctx_to_gen": True}, "ctx.rotate needs a Ctx of its own"),
        ({"ctx__rotate": True, "compat": "official"}, "ctx.rotate=True contradicts compat"),
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
            {**NEOX, **GATE},
            r"config\.gen\.arch\.lora\.kernels=gate,up: a gpt_neox has no gate",
        ),
        (
            {**NEOX, "gen__arch__rope_fraction": 0.33},
            r"rope_fraction=0\.33 of head_dim=64 is no even number",
        ),
        ({"gen__arch__rope_fraction": 0.5}, "rope_fraction means nothing in a llama"),
        ({**GPT2, "gen__arch__rope_theta": 9.0}, "rope_theta means nothing in a gpt2"),
        ({"ctx__pooling": "cls"}, "the first token of a llama sees no other"),
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
    file, init = write_llama(tmp_path, rows), str(tmp_path)
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


def test_one_tower_alone_may_have_frozen_layers(tmp_path):
    """Bug: Ctx, which starts from Gen's file, looks for its layers where Gen has its own."""
    write_llama(tmp_path, 8, layers=3)
    found = assemble.resolve(config(gen__init=str(tmp_path), gen__arch__frozen_layers=1))
    tokenizers = assemble.read_tokenizers(found, tmp_path, assemble.Sources([], [], {}))
    towers, tx = assemble.make_towers(found, tokenizers), optim.make(found, 10, 10)
    abstract = assemble.abstract_state(found, towers, tx, assemble.mesh_for(found))
    params = assemble.initial_state(found, towers, tokenizers, tx, abstract).params
    frozen, rest = (params["gen"][name] for name in ("frozen_blocks", "blocks"))
    assert "frozen_blocks" not in params["ctx"]
    for name, whole in flatten_dict(params["ctx"]["blocks"]).items():
        both = [np.asarray(flatten_dict(part)[name]) for part in (frozen, rest)]
        assert [len(part) for part in both] == [1, 2]
        np.testing.assert_array_equal(np.concatenate(both), whole)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gen.arch.lora.alpha", 64.0),
        ("ctx.arch.norm_eps", 0.1),
        ("ctx.rotate", True),
        ("tie_ctx_to_gen", True),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(key, value):
    """Bug: what was trained with one alpha is merged with another, or Gen serves as the Ctx that
    was trained beside it, and passes for right."""
    bpe = tokenizer.train(["a passage"], 300)
    run, shared = config(), assemble.Tokenizers(bpe, bpe)
    meta = {"contract": assemble.embedding_contract(run, shared, "w").to_dict()}
    meta |= {"config": to_dict(run)}
    assert assemble.check_contract(run, shared, meta).weights == "w"
    with pytest.raises(UserError, match="use the config that it was made with"):
        assemble.check_contract(replace_dotted(run, key, value), shared, meta)


def test_a_gen_that_reads_other_tokens_is_refused():
    """Bugs: beside a Ctx of another tokenizer, new data train Gen another one, and it reads wrong
    ids; a checkpoint of before this was kept is refused."""
    train = lambda text: tokenizer.train([text], 300)
    gen, other, ctx = map(train, ("a passage", "e passaga", "a text"))
    assert (gen.ret, gen.emb) == (other.ret, other.emb) and gen.fingerprint != other.fingerprint
    ours, theirs = (assemble.Tokenizers(found, ctx) for found in (gen, other))
    meta = {"contract": assemble.embedding_contract(config(), ours, "w").to_dict()}
    meta |= {"config": to_dict(config())}
    assert assemble.check_contract(config(), theirs, meta).weights == "w"
    meta |= {"gen_tokenizer": gen.fingerprint}
    assert assemble.check_contract(config(), ours, meta).weights == "w"
    with pytest.raises(UserError, match=r"another tokenizer .* restore the data of config"):
        assemble.check_contract(config(), theirs, meta)


def test_a_learned_temperature_is_that_of_the_contract():
    """Bug: an export says with which temperature its training began, or a checkpoint is refused
    for the one that it has learned."""
    bpe = tokenizer.train(["a passage"], 300)
    shared = assemble.Tokenizers(bpe, bpe)
    for learns in (True, False):
        run = config(loss__learn_temperature=learns, loss__temperature=0.1)
        saved = assemble.embedding_contract(run, shared, "w", 0.07)
        meta = {"contract": saved.to_dict(), "config": to_dict(run)}
        if learns:
            assert assemble.check_contract(run, shared, meta).temperature == 0.07
        else:
            with pytest.raises(UserError, match=r"temperature=0\.07, this model has temper"):
                assemble.check_contract(run, shared, meta)


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


def test_a_comparison_sees_every_number():
    """Bug: one wrong logit among many, NaN in one row, or a row too few counts as none."""
    rows = [np.full((2, 3), 2.0), np.zeros((4, 3))]
    ours = parity.Outputs(rows, np.zeros((2, 3)))

    def check(change, count=2):
        theirs = [row.copy() for row in rows]
        theirs[0][1, 2] += change
        return next(parity.compare("them", ours, logits=theirs[:count]))

    assert check(0.5) == ("gen logits, them", 0.5, 2.0)
    assert not check(np.nan).passed and check(0).passed
    with pytest.raises(ValueError, match="zip"):
        check(0, count=1)
