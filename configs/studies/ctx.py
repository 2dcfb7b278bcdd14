"""Which Ctx?

Shows       Ctx from the same random weights as Gen, from others, frozen, and from the same weights
            under a fixed random rotation of its vectors: do spaces help that coincide from the
            start? Nothing is pretrained here. Another encoder: add an arm with its ctx.init
Hardware    2 CPU cores, 4 GB of memory
Expected    not run yet: docs/results/README.md
Command     python -m cosup_jax.main --config=configs/studies/ctx.py --workdir=runs/studies \\
                --mode=study
Variants    small: some minutes, learns nothing; smollm2, smollm2_cpu: SmolLM2-135M on data of one's
            own (README); an arm, such as C: that run alone, by --mode=train
"""

from cosup_jax.studies import arms

ARMS = {
    "C_random_ctx": {"ctx.init": "scratch"},
    "C_frozen_ctx": {"ctx.freeze": True},
    "C_rotated_ctx": {"ctx.rotate": True},
}


def get_config(variant=""):
    return arms.config(
        variant,
        ARMS,
        question="Which Ctx?",
        arms=f"C,{','.join(ARMS)}",
        claims="C > C_random_ctx: corpus/retrieval_hit; C > C_frozen_ctx: corpus/retrieval_hit;"
        "C > C_rotated_ctx: corpus/retrieval_hit;"
        "C_rotated_ctx > C_random_ctx: corpus/retrieval_hit",
        shown="corpus/correct,corpus/retrieval_hit,corpus/recall@5,gold/correct,none/correct",
    )
