"""Both towers from scratch on the embedded data set of countries and cities: minutes on a CPU.

Shows       the whole method in one run: NTP and NSP together, retrieval measured on held-out
            questions over every passage, cited answers in report.html
Hardware    2 CPU cores, 4 GB of memory; no accelerator and no network
Expected    see the README: recall@1 on held-out in-domain questions, beside BM25 and step zero
Command     python -m cosup_jax.main --config=configs/base.py --workdir=runs/base
Variants    smoke: a few steps of a tiny model, seconds; shows that everything runs, learns nothing
"""

from cosup_jax.config import make

ARCH = {
    "layers": 4,  # transformer blocks
    "width": 192,  # features
    "heads": 4,  # query heads
    "kv_heads": 2,  # key/value heads
    "head_dim": 48,  # features per head
    "mlp_width": 512,  # features inside SwiGLU
}
SMOKE_ARCH = {
    "layers": 2,
    "width": 64,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 32,
    "mlp_width": 128,
}


def both_towers(arch):
    return {f"{tower}.arch.{key}": value for tower in ("gen", "ctx") for key, value in arch.items()}


BASE = {
    "num_steps": 300,  # optimizer steps
    "batch_size": 16,  # Gen rows; packed, several examples a row
    "gen.init": "scratch",
    "ctx.init": "gen",  # the same random weights: queries and passages start in one space
    **both_towers(ARCH),
    "data.vocab_size": 4096,  # entries of the byte-level BPE trained on the corpus
    "data.max_gen_tokens": 256,  # tokens of a Gen row
    "optim.warmup_steps": 20,  # steps
}

VARIANTS = {
    "smoke": {
        "num_steps": 6,
        "batch_size": 8,
        **both_towers(SMOKE_ARCH),
        "data.world_entities": 300,  # passages: all countries, and some cities
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
