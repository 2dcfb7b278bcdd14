"""Does what is gained in the domain hold out of it?

Shows       the arms on questions of the trained set, on entities that were never asked about, and
            on a task that was never trained; with evidence seen in training and not
Hardware    2 CPU cores, 4 GB of memory
Expected    docs/results/domains.md
Command     python -m cosup_jax.main --config=configs/studies/domains.py --workdir=runs/studies \\
                --mode=study
Variants    small: a minute, learns nothing; an arm, such as C: that run alone, by --mode=train
"""

from cosup_jax.studies import arms


def get_config(variant=""):
    return arms.config(
        variant,
        question="Does what is gained in the domain hold out of it?",
        arms="N,S,S2,C,T",
        claims="C > N: corpus/correct, bm25/correct; C > S2: corpus/recall@1;"
        "T > S: corpus/recall@1",
        shown="corpus/correct,corpus/recall@1,bm25/recall@1,bm25/correct,gold/correct",
    )
