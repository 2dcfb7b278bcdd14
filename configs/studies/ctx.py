"""Which Ctx?

Shows       Ctx from the same weights as Gen, from random ones of the same shape, frozen, and from
            the same weights under a fixed random rotation of its vectors: do spaces help that
            coincide from the start? Not by default, as it needs the hub: C_minilm, a sentence
            encoder whose vectors a learned matrix brings to Gen's width. Only smollm2 starts from
            pretrained weights; its random Ctx has a tokenizer of its own
Hardware    2 CPU cores, 4 GB of memory
Expected    docs/results/ctx.md, ctx-minilm.md
Command     python -m cosup_jax.main --config=configs/studies/ctx.py --workdir=runs/studies \\
                --mode=study
Variants    small: some minutes, learns nothing; smollm2, smollm2_cpu: SmolLM2-135M on data of one's
            own (docs/results); an arm, such as C: that run alone, by --mode=train
"""

from cosup_jax.config import SHAPE
from cosup_jax.studies import arms

ARMS = {
    "C_random_ctx": {"ctx.init": "scratch"},
    "C_frozen_ctx": {"ctx.freeze": True},
    "C_rotated_ctx": {"ctx.rotate": True},
}
ON_DEMAND = {
    "C_minilm": {
        "ctx.init": "sentence-transformers/all-MiniLM-L6-v2",
        "optim.ctx_learning_rate": 1e-4,  # that of `world` is one for random weights
    },
}


def get_config(variant=""):
    gen = arms.scale(variant).gen.arch
    as_gen = {f"ctx.arch.{name}": gen[name] for name in SHAPE}
    own = ARMS | ON_DEMAND | {"C_random_ctx": ARMS["C_random_ctx"] | as_gen}
    return arms.config(
        variant,
        own,
        question="Which Ctx?",
        arms=f"C,{','.join(ARMS)}",
        crossed=",".join(f"C|{name}" for name in ARMS),
        claims="C > C_random_ctx: corpus/retrieval_hit; C > C_frozen_ctx: corpus/retrieval_hit;"
        "C > C_rotated_ctx: corpus/retrieval_hit;"
        "C_rotated_ctx > C_random_ctx: corpus/retrieval_hit",
        shown="corpus/correct,corpus/retrieval_hit,corpus/recall@5,gold/correct,none/correct",
    )
