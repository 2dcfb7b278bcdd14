"""How does retrieval fare in larger corpora? `corpus` has 30,000 passages here.

Shows       nested corpora of rising size, with the right passages in each, filled at random and by
            what BM25 ranks best for the questions, among the passages of the data and those of a
            world twenty times as large; the slope of recall per tenfold size, arm by arm
            (with data of one's own: --config.eval.corpus= and sizes that they have)
Hardware    2 CPU cores, 4 GB of memory
Expected    docs/results/corpus.md
Command     python -m cosup_jax.main --config=configs/studies/corpus.py --workdir=runs/studies \\
                --mode=study
Variants    small: some minutes, learns nothing; smollm2, smollm2_cpu: SmolLM2-135M on data of one's
            own (docs/results); an arm, such as C: that run alone, by --mode=train
"""

from cosup_jax.studies import arms


def get_config(variant=""):
    config = arms.config(
        variant,
        question="How does retrieval fare in larger corpora?",
        arms="S,S2,C,T",
        crossed="C|S,C|S2,C|T",
        claims="C > S2: slope/retrieval_hit, slope_hard/retrieval_hit, corpus/retrieval_hit;"
        "T > S: slope/retrieval_hit, slope_hard/retrieval_hit, corpus/retrieval_hit",
        shown="corpus_250/retrieval_hit,corpus_1000/retrieval_hit,corpus_10000/retrieval_hit,"
        "corpus/retrieval_hit,slope/retrieval_hit,corpus_hard_250/retrieval_hit,"
        "corpus_hard_1000/retrieval_hit,corpus_hard_10000/retrieval_hit,slope_hard/retrieval_hit,"
        "bm25/retrieval_hit",
    )
    if config.data.train:  # `world`; the other scales have data of one's own
        size = 20 * config.data.world_entities
        config.eval.corpus = f"tfds:world/{size}"
        config.study.question += f" `corpus` has {size:,} passages here."
    config.eval.corpus_sizes = "250,1000,10000"  # a passage for each question is in the smallest
    config.eval.hard_corpus_sizes = config.eval.corpus_sizes
    return config
