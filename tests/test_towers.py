"""What is read of the towers, and which of their parameters are trained."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import ARCH, VOCAB, assert_close, config, random_batch
from flax.traverse_util import flatten_dict

from cosup_jax import optim, step
from cosup_jax.config import LoraConfig
from cosup_jax.cosup import Factors
from cosup_jax.data.batch import batch_shape
from cosup_jax.dotted import replace_dotted
from cosup_jax.model.adapters import merge_adapters
from cosup_jax.model.transformer import Transformer
from cosup_jax.towers import Towers, passage_vectors

SMALL = dataclasses.replace(ARCH, heads=4, mlp_width=64)
NARROW = dataclasses.replace(SMALL, width=16)
ADAPTED = dataclasses.replace(SMALL, lora=LoraConfig(rank=2, kernels="q,v,up"))
HALF_FROZEN = dataclasses.replace(SMALL, frozen_layers=1, freeze_embeddings=True)


def pair(gen=SMALL, ctx=SMALL) -> Towers:
    return Towers(Transformer(gen, VOCAB), Transformer(ctx, VOCAB, has_head=False))


def told(gen=SMALL, ctx=SMALL, **keys):
    """A config that says of the towers what they are."""
    found = config(ctx__init="scratch", **keys)
    of = lambda part, arch: dataclasses.replace(part, arch=arch, init="given")
    return dataclasses.replace(found, gen=of(found.gen, gen), ctx=of(found.ctx, ctx))


DECAYED = {"optim__weight_decay": 0.1, "optim__clip_norm": 1e-3}


@functools.cache
def trained(towers: Towers, run) -> tuple:
    """The state before and after two steps, and the metrics."""
    tx, batch = optim.make(run, 10, 10), random_batch(0, batch_shape(run))
    params = lambda key: step.init_params(key, towers, run)
    fresh = lambda key: step.init_state(params(key), jax.random.key(1), tx, run)
    state = jax.jit(fresh)(jax.random.key(0))
    one = jax.jit(functools.partial(step.train_step, towers=towers, tx=tx, config=run))
    factors = Factors.of(run.loss)
    after, _ = one(state, batch, factors)
    after, metrics = one(after, batch, factors)
    return state, after, metrics


def changed(before: dict, after: dict) -> set[str]:
    after = flatten_dict(after, sep="/")
    return {
        name
        for name, leaf in flatten_dict(before, sep="/").items()
        if (np.asarray(leaf) != np.asarray(after[name])).any()
    }


def moments(state) -> set[str]:
    """Parameters that the optimizer keeps anything of."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)]
    keys = [[p.key for p in path if isinstance(p, jax.tree_util.DictKey)] for path in paths]
    return {"/".join(key) for key in keys if len(key) > 1}  # one key: a count of its own


@pytest.mark.parametrize("pooling", ["last", "cls", "mean"])
def test_pooling_reads_its_own_passage(pooling):
    """Bugs: [CLS] of the row instead of the passage's, a mean over neighbours or padding, a mean
    that is a sum."""
    run = told(ctx__pooling=pooling, loss__normalize=False)
    batch, towers = random_batch(0, batch_shape(run)), pair()
    params = jax.jit(towers.ctx.init)(jax.random.key(0))
    rows = (batch.ctx_tokens_UxL, batch.ctx_segments_UxL, batch.ctx_positions_UxL)
    hidden_UxLxD = np.asarray(jax.jit(towers.ctx.hidden)(params, *rows))
    found = np.asarray(jax.jit(lambda p: passage_vectors(p, batch, towers, run))(params))
    checked = 0
    for u, p in np.argwhere(batch.passage_valid_UxP):
        own_TxD = hidden_UxLxD[u][batch.ctx_segments_UxL[u] == p + 1]
        want_D = {"last": own_TxD[-1], "cls": own_TxD[0], "mean": own_TxD.mean(axis=0)}[pooling]
        assert_close(found[u, p], want_D)
        checked += len(own_TxD) > 2
    assert checked > 5


def test_a_narrower_ctx_is_projected_and_learns_to_be():
    """Bugs: vectors of two widths meet; the projection never learns, or freezes with Ctx."""
    towers, run = pair(ctx=NARROW), told(ctx=NARROW, ctx__freeze=True, loss__normalize=False)
    assert towers.projects and not pair().projects
    before, after, metrics = trained(towers, run)
    batch = random_batch(0, batch_shape(run))
    ctx = before.params["ctx"]
    plain = {name: leaf for name, leaf in ctx.items() if name != "projection"}
    read = jax.jit(lambda params: passage_vectors(params, batch, towers, run))
    wide, narrow = read(ctx), read(plain)
    assert wide.shape[-1] == 32 and narrow.shape[-1] == 16
    assert_close(wide, np.asarray(narrow) @ np.asarray(ctx["projection"]), 1e-4)
    assert changed(before.params["ctx"], after.params["ctx"]) == {"projection"}
    assert np.isfinite(metrics["nsp/nats_per_ret"])


def test_a_rotation_hides_where_ctx_starts():
    """Bugs: a matrix that bends the space; one that is near the identity, so that queries find
    their passages all the same; one that is trained, or rounded as what is not trained may be; the
    same for every seed."""
    plain, towers = told(ctx__pooling="last"), pair()
    keys = {
        "rotate": True,
        "init": "gen",
        "arch": dataclasses.replace(SMALL, frozen_dtype="bfloat16"),
    }
    run = dataclasses.replace(plain, gen=config().gen, ctx=dataclasses.replace(plain.ctx, **keys))
    make = jax.jit(lambda key: step.init_params(key, towers, run))
    params, again = make(jax.random.key(0)), make(jax.random.key(1))
    rotation_DxD = np.asarray(params["ctx"]["projection"])
    assert_close(rotation_DxD @ rotation_DxD.T, np.eye(towers.gen.width), 1e-5)
    assert np.abs(rotation_DxD - again["ctx"]["projection"]).max() > 0.1
    left = step.trainable(params, run)["ctx"]
    assert set(params["ctx"]) - set(left) == {"projection"}
    batch = random_batch(0, batch_shape(plain), vocab=VOCAB)
    read = jax.jit(lambda params: passage_vectors(params, batch, towers, plain))
    queries_NxD = read(params["gen"])[batch.passage_valid_UxP]  # Gen, of each text by itself
    vectors_NxD, turned_NxD = (read(p)[batch.passage_valid_UxP] for p in (left, params["ctx"]))
    assert_close(turned_NxD @ turned_NxD.T, vectors_NxD @ vectors_NxD.T, 1e-5)
    unlike = np.unique(np.round(vectors_NxD, 3), axis=0, return_index=True)[1]
    found = lambda corpus_NxD: np.argmax(queries_NxD[unlike] @ corpus_NxD[unlike].T, axis=1)
    hits = lambda corpus_NxD: np.sum(found(corpus_NxD) == np.arange(len(unlike)))
    assert hits(vectors_NxD) == len(unlike) > 15 and hits(turned_NxD) < 4


def test_adapters_change_nothing_at_first_and_merge_into_the_kernels():
    """Bugs: an update that is not zero at the start, scaled otherwise when merged, or merged into
    another layer."""
    towers, plain = pair(ADAPTED, ADAPTED), pair()
    before, after, _ = trained(towers, told(ADAPTED, ADAPTED, **DECAYED))
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, VOCAB)
    rows = (tokens, jnp.ones((2, 12), jnp.int32), jnp.broadcast_to(jnp.arange(12), (2, 12)))
    adapted, bare_hidden = jax.jit(towers.gen.hidden), jax.jit(plain.gen.hidden)
    bare = merge_adapters(before.params["gen"], ADAPTED)
    assert not [name for name in flatten_dict(bare, sep="/") if "lora" in name]
    assert_close(adapted(before.params["gen"], *rows), bare_hidden(bare, *rows))
    merged = merge_adapters(after.params["gen"], ADAPTED)
    attn = jax.tree.map(np.asarray, after.params["gen"]["blocks"]["attn"])
    update = np.einsum("ndr,nrhe->ndhe", attn["q_lora_a"], attn["q_lora_b"])
    assert_close(merged["blocks"]["attn"]["q"], attn["q"] + 16 / 2 * update)
    assert changed(bare["blocks"], merged["blocks"]) == {"attn/q", "attn/v", "mlp/up"}
    assert_close(adapted(after.params["gen"], *rows), bare_hidden(merged, *rows))


@pytest.mark.parametrize(
    ("arch", "of_gen"),
    [
        (ADAPTED, ("_lora_", "embed/", "head/")),
        (HALF_FROZEN, ("/blocks/", "final_norm")),
    ],
    ids=["adapters", "frozen layers"],
)
def test_only_what_is_trained_moves_and_has_moments(arch, of_gen):
    """Bugs: a frozen kernel decays, clips or is stepped; moments are kept for what never moves; an
    added token's row cannot learn beside adapters."""
    before, after, metrics = trained(pair(arch, arch), told(arch, arch, **DECAYED))
    expected = {
        f"{tower}/{name}"
        for tower in ("gen", "ctx")
        for name in flatten_dict(before.params[tower], sep="/")
        if any(part in f"/{name}" for part in of_gen)
    }
    assert changed(before.params, after.params) == expected
    assert moments(before) == expected
    assert metrics["grad/norm_gen"] > 0


def test_a_ctx_that_starts_as_gen_has_adapters_of_its_own():
    """Bug: Gen's adapters, of another rank, land in Ctx; or Ctx does not start as Gen."""
    wider = dataclasses.replace(SMALL, lora=LoraConfig(rank=3, kernels="q"))
    run = told(ADAPTED, wider)
    run = replace_dotted(replace_dotted(run, "ctx.init", "gen"), "gen.init", "scratch")
    make = lambda key: step.init_params(key, pair(ADAPTED, wider), run)
    params = jax.jit(make)(jax.random.key(0))
    attn = {tower: params[tower]["blocks"]["attn"] for tower in ("gen", "ctx")}
    assert attn["ctx"]["q_lora_a"].shape[-1] == 3 and "v_lora_a" not in attn["ctx"]
    np.testing.assert_array_equal(attn["ctx"]["q"], attn["gen"]["q"])


@pytest.mark.parametrize("kind", ["adapters", "frozen layers", "ctx"])
def test_what_is_not_trained_may_be_stored_in_half(kind):
    """Bugs: a trained leaf, whose small updates bfloat16 would swallow, is stored in it, or its
    moments are; the setting does nothing where Ctx starts as Gen."""
    arch = {"adapters": ADAPTED, "frozen layers": HALF_FROZEN, "ctx": SMALL}[kind]
    half = dataclasses.replace(arch, frozen_dtype="bfloat16")
    run, towers = told(half, half, ctx__freeze=kind == "ctx"), pair(half, half)
    run = replace_dotted(replace_dotted(run, "ctx.init", "gen"), "gen.init", "scratch")
    make = lambda key: step.init_params(key, towers, run)
    params = jax.eval_shape(make, jax.random.key(0))
    trained = flatten_dict(step.trainable(params, run), sep="/")
    assert trained
    for name, leaf in flatten_dict(params, sep="/").items():
        assert leaf.dtype == ("float32" if name in trained else "bfloat16"), name


def test_adapters_merge_into_half_stored_kernels_in_float32():
    """Bug: the sum is rounded to the kernel's own dtype, and the update with it."""
    kernel = jnp.ones((1, 2, 2), jnp.bfloat16)
    params = {"blocks": {"mlp": {"up": kernel}}}
    for name, shape in (("up_lora_a", (1, 2, 1)), ("up_lora_b", (1, 1, 2))):
        params["blocks"]["mlp"][name] = jnp.full(shape, 1e-2)
    arch = dataclasses.replace(SMALL, lora=LoraConfig(rank=1, alpha=1.0))
    merged = merge_adapters(params, arch)["blocks"]["mlp"]["up"]
    np.testing.assert_allclose(merged, 1 + 1e-4, rtol=1e-6)


def test_frozen_layers_have_no_adapters():
    """Bug: adapters that nothing trains, in layers that stay as they are."""
    both = dataclasses.replace(ADAPTED, frozen_layers=1)
    params = jax.eval_shape(Transformer(both, VOCAB).init, jax.random.key(0))
    with_adapters = {name.split("/")[0] for name in flatten_dict(params, sep="/") if "lora" in name}
    assert with_adapters == {"blocks"}


def test_frozen_layers_come_first():
    """Bug: the layers that are frozen are not the lowest, or run last."""
    whole, halves = Transformer(SMALL, VOCAB), Transformer(HALF_FROZEN, VOCAB)
    params = jax.jit(whole.init)(jax.random.key(0))
    split = {name: leaf for name, leaf in params.items() if name != "blocks"}
    split["frozen_blocks"] = jax.tree.map(lambda x: x[:1], params["blocks"])
    split["blocks"] = jax.tree.map(lambda x: x[1:], params["blocks"])
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, VOCAB)
    rows = (tokens, jnp.ones((2, 12), jnp.int32), jnp.broadcast_to(jnp.arange(12), (2, 12)))
    assert_close(jax.jit(halves.hidden)(split, *rows), jax.jit(whole.hidden)(params, *rows))


@pytest.mark.slow
def test_freezing_saves_memory():
    """Bug: gradients or moments of what is frozen exist in the compiled step."""
    wide = dataclasses.replace(SMALL, width=128, mlp_width=1024, layers=4)
    size = {}
    for kind, arch in (
        ("trained", wide),
        ("adapters", dataclasses.replace(wide, lora=LoraConfig(rank=2))),
        ("frozen", dataclasses.replace(wide, frozen_layers=3, freeze_embeddings=True)),
    ):
        towers = pair(arch, arch)
        run = told(arch, arch, batch_size=2, data__ctx_rows=2)
        tx = optim.make(run, 10, 10)
        params = jax.eval_shape(lambda t=towers, r=run: step.init_params(jax.random.key(0), t, r))
        state = jax.eval_shape(
            lambda p, t=tx, r=run: step.init_state(p, jax.random.key(1), t, r), params
        )
        one = functools.partial(step.train_step, towers=towers, tx=tx, config=run)
        given = state, random_batch(0, batch_shape(run)), Factors.of(run.loss)
        memory = jax.jit(one, donate_argnums=0).lower(*given).compile().memory_analysis()
        kernels = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params))
        size[kind] = memory.argument_size_in_bytes / kernels, memory.temp_size_in_bytes / kernels
        print(f"{kind}: arguments {size[kind][0]:.2f}, temporaries {size[kind][1]:.2f} x weights")
    assert size["trained"][0] > 2.9 and max(size["adapters"][0], size["frozen"][0]) < 1.7
    assert max(size["adapters"][1], size["frozen"][1]) < 0.6 * size["trained"][1]
