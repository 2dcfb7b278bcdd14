"""How fast passages are encoded, searched and read by answers."""

import dataclasses
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cosup_jax.answer.decode import Decoder
from cosup_jax.answer.retrieve import Search
from cosup_jax.assemble import Tokenizers
from cosup_jax.config import Config
from cosup_jax.data import markup
from cosup_jax.data.batch import batch_shape
from cosup_jax.data.schema import Dataset
from cosup_jax.data.storage import Chosen
from cosup_jax.data.tokens import tokenize_passages
from cosup_jax.search import index
from cosup_jax.search.corpus import Corpus
from cosup_jax.search.encoder import Encoder
from cosup_jax.speed.clock import ROUNDS, Figure, in_turn
from cosup_jax.towers import Towers
from cosup_jax.wording import counted

SEARCHED_FOR = (1, 2, 4, 8, 32, 256)  # queries at once
SIDE = 2048  # of the square matrices that are multiplied
_READS = {"max": jnp.max, "sum": jnp.sum}


def encode_speed(
    dataset: Dataset,
    passages: int,
    tokenizers: Tokenizers,
    towers: Towers,
    config: Config,
    mesh: Mesh,
    params: dict,
    cache: Path,
) -> list[Figure]:
    """Encodes so many passages of a data set, in memory, as --mode=encode does.

    `cache`: a directory for their tokens.
    """
    store = tokenize_passages(dataset, tokenizers.ctx, config, cache)
    corpus, encoder = Corpus(dataset, store, batch_shape(config)), Encoder(mesh, towers, config)
    count = min(passages, len(corpus))
    taken = in_turn({"": lambda: encoder.corpus(params, corpus.packed(range(count)), count)})[""]
    tokens = sum(int((rows.ctx_segments_UxL > 0).sum()) for rows in corpus.packed(range(count)))
    more = f"{counted(count, 'passage')} of {tokens / count:.0f} tokens, median of {ROUNDS}"
    return [
        Figure("encoding", count / taken, "passages/s", more),
        Figure("  tokens encoded", tokens / taken, "/s"),
    ]


def search_speed(vectors: int, width: int, k: int = 10) -> list[Figure]:
    """Searches, by number of queries, and the roofline's share of their time.

    The roofline is the time to read all vectors once, or to multiply, whichever is longer: each
    the fastest of several ways, in the same rounds as the searches. One device.
    """
    rng = np.random.default_rng(0)
    corpus_NxD = rng.random((vectors, width), np.float32)
    corpus_NxD -= 0.5
    corpus_NxD = jnp.asarray(corpus_NxD)
    query_QxD = rng.random((max(SEARCHED_FOR), width), np.float32) - 0.5
    square = jnp.asarray(rng.random((SIDE, SIDE), np.float32))
    once, twice = jax.jit(lambda x: x @ x[: SIDE // 2].T), jax.jit(lambda x: x @ x)
    reads = {name: jax.jit(read) for name, read in _READS.items()}
    median_s = in_turn(
        {("read", name): lambda read=read: read(corpus_NxD) for name, read in reads.items()}
        | {("multiply", 2 * SIDE**3): lambda: twice(square)}
        | {("multiply", SIDE**3): lambda: once(square)}
        | {
            ("search", Q): lambda Q=Q: index.search(query_QxD[:Q], corpus_NxD, k)
            for Q in SEARCHED_FOR
        }
    )
    read_s = min(seconds for (kind, _), seconds in median_s.items() if kind == "read")
    flops = max(size / s for (kind, size), s in median_s.items() if kind == "multiply")
    found = [
        Figure(
            f"search in {vectors:,} x {width}",
            corpus_NxD.nbytes / read_s / 1e9,
            "GB/s read",
            f"and {flops / 1e9:,.0f} GFLOP/s, float32; top {k}, medians of {ROUNDS}",
        )
    ]
    for Q in SEARCHED_FOR:
        multiply_s, search_s = 2 * Q * vectors * width / flops, median_s["search", Q]
        alone_s, bound = max((read_s, "reading"), (multiply_s, "multiplying"))
        more = f"{search_s * 1e3:.4g} ms; {bound} alone {alone_s * 1e3:.4g} ms"
        share = f"{more}: {alone_s / search_s:.0%} of the roofline"
        found.append(
            Figure(f"  {counted(Q, 'query', 'queries')} at once", Q / search_s, "queries/s", share)
        )
    return found


def answer_speed(
    dataset: Dataset,
    answers: int,
    tokenizers: Tokenizers,
    towers: Towers,
    config: Config,
    mesh: Mesh,
    params: dict,
) -> list[Figure]:
    """Answers training questions, each with one passage and generate.max_tokens.

    A Gen of random weights, as here, never stops by itself.
    """
    keys = {"retrieve_first": True, "max_retrievals": 1, "temperature": 0.0}
    config = dataclasses.replace(config, generate=dataclasses.replace(config.generate, **keys))
    asked = [markup.prompt(e, tokenizers.gen) for e in islice(dataset.rows("train"), answers)]
    passages = Chosen(dataset.passages.at, np.arange(len(dataset.passages)))
    vectors = np.random.default_rng(0).random((len(passages), towers.gen.width), np.float32)
    decoder, search = Decoder(mesh, towers, config, tokenizers.gen), Search(passages, vectors)
    found = []

    def answer():
        found[:] = decoder.answers(params, asked, search)

    taken = in_turn({"": answer})[""]
    tokens = sum(one.written for one in found)
    retrievals, rows = sum(len(one.retrieved) for one in found), min(decoder.rows, len(asked))
    more = (
        f"{len(asked)} of them, {rows} at once in {config.generate.context_tokens} tokens "
        f"of context, {retrievals / len(asked):.1f} passages and {tokens / len(asked):.0f} tokens "
        f"each, median of {ROUNDS}; {len(decoder.compiled)} compiled shapes"
    )
    return [
        Figure("answering", len(asked) / taken, "questions/s", more),
        Figure("  tokens written", tokens / taken, "/s"),
    ]
