"""Whether exported towers compute what ours do, read back by us and by those who will serve them.

transformers and sentence-transformers are asked where they and torch are installed; the report
says which was asked.
"""

import dataclasses
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from cosup_jax import sharding
from cosup_jax.config import ArchConfig, Config
from cosup_jax.data.pipeline import PackedPassages
from cosup_jax.hf import weights
from cosup_jax.model.transformer import Transformer
from cosup_jax.search import encoder
from cosup_jax.towers import Towers

TOLERANCE = 1e-4  # largest difference of a logit or of a feature of a vector, over max(1, largest)


class Sample(NamedTuple):
    """What both sides read."""

    gen_tokens: list[np.ndarray]  # of examples, as Gen reads them
    ctx_tokens: list[np.ndarray]  # of passages, as Ctx reads them
    texts: list[str]  # of those passages


class Outputs(NamedTuple):
    """What is compared."""

    logits: list[np.ndarray]  # Gen's, [T, V] of each example
    vectors: np.ndarray  # of the passages, [N, D]


class Check(NamedTuple):
    """One comparison: the largest difference, and the largest value."""

    what: str
    difference: float
    largest: float

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.difference <= TOLERANCE * max(1.0, self.largest)


class Ours:
    """The towers as trained or as merged, in float32."""

    def __init__(self, towers: Towers, params: dict, mesh: Mesh, config: Config):
        self.towers = Towers(_in_float32(towers.gen), _in_float32(towers.ctx), towers.tied)
        self.params, self.mesh, self._config = params, mesh, config

    def outputs(self, sample: Sample) -> Outputs:
        """Of what both sides read."""
        with jax.default_matmul_precision("highest"):  # accelerators would round to less
            return Outputs(self._logits(sample.gen_tokens), self.vectors(sample.ctx_tokens))

    def _logits(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        gen, mesh = self.towers.gen, self.mesh
        batch = encoder.to_mesh(_padded(rows, sharding.row_parts(mesh)), mesh)
        run = lambda params, *batch: gen.logits(params, gen.hidden(params, *batch))
        jitted = jax.jit(run, out_shardings=sharding.replicated(mesh))
        with jax.set_mesh(mesh):
            found = np.asarray(jitted(self.params["gen"], *batch))[..., : gen.vocab_size]
        return [logits[: len(row)] for logits, row in zip(found, rows, strict=False)]

    def vectors(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """[N, D] of passages."""
        tokens, segments, positions = _padded(rows, sharding.row_parts(self.mesh))
        valid = segments.any(axis=1)[:, None]
        ends = np.maximum(segments.sum(axis=1), 1)[:, None] - 1
        index = np.minimum(np.arange(len(tokens)), len(rows) - 1)[:, None]
        packed = PackedPassages(tokens, segments, positions, ends, valid, index)
        found = encoder.Encoder(self.mesh, self.towers, self._config)
        return found.corpus(self.params, [packed], len(rows))


def read_back(directory: Path, ours: Ours, mesh: Mesh, config: Config) -> Ours:
    """The towers from DIRECTORY/gen and DIRECTORY/ctx, by our own reader.

    Ctx's projection, which its directory holds for sentence-transformers alone, is taken over.
    """
    models, params = {}, {}
    for name, load in (("gen", weights.load_gen), ("ctx", weights.load_ctx)):
        fields = weights.arch_from_hf(directory / name)
        model = Transformer(vocab_size=fields.pop("vocab_size"), arch=ArchConfig(**fields))
        models[name] = dataclasses.replace(model, has_head=name == "gen")
        shapes = jax.eval_shape(models[name].init, jax.random.key(0))
        places = sharding.tree_shardings(mesh, models[name].logical_axes(), shapes)
        describe = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        params[name] = load(directory / name, jax.tree.map(describe, shapes, places))
    if "projection" in ours.params.get("ctx", {}):
        params["ctx"]["projection"] = ours.params["ctx"]["projection"]
    return Ours(Towers(models["gen"], models["ctx"]), params, mesh, config)


def compare(whose: str, ours: Outputs, logits=None, vectors=None) -> Iterator[Check]:
    """Of what is given the difference from ours."""
    if logits is not None:
        yield _check(f"gen logits, {whose}", ours.logits, logits)
    if vectors is not None:
        yield _check(f"passage vectors, {whose}", ours.vectors, vectors)


def transformers_logits(directory: Path, sample: Sample) -> list[np.ndarray]:
    """Gen's by AutoModelForCausalLM, in float32. Needs torch."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _hush()
    model = AutoModelForCausalLM.from_pretrained(
        directory / "gen", dtype="float32", trust_remote_code=False
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory / "gen", trust_remote_code=False)
    rows = [row.tolist() for row in sample.gen_tokens]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    logits = model(**batch).logits.detach().numpy()
    return [found[: len(row)] for found, row in zip(logits, rows, strict=True)]


def sentence_vectors(directory: Path, sample: Sample) -> np.ndarray:
    """Of the passages' texts by SentenceTransformer.encode, in float32. Needs torch."""
    from sentence_transformers import SentenceTransformer

    _hush()
    settings = {"device": "cpu", "model_kwargs": {"dtype": "float32"}}
    model = SentenceTransformer(str(directory / "ctx"), **settings)
    return model.encode(sample.texts, convert_to_numpy=True, show_progress_bar=False)


def missing(*names: str) -> list[str]:
    """Of the packages those that are not there."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def _hush() -> None:
    """Without bars, the pooler that a bare BERT has not, and the prompt that it should have."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for name in ("transformers", "sentence_transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _check(what: str, ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> Check:
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(ours, theirs, strict=True)]
    worst = max(float(np.abs(a - b).max()) for a, b in pairs)
    return Check(what, worst, max(float(np.abs(a).max()) for a, _ in pairs))


def _in_float32(model: Transformer) -> Transformer:
    arch = dataclasses.replace(model.arch, dtype="float32", attention="auto")  # cudnn has none
    return dataclasses.replace(model, arch=arch)


def _padded(rows: Sequence[np.ndarray], multiple: int) -> tuple[np.ndarray, ...]:
    """Tokens, segments and positions [B, T] of rows of one example, padding on the right."""
    count = -(-len(rows) // multiple) * multiple
    tokens = np.zeros((count, max(map(len, rows))), np.int32)
    segments, positions = tokens.copy(), tokens.copy()
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        segments[i, : len(row)] = 1
        positions[i, : len(row)] = np.arange(len(row))
    return tokens, segments, positions
