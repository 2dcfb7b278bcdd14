"""Both towers from scratch on the embedded data set of countries and cities: minutes on a CPU.

Shows       the whole method in one run: NTP and NSP together, retrieval measured on held-out
            questions over every passage, cited answers in report.html
Hardware    2 CPU cores, 4 GB of memory; no accelerator and no network
Expected    the README's table: recall@1 on held-out in-domain questions >= 0.80, chance 0.0007
Command     python -m cosup_jax.main --config=configs/base.py --workdir=runs/base
Variants    smoke: a few steps of a tiny model, seconds; shows that everything runs, learns nothing
            ntp: that loss alone, a generator
            nsp: that loss alone, a retriever whose query is its own state at [Ret]
            nsp_tied: the same retriever in one tower
            tied: one tower, both losses, as the paper's authors released it
            tied_token: one tower that reads passages at a token of its own, [Emb]
            sigmoid: each query and passage judged by itself
            passage_bank: past passages beside the batch
            dual_bank: past passages and queries beside the batch; both banks from step 140 on,
            when the vectors no longer move much (docs/bank.md)
"""

from cosup_jax.config import make

LAYERS = 2

BASE = {
    "num_steps": 200,  # optimizer steps, a little more than one epoch
    "batch_size": 16,  # Gen rows; packed, about four examples a row
    "gen.init": "scratch",
    "ctx.init": "gen",  # the same random weights: queries and passages start in one space
    "gen.arch.layers": LAYERS,  # transformer blocks
    "gen.arch.width": 192,  # features
    "gen.arch.heads": 4,  # query heads
    "gen.arch.kv_heads": 2,  # key/value heads
    "gen.arch.head_dim": 48,  # features per head
    "gen.arch.mlp_width": 512,  # features inside SwiGLU
    "gen.arch.scan_unroll": LAYERS,  # no loop over the layers: on a CPU no slower
    "ctx.arch.scan_unroll": LAYERS,
    "loss.temperature": 0.1,  # a lower one collapses a tower that starts from random weights
    "loss.mask_evidence": True,  # the passage is read, not predicted; the paper compares both
    "optim.gen_learning_rate": 2e-3,
    "optim.ctx_learning_rate": 2e-3,
    "optim.warmup_steps": 10,  # steps
    "data.vocab_size": 8192,  # entries of the BPE: most names become one token
    "data.max_gen_tokens": 384,  # tokens of a Gen row
    "data.ret_slots": 6,  # [Ret] per Gen row
    "data.passage_slots": 6,  # passages per Ctx row
    # Often, as the run is short; by default they take less than 2 % of a long run.
    "checkpoint.every_steps": 100,
    "eval.every_steps": 100,
    "log.probe_every_steps": 100,
}

VARIANTS = {
    "ntp": {"loss.nsp_weight": 0.0},
    "nsp": {"loss.ntp_weight": 0.0},
    "nsp_tied": {"loss.ntp_weight": 0.0, "tie_ctx_to_gen": True},
    "tied": {"tie_ctx_to_gen": True},
    "tied_token": {"tie_ctx_to_gen": True, "ctx.pooling": "token"},
    "sigmoid": {"loss.contrastive": "sigmoid", "loss.learn_temperature": True},
    "passage_bank": {"bank.kind": "passage", "bank.start_step": 140},
    "dual_bank": {"bank.kind": "dual", "bank.start_step": 140},
    "smoke": {
        "num_steps": 6,
        "batch_size": 8,
        "gen.arch.width": 64,
        "gen.arch.heads": 2,
        "gen.arch.kv_heads": 1,
        "gen.arch.head_dim": 32,
        "gen.arch.mlp_width": 128,
        "data.world_entities": 300,  # passages: countries, and the largest cities
        "data.vocab_size": 1024,
        "data.ctx_rows": 8,
        "optim.warmup_steps": 2,
        "checkpoint.every_steps": 3,
        "eval.every_steps": 3,
        "eval.examples": 32,
        "generate.examples": 2,
        "log.every_steps": 1,
    },
}


def get_config(variant=""):
    return make(BASE, VARIANTS, variant)
