"""Does what is gained in the domain hold out of it?

Shows       the arms on questions of the trained set, on entities that were never asked about, and
            on a task that was never trained: whether core's claims about answers and retrieval are
            larger in the domain than out of it; questions whose passages training has read, and
            those of one passage or several, apart
Hardware    2 CPU cores, 4 GB of memory
Expected    docs/results/domains.md
Command     python -m cosup_jax.main --config=configs/studies/domains.py --workdir=runs/studies \\
                --mode=study
Variants    small: some minutes, learns nothing; smollm2, smollm2_cpu: SmolLM2-135M on data of one's
            own (docs/results); an arm, such as C: that run alone, by --mode=train
"""

from cosup_jax.studies import arms


def get_config(variant=""):
    return arms.config(
        variant,
        question="Does what is gained in the domain hold out of it?",
        arms="N,S,S2,C,T",
        crossed=arms.CROSSED,
        claims="C > N: corpus/correct, bm25/correct; C > S2: corpus/retrieval_hit;"
        "C > S: corpus/retrieval_hit; T > S: corpus/retrieval_hit; T > C: corpus/retrieval_hit",
        between_sets=True,
        shown="corpus/correct,corpus/retrieval_hit,corpus_seen/correct,corpus_unseen/correct,"
        "corpus_seen/retrieval_hit,corpus_unseen/retrieval_hit,corpus_one/retrieval_hit,"
        "corpus_several/retrieval_hit,bm25/retrieval_hit,bm25/correct,gold/correct",
    )
