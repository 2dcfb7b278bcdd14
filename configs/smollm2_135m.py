"""A small pretrained model in both roles: SmolLM2-135M on the embedded data set.

Shows       the method on pretrained weights at a size that one accelerator holds
Hardware    one GPU or TPU chip: two towers of 135 M parameters, fp32 parameters, gradients and Adam
            moments 4.3 GB, activations on top. Computed, not measured.
Expected    not yet run
Needs       the weights of HuggingFaceTB/SmolLM2-135M (hub, or gen.init=DIRECTORY)
Command     python -m cosup_jax.main --config=configs/smollm2_135m.py --workdir=runs/smollm2_135m
Variants    paper: the paper's raw dot products and weight, in place of cosine and temperature
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
    "data.max_gen_tokens": 512,  # tokens of a Gen row
    "data.ret_slots": 16,  # [Ret] per Gen row
    "data.max_ctx_tokens": 128,  # tokens of one passage
    "data.ctx_rows": 32,
    "data.ctx_row_tokens": 512,
    "data.passage_slots": 16,  # passages per Ctx row
}

VARIANTS = {
    "paper": {"loss.nsp_weight": 0.01, "loss.normalize": False, "loss.temperature": 1.0},
}


def get_config(variant=""):
    return make(BASE, VARIANTS, variant)
