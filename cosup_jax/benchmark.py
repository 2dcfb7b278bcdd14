"""--mode=benchmark: how fast this machine tokenises, reads cached tokens, searches, answers."""

import dataclasses
import resource
import tempfile
import time
from collections.abc import Callable
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cosup_jax import assemble, sharding
from cosup_jax.answer.decode import Decoder
from cosup_jax.answer.retrieve import Search
from cosup_jax.assemble import Tokenizers
from cosup_jax.config import Config
from cosup_jax.costs import roofline
from cosup_jax.data import markup, pipeline, tokens
from cosup_jax.data.batch import Batch
from cosup_jax.data.plan import Plan
from cosup_jax.data.schema import Dataset
from cosup_jax.data.storage import Chosen
from cosup_jax.errors import UserError
from cosup_jax.runtime.workdir import Workdir
from cosup_jax.search import index
from cosup_jax.wording import counted

SEARCHED_FOR = (1, 2, 4, 8, 32, 256)  # queries at once
ROUNDS = 5  # of which medians are taken
SIDE = 2048  # of the square matrices that are multiplied


def benchmark(
    config: Config,
    workdir: str,
    steps: int = 400,
    vectors: int = 1_000_000,
    width: int = 0,
    answers: int = 128,
) -> None:
    """Prints what the machine reaches, kept in WORKDIR/benchmark.json, as preflight counts with;
    tokens per second, by the clock and for each second of one core; how long search
    takes beside what memory or arithmetic alone would; and how many questions are answered.

    Args:
      steps: batches that are read.
      vectors: float32 vectors that are searched.
      width: of these; 0: as Gen's.
      answers: questions that are answered.

    Raises:
      UserError: whatever is wrong with config or data.
    """
    if steps < 1:
        raise UserError("--steps=0 reads nothing; give at least 1")
    mesh = assemble.mesh_for(config)
    with Workdir(workdir) as directory:
        data = assemble.read_sources(config, directory.path / "data")
        for line in assemble.refuse_bad_rows(data, config):
            print(line)
        chip = roofline.measured(mesh.devices.flat[0])
        print(f"machine: {roofline.ceilings(chip)}", flush=True)
        directory.write_json("benchmark.json", {"chip": dataclasses.asdict(chip)})
        config = assemble.resolve(config)
        tokenizers = assemble.read_tokenizers(config, directory.path, data)
        with tempfile.TemporaryDirectory(dir=directory.path) as fresh:
            store = lambda: tokens.tokenize(data.train, *tokenizers, config, fresh)
            _print("tokenising", store, lambda found: len(found.gen_tokens) + len(found.ctx_tokens))
        store = tokens.tokenize(data.train, *tokenizers, config, directory.path / "data")
        plan, rows = Plan(store, config), sharding.rows(mesh)
        plan.locate(steps + 1)  # planning is not what is measured

        reader = pipeline.batches(store, plan, config, rows, rows, 0, steps + 2)
        for _ in range(2):  # starts Grain and its workers, and compiles what it needs
            jax.block_until_ready(next(reader))
        _print(f"reading {steps} batches", lambda: sum(map(_tokens, reader)), int)
        if vectors:
            search_speed(vectors, width or config.gen.arch.width)
        if answers:
            answer_speed(data.train[0][0], answers, tokenizers, config, mesh)


def search_speed(vectors: int, width: int, k: int = 10) -> dict[int, float]:
    """Prints, and returns by number of queries, the roofline's share of the time of a search.

    The roofline is the time to read all vectors once, or to multiply, whichever is longer: each
    the fastest of several ways, in the same rounds as the searches. One device.
    """
    rng = np.random.default_rng(0)
    corpus_NxD = rng.random((vectors, width), np.float32)
    corpus_NxD -= 0.5
    corpus_NxD = jnp.asarray(corpus_NxD)
    query_QxD = rng.random((max(SEARCHED_FOR), width), np.float32) - 0.5
    square = jnp.asarray(rng.random((SIDE, SIDE), np.float32))
    ways = {
        **{("read", name): (jax.jit(read), corpus_NxD) for name, read in _READS.items()},
        ("multiply", 2 * SIDE**3): (jax.jit(lambda x: x @ x), square),
        ("multiply", SIDE**3): (jax.jit(lambda x: x @ x[: SIDE // 2].T), square),
    }
    ways |= {
        ("search", Q): (lambda query: index.search(query, corpus_NxD, k), query_QxD[:Q])
        for Q in SEARCHED_FOR
    }
    took_s = {way: [] for way in ways}
    for _ in range(1 + ROUNDS):
        for way, run in ways.items():
            took_s[way].append(_seconds(*run))
    median_s = {way: float(np.median(took[1:])) for way, took in took_s.items()}  # 0 compiled
    read_s = min(seconds for (kind, _), seconds in median_s.items() if kind == "read")
    flops = max(size / s for (kind, size), s in median_s.items() if kind == "multiply")
    print(
        f"search in {vectors:,} x {width} float32, top {k}, medians of {ROUNDS}; this machine "
        f"reads {corpus_NxD.nbytes / read_s / 1e9:.1f} GB/s and does {flops / 1e9:.0f} GFLOP/s",
        flush=True,
    )
    share = {}
    for Q in SEARCHED_FOR:
        multiply_s, search_s = 2 * Q * vectors * width / flops, median_s["search", Q]
        share[Q] = max(read_s, multiply_s) / search_s
        bound = "reading" if read_s > multiply_s else "multiplying"
        print(
            f"  {counted(Q, 'query', 'queries')}: {search_s * 1e3:.0f} ms, {bound} alone "
            f"{max(read_s, multiply_s) * 1e3:.0f} ms: {share[Q]:.0%} of the roofline",
            flush=True,
        )
    return share


def answer_speed(
    dataset: Dataset, answers: int, tokenizers: Tokenizers, config: Config, mesh: Mesh
) -> float:
    """Prints how fast a Gen of random weights answers training questions; returns tokens/s.

    Such a Gen never stops by itself, so every answer is one passage and generate.max_tokens.
    """
    keys = {"retrieve_first": True, "max_retrievals": 1, "temperature": 0.0}
    config = dataclasses.replace(config, generate=dataclasses.replace(config.generate, **keys))
    towers, settings = assemble.make_towers(config, tokenizers), config.generate
    places = sharding.tree_shardings(
        mesh, towers.gen.logical_axes(), jax.eval_shape(towers.gen.init, jax.random.key(0))
    )
    gen = jax.jit(towers.gen.init, out_shardings=places)(jax.random.key(0))
    asked = [markup.prompt(e, tokenizers.gen) for e in islice(dataset.rows("train"), answers)]
    passages = Chosen(dataset.passages.at, np.arange(len(dataset.passages)))
    vectors = np.random.default_rng(0).random((len(passages), towers.gen.width), np.float32)
    decoder, search = Decoder(mesh, towers, config, tokenizers.gen), Search(passages, vectors)
    took_s = []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        found = list(decoder.answers({"gen": gen}, asked, search))
        took_s.append(time.perf_counter() - start)
    median_s, tokens = float(np.median(took_s[1:])), sum(answer.written for answer in found)
    retrievals = sum(len(answer.retrieved) for answer in found)
    print(
        f"answering {counted(len(asked), 'question')}, {decoder.rows} at once in "
        f"{settings.context_tokens} tokens of context, {retrievals / len(asked):.1f} passages and "
        f"{tokens / len(asked):.0f} tokens each, median of {ROUNDS}: "
        f"{len(asked) / median_s:,.1f} questions/s, {tokens / median_s:,.0f} tokens/s; "
        f"{len(decoder.compiled)} compiled shapes",
        flush=True,
    )
    return tokens / median_s


_READS = {"max": jnp.max, "sum": jnp.sum}


def _seconds(run: Callable, *args) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - start


def _tokens(batch: Batch) -> int:
    jax.block_until_ready(batch)
    return int((batch.gen_segments_BxT > 0).sum()) + int((batch.ctx_segments_UxL > 0).sum())


def _print(what: str, run: Callable, tokens_of: Callable) -> None:
    clock_s, core_s = time.perf_counter(), _core_s()
    count = tokens_of(run())
    clock_s, core_s = time.perf_counter() - clock_s, _core_s() - core_s
    print(
        f"{what}: {count:,} tokens in {clock_s:.2f} s, {count / clock_s:,.0f} tokens/s; "
        f"{core_s:.2f} s of cores, {count / core_s:,.0f} tokens/s for each",
        flush=True,
    )


def _core_s() -> float:
    """User and system time of this process and of workers that have ended, their start included."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)
