"""What studies compare: arms, each a variant of every study's config file, at several scales."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from cosup_jax.config import make

START = "start:"  # before a variant, as a tower's init: what that variant's run exports as Gen

# Written out, not taken from configs/base.py: a change there must not train all studies anew.
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
        "study.seeds": 2,
    },
}
PRETRAINED = {  # Gen has read the passages before, Ctx starts from its weights
    "gen.init": f"{START}stage0",
    "optim.gen_learning_rate": 1e-3,
    "optim.ctx_learning_rate": 1e-3,
}
ARMS = {
    "N": {"loss.nsp_weight": 0.0},  # NTP alone
    "S": {"loss.ntp_weight": 0.0, "tie_ctx_to_gen": True},  # NSP alone, one tower in both roles
    "S2": {"loss.ntp_weight": 0.0},  # NSP alone, two towers
    "C": {},  # both, two towers that start from the same weights
    "T": {"tie_ctx_to_gen": True},  # both, in one tower
    "stage0": {  # NTP on the passages alone
        "data.train": "corpus:tfds:world",
        "loss.nsp_weight": 0.0,
        "gen.arch.tie_embeddings": False,
        "optim.gen_learning_rate": 1e-3,
    },
    "N_pre": PRETRAINED | {"loss.nsp_weight": 0.0},
    "S2_pre": PRETRAINED | {"loss.ntp_weight": 0.0},
    "C_pre": PRETRAINED,
}


def config(
    variant: str, own: Mapping[str, Mapping[str, Any]] | None = None, /, **study: Any
) -> ml_collections.ConfigDict:
    """A study's config, or that of one of its arms, at WORLD's or another scale.

    Args:
      variant: "", a scale, an arm, or "scale+arm".
      own: arms that only this study has.
      study: the keys of config.study.
    """
    base = WORLD | {f"study.{name}": value for name, value in study.items()}
    return make(base, SCALES | ARMS | dict(own or {}), variant)
