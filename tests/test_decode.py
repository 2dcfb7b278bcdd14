"""Many answers at once are the answers one by one, token for token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import config
from decoding import ByHand

from cosup_jax import assemble, sharding
from cosup_jax.answer import advance
from cosup_jax.answer.decode import Budget, Decoder, Found
from cosup_jax.answer.retrieve import Gold, Search
from cosup_jax.config import MeshConfig
from cosup_jax.data import tokenizer
from cosup_jax.data.schema import Passage
from cosup_jax.errors import UserError

TEXTS = [f"town {i} lies by river {i * 7 % 11} in the land of ulm" for i in range(12)]
PASSAGES = [Passage(f"p{i}", f"town {i}", text) for i, text in enumerate(TEXTS)]
SMALL = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_width": 64}
SLOTS = 96
VARIANTS = {
    "kept": {"max_tokens": 24},
    "dropped": {
        **{"keep_passages": False, "retrieve_first": True, "max_tokens": 14, "max_retrievals": 3},
        **{"passages": 2, "chunk_tokens": 16, "ret_threshold": 0.02, "batch_size": 8},
    },
}


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.train(TEXTS, 290)


@pytest.fixture(scope="module")
def corpus():
    return np.random.default_rng(3).normal(size=(len(PASSAGES), SMALL["width"])).astype(np.float32)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def settings(**keys):
    arch = {f"gen__arch__{name}": value for name, value in SMALL.items()}
    arch |= {"gen__arch__tie_embeddings": False, "gen__arch__window": 0}
    keys = {"batch_size": 4, "context_tokens": SLOTS, "chunk_tokens": 8} | keys
    return config(**arch, **{f"generate__{name}": value for name, value in keys.items()})


def gen_of(bpe, c, seed: int = 0):
    """A random Gen that often writes [Ret], [Ce] and eos, each time elsewhere."""
    both = assemble.Tokenizers(bpe, bpe)
    towers = assemble.make_towers(dataclasses.replace(c, ctx=c.gen), both)
    rng, shapes = np.random.default_rng(seed), jax.eval_shape(towers.gen.init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), shapes)
    for norm in (params["final_norm"], params["blocks"]["attn_norm"], params["blocks"]["mlp_norm"]):
        norm["scale"] += 1
    steering = jnp.array([bpe.ret, bpe.ce, bpe.eos])
    head = params["head"]
    head["kernel"] = head["kernel"].at[:, steering].multiply(2.5)
    return towers, {"gen": params}


def prompts_of(bpe, lengths):
    rng = np.random.default_rng(5)
    ids = np.array(sorted({*range(bpe.vocab_size)} - bpe.control))
    return [rng.choice(ids, n).tolist() for n in lengths]


LENGTHS = (3, 17, 40, 5, SLOTS, 9, SLOTS - 1, 30, 1, 12, 70)


@pytest.mark.parametrize("variant", VARIANTS)
def test_together_is_one_by_one_without_cache(variant, bpe, corpus, mesh):
    """Bugs: a position off by one behind a passage or a rollback; a row that sees its neighbour's
    tokens, or what stood in its slots before; a passage in the wrong row; a budget that counts what
    it should not, one too many, or is another question's; a program compiled for a budget; a marker
    that may not stand there; the answers out of order."""
    c = settings(**VARIANTS[variant])
    towers, params = gen_of(bpe, c)
    prompts, search = prompts_of(bpe, LENGTHS), Search(PASSAGES, corpus)
    decoder = Decoder(mesh, towers, c, bpe)
    own = Budget(c.generate.max_tokens, c.generate.max_retrievals)
    budgets = [own, Budget(1, 0), own, Budget(5, 1), own, *[Budget(13, 2), own] * 3]
    found = list(decoder.answers(params, prompts, search, budgets))
    by_hand = ByHand(towers.gen, params["gen"], c, bpe, search, budgets)
    stopped = set()
    for question, (prompt, answer) in enumerate(zip(prompts, found, strict=True)):
        tokens, passages, written, why = by_hand.answer(question, prompt)
        assert (answer.tokens, answer.written, answer.stopped) == (tokens, written, why), question
        rows = lambda found: [[one.row for one in each] for each in found]
        assert rows(answer.retrieved) == rows(passages)
        stopped.add(why)
    assert min(by_hand.gaps.values()) > 1e-4 and stopped == {"eos", "tokens", "context", "prompt"}
    assert max(len(answer.retrieved) for answer in found) > 1
    # three to fill; rows only become fewer and slots only more, by at most two steps each
    assert len(decoder.compiled) == len(set(decoder.compiled)) <= 3 + 1 + 2 + 2


def test_what_is_drawn_depends_on_question_and_seed_alone(bpe, corpus, mesh):
    """Bugs: one key for the batch, so that neighbours or their number change an answer; the same
    number drawn for every token; a seed that does nothing; top_p that keeps nothing or everything;
    a temperature that changes the greedy choice as it goes to 0."""
    prompts, search = prompts_of(bpe, (3, 17, 9, 30, 12, 5)), Search(PASSAGES, corpus)
    drawn = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 12, "seed": 1}

    def answers(chosen, **keys):
        c = settings(**keys)
        towers, params = gen_of(bpe, c)
        found = Decoder(mesh, towers, c, bpe).answers(params, [prompts[i] for i in chosen], search)
        return [answer.tokens for answer in found]

    together = answers(range(6), **drawn)
    alone = answers([4, 1], **drawn, batch_size=1)
    assert alone == [together[4], together[1]]
    assert answers([4, 1], **drawn | {"seed": 2}, batch_size=1) != alone
    greedy = answers([4, 1], max_tokens=12, batch_size=1)
    assert greedy != alone
    assert answers([4, 1], **drawn | {"temperature": 1e-4}, batch_size=1) == greedy
    assert len({tuple(tokens) for tokens in together}) == 6


def test_top_p_keeps_the_likeliest():
    """Bugs: the token that reaches top_p is left out; one more than needed is kept; draws that do
    not follow the probabilities."""
    share_V = np.array([0.1, 0.4, 0.3, 0.2], np.float32)
    B = 4000
    rows = advance.vacant(B, 4, 1)._replace(stream_B=np.arange(B, dtype=np.uint32))
    logits_BxV = jnp.log(jnp.tile(share_V[None], (B, 1)))
    for top_p, kept in (
        (1.0, [0.1, 0.4, 0.3, 0.2]),
        (0.75, [0, 0.4, 0.3, 0.2]),
        (0.69, [0, 4, 3, 0]),
    ):
        c = settings(temperature=1.0, top_p=top_p)
        counts = np.bincount(
            jax.jit(advance._draw, static_argnums=2)(logits_BxV.T, rows, c), minlength=4
        )
        wanted = np.array(kept) / np.sum(kept)
        assert (counts[wanted == 0] == 0).all()
        np.testing.assert_allclose(counts / B, wanted, atol=4 * 0.5 / np.sqrt(B))


def test_without_a_retriever_there_is_no_ret(bpe, mesh):
    """Bugs: Gen waits for ever where nothing is retrieved; a budget of 0 or a limit that is not
    kept; a forced [Ret] all the same; a token for which the cache has no slot yet."""
    c = settings(max_tokens=36, retrieve_first=True)
    towers, params = gen_of(bpe, c)
    prompts = prompts_of(bpe, (3, 17, 9))
    decoder = Decoder(mesh, towers, c, bpe)
    never = [Budget(c.generate.max_tokens, 0)] * len(prompts)
    by_hand = ByHand(towers.gen, params["gen"], c, bpe, None, never)
    for question, answer in enumerate(decoder.answers(params, prompts)):
        assert answer.tokens == by_hand.answer(question, prompts[question])[0]
        assert not {bpe.ret, bpe.cs, bpe.ce} & set(answer.tokens) and answer.retrieved == []
        assert answer.written == len(answer.tokens) or answer.stopped == "eos"
    gold = Gold(PASSAGES, [[2], [], [1, 4]])
    found = [a.retrieved for a in decoder.answers(params, prompts, gold)]
    assert found[0] == [[Found(2, None)]] and found[1] == []
    assert found[2] in ([[Found(1, None)]], [[Found(1, None)], [Found(4, None)]])
    assert len(decoder.compiled) == len(set(decoder.compiled)) <= 5  # of all three


def test_a_model_that_has_diverged(bpe, corpus, mesh):
    """Bugs: weights that are no numbers write a token that no vocabulary has, or raise where
    nobody understands it."""
    c = settings(max_tokens=3)
    towers, params = gen_of(bpe, c)
    lost = jax.tree.map(lambda x: x * jnp.nan, params)
    (answer,) = Decoder(mesh, towers, c, bpe, most=1).answers(lost, [[5, 6]])
    assert max(answer.tokens) < bpe.vocab_size
    c = settings(retrieve_first=True)
    with pytest.raises(UserError, match="diverged"):
        list(
            Decoder(mesh, towers, c, bpe, most=1).answers(lost, [[5, 6]], Search(PASSAGES, corpus))
        )
    nowhere = Search(PASSAGES, corpus * np.nan)
    with pytest.raises(UserError, match="vectors of passages are no numbers"):
        list(Decoder(mesh, towers, c, bpe, most=1).answers(params, [[5, 6]], nowhere))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_on_a_mesh(shape, bpe, corpus, devices):
    """Bugs: rows, heads or the cache of another device; a batch that does not split."""
    c = settings(**VARIANTS["dropped"])
    prompts, found = prompts_of(bpe, LENGTHS), []
    for sizes, used in (((1, 1, 1), devices[:1]), (shape, devices)):
        mesh = sharding.make_mesh(MeshConfig(*sizes), used)
        towers, params = gen_of(bpe, c)
        places = sharding.tree_shardings(mesh, towers.gen.logical_axes(), params["gen"])
        params = {"gen": jax.device_put(params["gen"], places)}
        search = Search(PASSAGES, corpus, mesh)
        answers = Decoder(mesh, towers, c, bpe).answers(params, prompts, search)
        found.append([(a.tokens, a.written, a.stopped) for a in answers])
    assert found[0] == found[1]
