"""How large the runs of a study are: settings that every arm varies.

Written out, not taken from configs/base.py and configs/smollm2.py: a change there must not train
all studies anew.
"""

from collections.abc import Mapping
from typing import Any

_LAYERS = 30  # of SmolLM2-135M


def _both_towers(arch: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{tower}.arch.{key}": value for tower in ("gen", "ctx") for key, value in arch.items()}


WORLD = {  # both towers from random weights on the embedded data; minutes a run on 2 CPU cores
    "num_steps": 200,  # optimizer steps, a little more than one epoch
    "batch_size": 16,  # Gen rows
    "ctx.init": "gen",
    "gen.arch.layers": 2,
    "gen.arch.width": 192,
    "gen.arch.heads": 4,
    "gen.arch.kv_heads": 2,
    "gen.arch.head_dim": 48,
    "gen.arch.mlp_width": 512,
    "gen.arch.scan_unroll": 2,
    "ctx.arch.scan_unroll": 2,
    "loss.temperature": 0.1,
    "loss.mask_evidence": True,  # the passage is read, not predicted
    "optim.gen_learning_rate": 2e-3,
    "optim.ctx_learning_rate": 2e-3,
    "optim.warmup_steps": 10,
    "data.vocab_size": 8192,
    "data.max_gen_tokens": 384,
    "data.ret_slots": 6,
    "data.passage_slots": 6,
    "checkpoint.every_steps": 50,
    "checkpoint.keep": 4,  # what is measured over training is read from them
    "eval.every_steps": 200,
    "log.probe_every_steps": 100,
    "eval.questions": 200,  # of each set
    "eval.arms": "corpus,gold,bm25,wrong,none",
    "eval.corpus_sizes": "",
    "generate.retrieve_first": True,
    "generate.examples": 0,
}
# SmolLM2-135M in both roles, as configs/smollm2.py trains it, on questions of the user's own.
SMOLLM2 = {
    "num_steps": 800,  # about an epoch of 52,000 questions
    "batch_size": 20,  # Gen rows of about three examples, 64 a step
    "gen.init": "HuggingFaceTB/SmolLM2-135M",
    **_both_towers({"dtype": "bfloat16", "remat": "dots", "scan_unroll": 1}),
    # The shape that these weights bring, for a tower that starts from random ones beside them.
    "gen.arch.layers": _LAYERS,
    "gen.arch.width": 576,
    "gen.arch.heads": 9,
    "gen.arch.kv_heads": 3,
    "gen.arch.head_dim": 64,
    "gen.arch.mlp_width": 1536,
    "gen.arch.rope_theta": 1e5,
    "loss.temperature": 0.05,
    "optim.gen_learning_rate": 1e-4,
    "optim.ctx_learning_rate": 1e-4,
    "optim.warmup_steps": 50,
    "optim.b2": 0.95,
    "optim.weight_decay": 0.01,
    "data.train": "",  # --config.data.train=FILE.jsonl,... must say
    "data.eval": "",  # the same
    "data.vocab_size": 49_152,  # of a tower that starts from random weights
    "data.max_gen_tokens": 512,
    "data.ret_slots": 16,
    "data.max_ctx_tokens": 256,
    "data.ctx_rows": 20,
    "data.ctx_row_tokens": 512,
    "data.passage_slots": 16,
    "generate.context_tokens": 512,
    "checkpoint.every_steps": 400,
    "checkpoint.keep": 2,  # of 3.2 GB each
    "eval.every_steps": 400,
    "eval.questions": 100,
    "study.seeds": 2,
}
SCALES = {
    "small": {  # shows in minutes that everything runs, and nothing else
        "num_steps": 4,
        "batch_size": 8,
        "gen.arch.width": 64,
        "gen.arch.heads": 2,
        "gen.arch.kv_heads": 1,
        "gen.arch.head_dim": 32,
        "gen.arch.mlp_width": 128,
        "data.world_entities": 300,
        "data.vocab_size": 1024,
        "data.ctx_rows": 8,
        "optim.warmup_steps": 2,
        "checkpoint.every_steps": 2,
        "eval.every_steps": 4,
        "eval.examples": 32,
        "eval.questions": 16,
        "log.probe_every_steps": 0,
        "study.seeds": 2,
    },
    "smollm2": SMOLLM2,
    "smollm2_cpu": SMOLLM2  # what two cores do of it in minutes: 40 steps of some 8 examples
    | {
        "num_steps": 40,
        "batch_size": 4,
        **_both_towers({"dtype": "float32", "remat": "none"}),
        "optim.warmup_steps": 5,
        "data.max_gen_tokens": 320,
        "data.max_ctx_tokens": 160,
        "data.ctx_rows": 4,
        "data.ctx_row_tokens": 320,
        "generate.context_tokens": 320,
        "checkpoint.every_steps": 20,
        "eval.every_steps": 40,
        "eval.examples": 100,
        "eval.questions": 20,
        "log.every_steps": 5,
        "log.probe_every_steps": 0,
        "study.seeds": 1,
    },
}
