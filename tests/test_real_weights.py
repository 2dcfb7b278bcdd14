"""Real checkpoints compute here what transformers computes, in float32 and in float64.

COSUP_WEIGHTS=DIRECTORY,FILE.gguf python -m pytest -n0 -s -m parity tests/test_real_weights.py
"""

import dataclasses
import os
from pathlib import Path

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import config

from cosup_jax import parity, pretrained, sharding
from cosup_jax.config import ArchConfig
from cosup_jax.data import markup, tokenizer
from cosup_jax.data.schema import Passage
from cosup_jax.hf import sentence, weights
from cosup_jax.model.transformer import Transformer
from cosup_jax.towers import Towers

pytestmark = pytest.mark.parity

SOURCES = [Path(source) for source in os.environ.get("COSUP_WEIGHTS", "").split(",") if source]
TEXTS = [
    "The Danube rises in the Black Forest and flows through ten countries into the Black Sea.",
    "Water boils at 100 °C at sea level; at 3,000 m it boils at about 90 °C.",
    "def f(x):\n    return [y for y in range(x) if y % 3 == 0]\n",
]
TOLERANCE = 1e-4  # of the largest logit or state


def transformers_model(source: Path, causal: bool):
    from transformers import AutoModel, AutoModelForCausalLM

    kind = AutoModelForCausalLM if causal else AutoModel
    where = {"gguf_file": source.name} if source.suffix == ".gguf" else {}  # needs accelerate
    return kind.from_pretrained(source.parent if where else source, dtype="float32", **where).eval()


def exact(model):
    """The model in float64, where transformers would norm in float32 all the same."""
    import torch

    for module in model.to(torch.float64).modules():
        if type(module).__name__.endswith("RMSNorm"):
            eps = module.variance_epsilon
            rms = lambda x, eps=eps: (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
            module.forward = lambda x, m=module, rms=rms: m.weight * x / rms(x)
    return model


@pytest.mark.skipif(not SOURCES, reason="COSUP_WEIGHTS names none")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_real_weights(source):
    """Bug: what random weights do not show: a scale, a rotation or a table of a real file."""
    import torch

    fields = weights.arch_from_hf(source)
    model = Transformer(vocab_size=fields.pop("vocab_size"), arch=ArchConfig(**fields))
    model = dataclasses.replace(model, has_head=fields["family"] != "bert")
    params, tokens = families.load(source, model), tokenizer.load(source)
    theirs = transformers_model(source, model.has_head)

    def outputs(params, *rows):
        hidden = model.hidden(params, *rows)
        return model.logits(params, hidden)[..., : model.vocab_size] if model.has_head else hidden

    @torch.no_grad()
    def ask(ids, mask, positions):
        rows = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return theirs(**{name: torch.tensor(x) for name, x in rows.items()})[0].double().numpy()

    batches = [padded([tokens.encode(t) for t in TEXTS], side) for side in ("right", "left")]
    in_float32 = [ask(*batch) for batch in batches]
    exact(theirs)
    for batch, rounded in zip(batches, in_float32, strict=True):
        real = batch[1].astype(bool)
        ours = np.float64(jax.jit(outputs)(params, *map(jnp.int32, batch)))[real]
        rounded, wanted = rounded[real], ask(*batch)[real]
        off, largest = lambda a, b: np.abs(a - b).max(), np.abs(wanted).max()
        print(
            f"\n{source.name}: of {largest:.1f} ours is {off(ours, wanted):.1e} from float64, "
            f"transformers' float32 {off(rounded, wanted):.1e}; {off(ours, rounded):.1e} apart"
        )
        assert off(ours, wanted) <= TOLERANCE * largest


@pytest.mark.skipif(not SOURCES, reason="COSUP_WEIGHTS names none")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_vectors_as_sentence_transformers_makes_them(source, tmp_path):
    """Bug: a pooling, a prompt or a frame of tokens that is not the model's own."""
    reading = sentence.read_modules(source)
    if reading is None:
        pytest.skip("no model of sentence-transformers")
    from sentence_transformers import SentenceTransformer

    run = pretrained.resolve(config(ctx__init=str(source), data__max_ctx_tokens=20))
    tokens = tokenizer.load(source)
    passages = [Passage(str(i), "", text) for i, text in enumerate(TEXTS)]
    read = markup.ctx_tokens(passages, tokens, run.ctx.pooling, 128, run.ctx.prompt)
    model = Transformer(run.ctx.arch, tokens.vocab_size, has_head=False)
    mesh = sharding.make_mesh(run.mesh)
    params = jax.device_put(families.load(source, model), sharding.replicated(mesh))
    ours = parity.Ours(Towers(model, model), {"gen": {}, "ctx": params}, mesh, run)
    found = ours.vectors([ids for ids, _ in read])
    wanted = SentenceTransformer(str(source), device="cpu").encode(TEXTS)
    print(f"\n{source.name}: vectors differ by {np.abs(found - wanted).max():.1e}")
    assert np.abs(found - wanted).max() < 1e-5


def padded(rows, side):
    """Ids, mask and positions [B, T]; what stands in a padding is nobody's to see."""
    length = max(map(len, rows))
    ids, mask = np.zeros((len(rows), length), int), np.zeros((len(rows), length), int)
    for i, row in enumerate(rows):
        at = slice(len(row)) if side == "right" else slice(length - len(row), None)
        ids[i, at], mask[i, at] = row, 1
    return ids, mask, np.maximum(mask.cumsum(axis=1) - 1, 0)
