"""SmolLM2-135M as Gen and as Ctx, trained together on questions with evidence.

Shows       the method on pretrained weights at a size that one accelerator holds
Hardware    one GPU or TPU chip: two towers of 135 M parameters, fp32 parameters, gradients and Adam
            moments 4.3 GB, 15.7 GB in all at most (measured); `laptop`: 2 CPU cores, 9 GB
Expected    the table of docs/pretrained.md, in 7 minutes on an H200; `laptop`: 10 minutes of steps
Needs       the weights of HuggingFaceTB/SmolLM2-135M: hub, or gen.init=DIRECTORY or FILE.gguf;
            data: squad through TFDS, or data.train=FILE.jsonl,... and data.eval=FILE.jsonl,...
Command     python -m cosup_jax.main --config=configs/smollm2.py --workdir=runs/smollm2
Variants    laptop: a short run that shows that it learns
            lora: adapters and embeddings instead of the kernels
            paper: the paper's raw dot products and weight, in place of cosine and temperature
"""

from cosup_jax.config import make


def both_towers(arch):
    return {f"{tower}.arch.{key}": value for tower in ("gen", "ctx") for key, value in arch.items()}


BASE = {
    "num_steps": 1000,  # optimizer steps
    "batch_size": 32,  # Gen rows; packed, several examples a row
    "gen.init": "HuggingFaceTB/SmolLM2-135M",
    "ctx.init": "gen",  # the same weights, a tower of its own
    **both_towers({"dtype": "bfloat16", "remat": "dots"}),
    "optim.gen_learning_rate": 1e-4,
    "optim.ctx_learning_rate": 1e-4,
    "optim.warmup_steps": 50,
    "optim.b2": 0.95,
    "optim.weight_decay": 0.01,
    "data.train": "tfds:squad",
    "data.eval": "tfds:squad",
    "data.max_gen_tokens": 512,  # tokens of a Gen row
    "data.ret_slots": 16,  # [Ret] per Gen row
    "data.max_ctx_tokens": 256,  # tokens of one passage
    "data.ctx_rows": 32,
    "data.ctx_row_tokens": 512,
    "data.passage_slots": 16,  # passages per Ctx row
    "generate.context_tokens": 512,  # of an answer, with all that it reads
    "eval.every_steps": 500,
}

VARIANTS = {
    "laptop": {
        "num_steps": 40,
        "batch_size": 4,
        **both_towers({"dtype": "float32", "remat": "none"}),
        "optim.warmup_steps": 5,
        "data.max_gen_tokens": 320,
        "data.max_ctx_tokens": 160,
        "data.ctx_rows": 4,
        "data.ctx_row_tokens": 320,
        "eval.examples": 100,
        "generate.examples": 3,
        "generate.context_tokens": 320,
        "log.every_steps": 5,
        "log.probe_every_steps": 0,
    },
    "lora": both_towers({"lora.rank": 16, "lora.alpha": 32.0}) | {"optim.gen_learning_rate": 5e-4},
    "paper": {"loss.nsp_weight": 0.01, "loss.normalize": False, "loss.temperature": 1.0},
}


def get_config(variant=""):
    return make(BASE, VARIANTS, variant)
