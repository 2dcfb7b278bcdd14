"""Which negatives?

Shows       the batch halved and doubled at the same number of examples, past passages and past
            queries as negatives
Hardware    2 CPU cores, 4 GB of memory
Expected    not run yet: docs/results/README.md
Command     python -m cosup_jax.main --config=configs/studies/negatives.py --workdir=runs/studies \\
                --mode=study
Variants    small: minutes, learns nothing (the halved and the doubled batch take 400 and 100 steps
            there too); an arm, such as C: that run alone, by --mode=train
"""

from cosup_jax.studies import arms

ARMS = {
    "C_half": {
        "batch_size": 8,
        "data.ctx_rows": 8,
        "num_steps": 400,
        "checkpoint.every_steps": 100,
    },
    "C_double": {
        "batch_size": 32,
        "data.ctx_rows": 32,
        "num_steps": 100,
        "checkpoint.every_steps": 25,
    },
    "C_passage_bank": {"bank.kind": "passage", "bank.start_step": 140},
    "C_dual_bank": {"bank.kind": "dual", "bank.start_step": 140},
}


def get_config(variant=""):
    return arms.config(
        variant,
        ARMS,
        question="Which negatives?",
        arms=f"C,{','.join(ARMS)}",
        claims="C > C_half: corpus/retrieval_hit; C_double > C: corpus/retrieval_hit;"
        "C_passage_bank > C: corpus/retrieval_hit; C_dual_bank > C: corpus/retrieval_hit",
        shown="corpus/correct,corpus/retrieval_hit,corpus/recall@5,gold/correct,none/correct",
    )
