"""The paper's model: Llama-2-7B as Gen and as Ctx, trained as the official code trains it.

Reproduces  arXiv 2403.09024, NTP + NSP; every value is the official code's default, where it has
            one. What that code does by mistake is repaired (docs/official.md); the variant
            `official` keeps it, for comparison.
Hardware    two towers of 6.7 B parameters: with fp32 parameters, gradients and Adam moments about
            216 GB of state, split over all devices (fsdp); activations come on top. Computed, not
            measured.
Expected    the paper's tables; this project has not run this config
Needs       access to meta-llama/Llama-2-7b-hf; data.train with the paper's data, as JSONL
Command     python -m cosup_jax.main --config=configs/llama2_7b.py --workdir=runs/llama2_7b \
              --config.data.train=DIR/train.jsonl --config.data.eval=DIR/eval.jsonl
Variants    official: compat=official, that code's objective with its bugs; 8 ranks of 8 examples
            shape: the same shape from random weights, for preflight without access to the model
            shape_70b: Gen as Llama-2-70B beside a 7B Ctx, for preflight
"""

from cosup_jax.config import make


def both_towers(arch):
    return {f"{tower}.arch.{key}": value for tower in ("gen", "ctx") for key, value in arch.items()}


BASE = {
    "seed": 2,
    "num_epochs": 3,  # passes over the training examples
    "batch_size": 64,  # examples: 8 on each of 8 GPUs
    "gen.init": "meta-llama/Llama-2-7b-hf",
    "ctx.init": "gen",  # the same weights, a tower of its own
    "ctx.pooling": "last",  # the passage's last token
    **both_towers({"dtype": "bfloat16", "remat": "full"}),
    "loss.ntp_weight": 1.0,
    "loss.nsp_weight": 0.01,  # 1 / np_weight
    "loss.normalize": False,  # raw dot product ...
    "loss.temperature": 1.0,  # ... as it is
    "loss.mask_evidence": False,  # inserted passages are NTP targets
    "bank.kind": "off",
    "optim.gen_learning_rate": 2e-5,
    "optim.ctx_learning_rate": 2e-5,
    "optim.schedule": "epoch",  # constant within an epoch
    "optim.epoch_decay": 0.85,  # factor after each epoch
    "optim.warmup_steps": 0,
    "optim.b1": 0.9,
    "optim.b2": 0.999,
    "optim.eps": 1e-8,
    "optim.weight_decay": 0.0,
    "optim.clip_norm": 1.0,  # global norm
    "mesh.data": 1,
    "mesh.fsdp": -1,  # parameters and optimizer state split over all devices
    "data.packing": False,  # one example a Gen row, one passage a Ctx row
    "data.drop_without_ret": True,
    "data.max_gen_tokens": 1024,
    "data.max_ctx_tokens": 1024,
    "data.ret_slots": 4,  # [Ret] per example; the official code has no bound
    "data.ctx_rows": 128,  # distinct passages a step; the official code has no bound
    "data.workers": 4,  # Grain processes on each host
    "checkpoint.every_steps": 500,
    "eval.every_steps": 500,
}

LLAMA_7B = {
    "layers": 32,
    "width": 4096,
    "heads": 32,
    "kv_heads": 32,
    "head_dim": 128,
    "mlp_width": 11008,
    "tie_embeddings": False,
}
LLAMA_70B = LLAMA_7B | {
    "layers": 80,
    "width": 8192,
    "heads": 64,
    "kv_heads": 8,
    "mlp_width": 28672,
}
SHAPE = {
    "gen.init": "scratch",
    "data.vocab_size": 32000,
    **both_towers(LLAMA_7B),
}

VARIANTS = {
    "official": {"compat": "official", "loss.compat_ranks": 8},
    "shape": SHAPE,
    "shape_70b": SHAPE
    | {"ctx.init": "scratch"}
    | {f"gen.arch.{key}": value for key, value in LLAMA_70B.items()},
}


def get_config(variant=""):
    return make(BASE, VARIANTS, variant)
