"""Every setting, its default, its unit and its meaning; frozen once the run starts.

Files under `configs/` build an `ml_collections.ConfigDict` with `make`; `freeze.py` turns it into
the dataclasses below, which are hashable and safe to close over in jit.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import ml_collections

from cosup_jax.dotted import leaves
from cosup_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies stretched beyond the length of pretraining."""

    kind: str = "none"  # none | linear | llama3 | yarn
    factor: float = 1.0  # length over that of pretraining
    original: int = 8192  # llama3, yarn: tokens of pretraining
    low: float = 1.0  # llama3: low_freq_factor; yarn: beta_slow; turns within `original`
    high: float = 4.0  # llama3: high_freq_factor; yarn: beta_fast; turns within `original`
    attention: float = 1.0  # yarn: factor on queries and keys


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank updates (arXiv 2106.09685) of kernels, which then stay as they start."""

    rank: int = 0  # 0 = none: the kernels themselves are trained
    alpha: float = 16.0  # the update is scaled by alpha / rank
    kernels: str = "q,k,v,o,gate,up,down"  # of every layer, comma-separated


@dataclasses.dataclass(frozen=True)
class ArchConfig:
    """Shape of one transformer. Pretrained weights bring all above `dtype`."""

    family: str = "llama"  # llama | mistral | qwen2 | qwen3 | gpt2 | gpt_neox | bert ...
    layers: int = 4  # transformer blocks
    width: int = 256  # residual stream, features
    heads: int = 4  # query heads
    kv_heads: int = 2  # key/value heads; divides heads
    head_dim: int = 64  # features per head; even
    mlp_width: int = 688  # features inside the MLP
    activation: str = ""  # silu | gelu | gelu_tanh; empty = the family's
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rope_fraction: float = 1.0  # share of head_dim that is rotated
    rope_scaling: RopeScaling = RopeScaling()
    max_positions: int = 2048  # tokens of the longest text; a learned position table ends there
    window: int = 0  # tokens that a token sees, itself included; 0 = all before it
    norm_eps: float = 1e-5  # epsilon of the norms
    tie_embeddings: bool = True  # output head = input embedding, transposed
    dtype: str = "float32"  # compute: float32 | bfloat16
    frozen_dtype: str = "float32"  # of parameters that are not trained: float32 | bfloat16
    lora: LoraConfig = LoraConfig()
    frozen_layers: int = 0  # lowest layers that stay as they start
    freeze_embeddings: bool = False  # True: tables, new tokens' rows too, stay as they start
    remat: str = "none"  # recompute in the backward pass: none | dots (keep matmuls) | full
    scan_unroll: int = 1  # layers per scan iteration; = layers unrolls the loop
    attention: str = "auto"  # auto | xla | cudnn (a GPU, bfloat16) | splash (a TPU)


_ARCH = [field.name for field in dataclasses.fields(ArchConfig)]
SHAPE = tuple(_ARCH[: _ARCH.index("dtype")])  # what pretrained weights bring


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """Where one language model comes from."""

    init: str = "scratch"  # scratch | HF directory | hub id | FILE.gguf; ctx: also gen (as Gen)
    pooling: str = ""  # ctx: last | eos, token ([Emb]), pad: appended | cls | mean; "" = as init's
    prompt: str = ""  # ctx: text before every passage, as "passage: "
    rotate: bool = False  # ctx: its vectors pass a random rotation, drawn by seed and never trained
    freeze: bool = False  # True: no gradient, no optimizer state, weights stay as they start
    arch: ArchConfig = ArchConfig()


TEMPERATURE_RANGE = (0.01, 100.0)  # of a learned temperature


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """total = ntp_weight * ntp + nsp_weight * nsp (arXiv 2403.09024, section 3)."""

    ntp_weight: float = 1.0  # factor on nats per supervised token
    nsp_weight: float = 1.0  # factor on nats per [Ret]; the paper: 0.01 with raw dot products
    normalize: bool = True  # cosine similarity; False = raw dot product, as in the paper
    temperature: float = 0.05  # scores are divided by it
    learn_temperature: bool = False  # train it, clamped to TEMPERATURE_RANGE, and sigmoid's bias
    contrastive: str = "softmax"  # softmax (InfoNCE) | sigmoid (each pair by itself, SigLIP)
    sigmoid_bias: float = -10.0  # sigmoid: added to every score
    identity_mask: bool = True  # False: a passage is as many negatives as [Ret]s ask for it
    margin_mask: bool = False  # mask negatives that score above the positive + margin
    margin: float = 0.1  # in units of similarity, before the temperature
    nsp_ramp_steps: int = 0  # steps over which nsp_weight grows or falls to its value, linearly
    nsp_ramp_from: float = 0.0  # nsp_weight at step 0 of the ramp
    tile_mib: float = 256.0  # MiB per device for the logits or scores of a tile; 0 = all at once
    mask_evidence: bool = False  # True: tokens after [Ret] up to and including [Cs] are no targets
    remote_negatives: str = "full"  # full (gradient through every vector) | detached (compat only)
    compat_ranks: int = 1  # virtual ranks of compat=official: equal slices of the global batch

    @property
    def tile_bytes(self) -> int:
        """What a device may spend on the logits or scores of a tile; 0 = all at once."""
        return int(self.tile_mib * 2**20)

    @property
    def trains_nsp(self) -> bool:
        """Whether NSP has a weight at any step."""
        return bool(self.nsp_weight or (self.nsp_ramp_steps and self.nsp_ramp_from))


@dataclasses.dataclass(frozen=True)
class BankConfig:
    """Memory of past vectors, extra negatives (our extension; off in the paper)."""

    kind: str = "off"  # off | passage (past passages) | dual (past queries too)
    size: int = 4096  # passage vectors kept, rounded down to whole steps
    queries: int = 4096  # query vectors kept by dual, rounded down to whole steps
    start_step: int = 0  # first step, counted from 0, that scores against the bank
    max_age: int = 1000  # steps after which an entry is no longer scored
    dtype: str = "float32"  # of the stored vectors: float32 | bfloat16
    ema_decay: float = 0.0  # > 0: passages are stored as a moving average of Ctx sees them


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW over Gen, Ctx and the NSP parameters."""

    gen_learning_rate: float = 1e-3  # peak, Gen and NSP parameters
    ctx_learning_rate: float = 1e-3  # peak, Ctx
    schedule: str = "cosine"  # constant | cosine (to final_fraction) | epoch (a factor an epoch)
    warmup_steps: int = 0  # linear warm-up, steps
    final_fraction: float = 0.1  # cosine: last learning rate over peak
    epoch_decay: float = 0.85  # epoch: factor per as many updates as the first epoch has steps
    b1: float = 0.9  # AdamW first-moment decay
    b2: float = 0.999  # AdamW second-moment decay
    eps: float = 1e-8  # AdamW epsilon
    weight_decay: float = 0.0  # decoupled; matrices only, never norms or temperature
    clip_norm: float = 1.0  # largest gradient norm; 0 = off
    clip: str = "global"  # one norm over all parameters | tower (each tower by its own norm)
    max_bad_steps: int = 10  # skipped steps in a row (loss or gradient not finite) that end the run


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices = data x fsdp x tensor; one axis may be -1 (whatever remains)."""

    data: int = -1  # batch rows split, parameters copied
    fsdp: int = 1  # batch rows and parameters split
    tensor: int = 1  # heads, mlp features and vocabulary split
    slices: int = 1  # TPU slices that data is split over first (DCN); the rest stays in one (ICI)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Sources, token limits and the static bounds that the packing plan keeps."""

    train: str = "tfds:world"  # sources, comma-separated or a list: source or source@weight
    eval: str = "tfds:world"  # sources whose held-out rows are evaluated
    world_entities: int = 1500  # passages in the embedded data set: countries, then cities
    tfds_dir: str = ""  # where TFDS builds; empty = TFDS's own default
    vocab_size: int = 4096  # scratch tokenizer: entries of the trained BPE, control tokens aside
    bad_rows: str = "refuse"  # refuse a source with a bad row | drop it and say how many
    dev_fraction: float = 0.05  # share of the passages held out of an eval source that has no split
    no_evidence_fraction: float = 0.0  # share of training examples given without evidence
    drop_without_ret: bool = False  # leave out examples without evidence (the official code does)
    packing: bool = True  # several examples a Gen row, several passages a Ctx row
    window: int = 512  # examples among which packing seeks what fits; more fill rows better, slower
    pure_steps: bool = False  # the examples of a step all come from one source
    row_lengths: int = 4  # packing off: lengths that Gen's and Ctx's rows may have; pairs compile
    max_gen_tokens: int = 256  # tokens of a Gen row; a longer example is left out and counted
    max_ctx_tokens: int = 96  # tokens of one passage; the rest is cut, the pooled token kept
    ret_slots: int = 8  # [Ret] per Gen row
    max_positives: int = 4  # evidence passages per example; more leave the example out, counted
    ctx_rows: int = 16  # Ctx rows of the global batch; compat=official: batch_size * ret_slots
    ctx_row_tokens: int = 256  # tokens of a Ctx row; packing off: max_ctx_tokens
    passage_slots: int = 8  # passages per Ctx row; packing off: 1
    workers: int = 0  # Grain worker processes; 0 = threads of this process
    prefetch: int = 4  # batches prepared ahead


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Orbax checkpoints under WORKDIR/checkpoints."""

    every_steps: int = 500  # steps between checkpoints; the last step is always saved
    keep: int = 2  # newest checkpoints kept


ARMS = {  # of --mode=evaluate: where passages come from at [Ret]
    "corpus": "trained retrieval",
    "candidates": "its candidates",
    "gold": "gold passage",
    "bm25": "BM25",
    "wrong": "wrong passage",
    "none": "no retrieval",
}
BY_QUERY = ("corpus", "candidates")  # of these: where Gen's query decides


def _numbers(text: str) -> list[int]:
    return sorted(int(number) for number in text.split(",") if number.strip())


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation, during training and by --mode=evaluate."""

    every_steps: int = 1000  # steps between evaluations; step 0 and the last are always evaluated
    seed: int = 0  # of questions and distractors, so the same ones whatever the run's own seed
    examples: int = 400  # questions per evaluation set, drawn once by seed
    answers: int = 0  # training: questions per set that are answered and scored, drawn by seed
    answers_every_steps: int = 1000  # training: steps between answering them; also at the last
    questions: int = 100  # evaluate: questions per set, drawn by seed; 0 = all
    arms: str = ",".join(ARMS)  # evaluate: where passages come from, each over the same questions
    corpus: str = ""  # evaluate: passages searched beside a set's own, as index.corpus has them
    corpus_sizes: str = "100,1000,10000"  # evaluate: passages searched besides all; gold is in each
    hard_corpus_sizes: str = ""  # evaluate: likewise, of what BM25 ranks best for the questions
    judge: str = "containment"  # of grounding: token containment | NLI model, hub id or directory

    @property
    def arm_names(self) -> list[str]:
        """Of `arms`."""
        return [name.strip() for name in self.arms.split(",")]

    @property
    def sizes(self) -> list[int]:
        """Of `corpus_sizes`, ascending. Raises ValueError for what is no number."""
        return _numbers(self.corpus_sizes)

    @property
    def hard_sizes(self) -> list[int]:
        """Of `hard_corpus_sizes`, likewise."""
        return _numbers(self.hard_corpus_sizes)


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Answers written with retrieval."""

    examples: int = 6  # answers written into report.html
    batch_size: int = 32  # questions answered at once; rows of the cache of keys and values
    context_tokens: int = 256  # prompt, inserted passages and answer together; slots of the cache
    max_tokens: int = 64  # tokens that Gen writes per question, eos too; no [Ret], [Ce] or passage
    max_retrievals: int = 4  # [Ret]s per question
    retrieval: str = "corpus"  # corpus | candidates | gold | bm25 | wrong | none
    retriever: str = ""  # workdir of another run, whose Gen and Ctx retrieve; empty = the own ones
    passages: int = 1  # that are inserted at a [Ret], the best first
    keep_passages: bool = True  # False: dropped behind [Ce], their spans stay (ctx_truncate)
    retrieve_first: bool = False  # True: every answer begins with a [Ret]
    ret_threshold: float = 0.0  # > 0: [Ret] where its probability reaches it, and only there
    temperature: float = 0.0  # 0 = the likeliest token; else one is drawn from softmax(logits / it)
    top_p: float = 1.0  # drawn among the likeliest tokens that have this probability together
    seed: int = 0  # of what is drawn
    chunk_tokens: int = 32  # of a prompt or a passage that are read at once


@dataclasses.dataclass(frozen=True)
class IndexConfig:
    """Passage vectors on disk, --mode=encode, and hard negatives found with them, --mode=mine."""

    corpus: str = ""  # FILE.jsonl, FILE.array_record, directory, tfds:world/N; empty = of all data
    dtype: str = "float32"  # of the vectors on disk: float32 | bfloat16 | int8 (a scale a vector)
    shard_rows: int = 32_768  # vectors of a file; what a kill may cost
    faiss: bool = False  # also write index.faiss, float32, for faiss.read_index
    mine_top: int = 100  # best passages of a [Ret] among which hard negatives are sought
    mine_keep: int = 4  # hard negatives of an example, at most
    mine_margin: float = 0.05  # kept below: the positive's score less this share of its size


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Files of --mode=export."""

    dtype: str = "float32"  # of the weights: float32 | bfloat16 | float16


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Telemetry."""

    every_steps: int = 10  # steps between lines of metrics.jsonl
    probe_every_steps: int = 1000  # steps between the costly metrics (probe.py); 0 = never
    profile_from: int = 0  # first step of a trace into WORKDIR/profile; 0 = none
    profile_steps: int = 5  # steps of a trace, also of one that SIGUSR1 asks for
    hang_seconds: int = 1800  # without a step (compilation, evaluation too): dump stacks; 0 = never
    probe_bank: bool = False  # dual bank: probes compare it with a large live batch, all re-encoded


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """--mode=study: which variants of the config file are compared, and what is claimed of them."""

    name: str = ""  # of the directory of its pages; empty = those of the config file and variant
    question: str = ""  # what the study asks, in a sentence
    arms: str = ""  # variants of the config file, comma-separated
    seeds: int = 3  # runs of each arm: config.seed and those after it
    measures: str = "answers,majority"  # of each run, comma-separated, as studies/measures.py has
    crossed: str = ""  # ARM|ARM,...: the first one's Gen answers, the second one's pair retrieves
    shown: str = ""  # metrics of the page's tables, comma-separated; empty = those of the claims
    claims: str = ""  # "A > B: METRIC, METRIC; ...": A's mean is above B's; - before one: below
    between_sets: bool = False  # also: is what is claimed larger in the first set than in others?


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole run. Exactly one of num_steps and num_epochs is positive."""

    seed: int = 0  # parameters, data order, everything random but what eval and generate draw
    num_steps: int = 0  # optimizer steps
    num_epochs: int = 0  # passes over the training examples
    batch_size: int = 16  # Gen rows of the global batch; packing off: one example a row
    micro_batches: int = 1  # slices of a step, one after the other; every negative is kept
    compat: str = ""  # official: the official code's objective, bugs included, for comparison
    deterministic: bool = False  # on a GPU: reproducible kernels, at some cost in speed
    tie_ctx_to_gen: bool = False  # one tower for both roles
    gen: TowerConfig = TowerConfig()
    ctx: TowerConfig = TowerConfig(init="gen")
    loss: LossConfig = LossConfig()
    bank: BankConfig = BankConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    generate: GenerateConfig = GenerateConfig()
    index: IndexConfig = IndexConfig()
    export: ExportConfig = ExportConfig()
    log: LogConfig = LogConfig()
    study: StudyConfig = StudyConfig()


def make(overrides: Mapping[str, Any], variants: Mapping[str, Mapping], variant: str = ""):
    """The defaults, then `overrides`, then `variants[variant]`, as a ConfigDict.

    Keys are dotted paths; `a+b` is a and then b. Raises UserError for an unknown key or variant.
    """
    named = variant.split("+") if variant else []
    for name in named:
        if name not in variants:
            known = ", ".join(sorted(variants)) or "none"
            raise UserError(f"unknown config variant {name!r}; this file has: {known}")
    config = ml_collections.ConfigDict(dataclasses.asdict(Config()), type_safe=False)
    for settings in (overrides, *(variants[name] for name in named)):
        for dotted, value in settings.items():
            set_dotted(config, dotted, value)
    return config


def set_dotted(config: ml_collections.ConfigDict, dotted: str, value: Any) -> None:
    """Sets `config.a.b = value` for dotted = "a.b". Raises UserError for an unknown key."""
    *groups, name = dotted.split(".")
    node = config
    for group in groups:
        node = node[group] if isinstance(node, ml_collections.ConfigDict) and group in node else {}
    if not isinstance(node, ml_collections.ConfigDict) or name not in node:
        raise unknown_key(dotted)
    node[name] = value


def unknown_key(dotted: str) -> UserError:
    """What to say of a key that is none: which it may be, or else which there are in its group."""
    known = [name for name, _ in leaves(to_dict(Config()))]
    groups = (f"{dotted}.", dotted.rpartition(".")[0] + ".", "")
    group = next(g for g in groups if any(name.startswith(g) for name in known))
    inside = [name.removeprefix(group) for name in known if name.startswith(group)]
    near = difflib.get_close_matches(dotted.removeprefix(group), inside, n=1, cutoff=0.75)
    near = [group + name for name in near] or [n for n in known if n.endswith(f".{dotted}")]
    there = ", ".join(dict.fromkeys(group + name.partition(".")[0] for name in inside))
    hint = f"did you mean {near[0]!r}?" if near else f"there are {there}"
    return UserError(f"unknown config key {dotted!r}; {hint}")


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain dict, as written to config.json."""
    return dataclasses.asdict(config)


def sources(text: str) -> list[tuple[str, float]]:
    """`"a,b@2"` -> [("a", 1.0), ("b", 2.0)]. Raises UserError for a weight that is no number."""
    found = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, at, weight = item.rpartition("@")
        try:
            found.append((name, float(weight)) if at else (item, 1.0))
        except ValueError:
            raise UserError(
                f"data source {item!r}: {weight!r} is no weight, write source@2.0"
            ) from None
        if not 0 < found[-1][1] <= 1000:
            raise UserError(f"data source {item!r}: the weight must be positive, 1000 at most")
    return found
