"""Does co-supervision beat each supervision alone, and why?

Shows       the arms N (NTP alone), S and S2 (NSP alone, in one tower or two), C (both, two
            towers) and T (both, one tower), from the same Gen, over the same data in the same
            order; and one arm's Gen with another's retrieval: is a gain better retrieval or better
            reading?
Hardware    2 CPU cores, 4 GB of memory
Expected    docs/results/core.md, core-smollm2_cpu.md
Command     python -m cosup_jax.main --config=configs/studies/core.py --workdir=runs/studies \\
                --mode=study
Variants    small: some minutes, learns nothing; smollm2, smollm2_cpu: SmolLM2-135M on data of one's
            own (docs/results); an arm, such as C: that run alone, by --mode=train
"""

from cosup_jax.studies import arms


def get_config(variant=""):
    return arms.config(
        variant,
        question="Does co-supervision beat each supervision alone, and why?",
        arms="N,S,S2,C,T",
        crossed=arms.CROSSED,
        measures="answers,majority,training",
        claims="C > N: corpus/correct, bm25/correct, gold/correct, none/correct,"
        "-ntp_nats_per_token;"
        "C > S2: corpus/retrieval_hit; C > S: corpus/retrieval_hit;"
        "T > S: corpus/retrieval_hit; T > C: corpus/retrieval_hit; T > N: -ntp_nats_per_token;"
        "C > T: -ntp_nats_per_token;"
        "C|S2 > N|S2: corpus/correct; C > N|S2: corpus/correct, corpus/containment_grounding",
        shown="corpus/correct,corpus/retrieval_hit,corpus/containment_grounding,bm25/correct,"
        "bm25/retrieval_hit,gold/correct,wrong/correct,none/correct,ntp_nats_per_token",
    )
