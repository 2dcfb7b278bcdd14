"""What does a right passage do for the answer, and what a wrong one?

Shows       answers where retrieval succeeded and where it failed, arm by arm; and, as these are not
            the same questions, every question with its own passage and with one fixed wrong one
Hardware    2 CPU cores, 4 GB of memory
Expected    docs/results/retrieval.md, retrieval-smollm2_cpu.md
Command     python -m cosup_jax.main --config=configs/studies/retrieval.py --workdir=runs/studies \\
                --mode=study
Variants    small: some minutes, learns nothing; smollm2, smollm2_cpu: SmolLM2-135M on data of one's
            own (docs/results); an arm, such as C: that run alone, by --mode=train
"""

from cosup_jax.studies import arms


def get_config(variant=""):
    return arms.config(
        variant,
        question="What does a right passage do for the answer, and what a wrong one?",
        arms="N,S,S2,C,T",
        crossed=arms.CROSSED,
        claims="C > N: gold/correct - wrong/correct, gold/correct - none/correct;"
        "T > N: gold/correct - wrong/correct",
        shown="corpus_hit/correct,corpus_miss/correct,gold/correct,wrong/correct,none/correct,"
        "gold/correct - wrong/correct,gold/correct - none/correct",
    )
