"""Many answers at once are the answers one by one, token for token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import config
from decoding import ByHand

from cosup_jax import assemble, sharding
from cosup_jax.config import MeshConfig
from cosup_jax.data import tokenizer
from cosup_jax.data.schema import Passage
from cosup_jax.decode import Decoder
from cosup_jax.retrieve import Search

TEXTS = [f"town {i} lies by river {i * 7 % 11} in the land of ulm" for i in range(12)]
PASSAGES = [Passage(f"p{i}", f"town {i}", text) for i, text in enumerate(TEXTS)]
SMALL = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_width": 64}
SLOTS = 96
VARIANTS = {
    "kept": {"max_tokens": 24},
    "dropped": {
        **{"keep_passages": False, "retrieve_first": True, "max_tokens": 14, "max_retrievals": 3},
        **{"passages": 2, "chunk_tokens": 16, "ret_threshold": 0.02},
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
    it should not, or one too many; a marker that may not stand there; the answers out of order."""
    c = settings(**VARIANTS[variant])
    towers, params = gen_of(bpe, c)
    prompts, search = prompts_of(bpe, LENGTHS), Search(PASSAGES, corpus)
    decoder = Decoder(mesh, towers, c, bpe)
    found = list(decoder.answers(params, prompts, search))
    by_hand = ByHand(towers.gen, params["gen"], c, bpe, search)
    stopped = set()
    for question, (prompt, answer) in enumerate(zip(prompts, found, strict=True)):
        tokens, passages, written, why = by_hand.answer(question, prompt)
        assert (answer.tokens, answer.written, answer.stopped) == (tokens, written, why), question
        rows = lambda found: [[one.row for one in each] for each in found]
        assert rows(answer.retrieved) == rows(passages)
        stopped.add(why)
    assert min(by_hand.gaps.values()) > 1e-4 and stopped == {"eos", "tokens", "context", "prompt"}
    assert max(len(answer.retrieved) for answer in found) > 1
    assert len(decoder.compiled) == 2
