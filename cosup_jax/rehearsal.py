"""The step that training would compile, without a workdir: what it is made of, and runs of it."""

import re
import time
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from cosup_jax import assemble, optim, sharding
from cosup_jax import step as step_lib
from cosup_jax.assemble import Tokenizers
from cosup_jax.config import Config
from cosup_jax.costs import roofline
from cosup_jax.cosup import Factors
from cosup_jax.data import tokenizer
from cosup_jax.data.batch import Batch, batch_shape, empty_batch
from cosup_jax.hf import weights
from cosup_jax.step import TrainState
from cosup_jax.towers import Towers


class Rehearsal:
    """The step of a config on a mesh.

    Attributes:
      state, batch: shapes, dtypes and shardings.
      parameters: how many.
    """

    def __init__(self, config: Config, mesh: Mesh, tokenizers: Tokenizers | None = None):
        """`tokenizers`: None where there is no data to make them of."""
        tokenizers = tokenizers or vocabularies(config)
        self.config, self.mesh, self.pad_id = config, mesh, tokenizers.gen.pad
        self.towers = assemble.make_towers(config, tokenizers)
        self.tx = optim.make(config, config.num_steps or 1, 1)
        self.state = assemble.abstract_state(config, self.towers, self.tx, mesh)
        self.batch = abstract_batch(config, mesh)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))

    def step(self, config: Config | None = None):
        """The step under jit, or that of another config of the same towers."""
        config = config or self.config
        places = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        places = places if config.bank.kind != "off" else places.replace(bank=None)
        parts = {"towers": self.towers, "tx": self.tx, "config": config, "pad_id": self.pad_id}
        return step_lib.compile_step(self.mesh, places, **parts)

    def compile(self):
        """The compiled step, or None and what the compiler says about memory."""
        with jax.set_mesh(self.mesh):
            lowered = self.step().lower(self.state, self.batch)
            try:
                return lowered.compile(), ""
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                return None, first_line(error)

    def run(self, compiled, steps: int) -> dict[str, float]:
        """Seconds of a step on random data, the least of `steps`."""
        (state, batch), factors = self.random(), Factors.of(self.config.loss)
        device = self.mesh.devices.flat[0]
        clock, cores = [], []
        for _ in range(steps + 1):  # the first one warms up
            start, watch = time.perf_counter(), roofline.Watch(device)
            state, metrics = compiled(state, batch, factors)
            jax.block_until_ready((state, metrics))
            clock.append(time.perf_counter() - start)
            cores.append(watch.seconds())
        return {"clock_s": min(clock[1:]), "step_s": min(cores[1:]), "steps": steps}

    def random(self) -> tuple[TrainState, Batch]:
        """A state of step 0 and a batch, on the mesh."""
        places = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        fresh = lambda: step_lib.fresh_state(self.config, self.towers, self.tx)
        state = jax.jit(fresh, out_shardings=places)()
        batch = random_batch(self.config, self.towers)
        return state, jax.device_put(batch, sharding.rows(self.mesh))


class Vocabulary(NamedTuple):
    """All that the towers ask of a tokenizer."""

    vocab_size: int
    pad: int = 0


def vocabularies(config: Config) -> Tokenizers:
    """Gen's and Ctx's, without data: a BPE is taken to become as large as it may.

    Raises UserError if a pretrained tokenizer cannot be had.
    """

    def size(init: str) -> Vocabulary:
        if init == "scratch":
            return Vocabulary(config.data.vocab_size + len(tokenizer.ADDED))
        rows = weights.arch_from_hf(weights.resolve(init, shape_only=True))["vocab_size"]
        return Vocabulary(tokenizer.load(init, rows).vocab_size)

    gen = size(config.gen.init)
    shared = config.ctx.init in ("gen", config.gen.init) or config.tie_ctx_to_gen
    return Tokenizers(gen, gen if shared else size(config.ctx.init))


def abstract_batch(config: Config, mesh: Mesh) -> Batch:
    """Shapes, dtypes and shardings of the global batch."""
    shape = batch_shape(config)
    place = sharding.rows(mesh)
    whole = jax.eval_shape(lambda: empty_batch(shape, shape.B, shape.U))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), whole)


def random_batch(config: Config, towers: Towers) -> Batch:
    """Full rows of random tokens, every token a target, every slot in use."""
    shape, rng = batch_shape(config), np.random.default_rng(config.seed)
    batch = empty_batch(shape, shape.B, shape.U)
    B, T, R, U, L, P = shape.B, shape.T, shape.R, shape.U, shape.L, shape.P
    ends = (np.arange(1, P + 1) * (L // P) - 1).astype(np.int32)
    segments = np.minimum(np.arange(L) // (L // P), P - 1).astype(np.int32)
    ids = rng.integers(1, 2**32, (U, P, 2), dtype=np.uint32)
    positives = rng.integers(0, U * P, (B, R))
    batch.ret_positives_BxRxSx2[:, :, 0] = ids.reshape(-1, 2)[positives]
    words = lambda *size: rng.integers(0, towers.gen.vocab_size, size, dtype=np.int32)
    whole = np.ones((B, T), np.int32)
    return batch._replace(
        gen_tokens_BxT=words(B, T),
        gen_segments_BxT=whole,
        gen_positions_BxT=whole * np.arange(T, dtype=np.int32),
        ntp_targets_BxT=words(B, T),
        ntp_weights_BxT=whole.astype(np.float32),
        ret_positions_BxR=rng.integers(0, T, (B, R), dtype=np.int32),
        ret_valid_BxR=np.ones((B, R), bool),
        ctx_tokens_UxL=rng.integers(0, towers.ctx.vocab_size, (U, L), dtype=np.int32),
        ctx_segments_UxL=np.ones((U, L), np.int32) * (segments + 1),
        ctx_positions_UxL=np.ones((U, L), np.int32)
        * (np.arange(L) - segments * (L // P)).astype(np.int32),
        passage_ends_UxP=np.ones((U, P), np.int32) * ends,
        passage_valid_UxP=np.ones((U, P), bool),
        passage_ids_UxPx2=ids,
    )


def model_flops(config: Config, towers: Towers, state: TrainState) -> float:
    """FLOPs that the objective needs, recomputation aside: 6 for each weight and token (2 where it
    is only read, 4 where it passes a gradient on), attention over whole rows, head, scores."""
    shape = batch_shape(config)
    tokens = {"gen": shape.B * shape.T, "ctx": shape.U * shape.L}
    length = {"gen": shape.T, "ctx": shape.L}
    reads = {
        "gen": "gen",
        **({"ctx": "gen" if towers.tied else "ctx"} if config.loss.trains_nsp else {}),
    }
    total = 0.0
    for tower, owner in reads.items():
        arch = getattr(towers, tower).arch
        leaves = {k: v for k, v in flatten_dict(state.params[owner]).items() if "blocks" in k[0]}
        kernels = sum(v.size for v in leaves.values() if v.ndim > 2)
        trained = not getattr(config, owner).freeze
        factor = 2 if not trained else 4 if arch.lora.rank else 6
        attention = 2 * arch.layers * arch.heads * arch.head_dim * length[tower]
        total += tokens[tower] * (factor * kernels + (6 if trained else 2) * attention)
    if config.loss.ntp_weight:
        total += 6 * tokens["gen"] * towers.gen.width * towers.gen.vocab_size
    if config.loss.trains_nsp:
        total += 6 * shape.B * shape.R * shape.U * shape.P * towers.gen.width
    return total


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    text = str(error).strip() or type(error).__name__
    return re.sub(r"\s+", " ", text.splitlines()[0])[:300]
