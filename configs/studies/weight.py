"""How much NSP, and is the sequence space stable without NTP?

Shows       the arm C at several nsp_weights, the share of NSP in Gen's gradient beside each;
            spread and drift of passage vectors with and without NTP, from a Gen that has read the
            passages and from a random one
Hardware    2 CPU cores, 4 GB of memory
Expected    not run yet: docs/results/README.md
Command     python -m cosup_jax.main --config=configs/studies/weight.py --workdir=runs/studies \\
                --mode=study
Variants    small: some minutes, learns nothing; an arm, such as C: that run alone, by --mode=train
"""

from cosup_jax.studies import arms

ARMS = {f"C_{weight:g}": {"loss.nsp_weight": weight} for weight in (0.1, 0.3, 3.0, 10.0)}


def get_config(variant=""):
    return arms.config(
        variant,
        ARMS,
        question="How much NSP, and is the sequence space stable without NTP?",
        arms=f"N,C,S2,N_pre,C_pre,S2_pre,{','.join(ARMS)}",
        measures="answers,training,geometry",
        claims="C > C_0.1: corpus/retrieval_hit, none/correct; C > C_10: none/correct;"
        "C > S2: drift/to_last/step_100; C_pre > S2_pre: drift/to_last/step_100",
        shown="corpus/retrieval_hit,corpus/correct,none/correct,passages/uniformity,"
        "passages/anisotropy,passages/effective_rank,alignment,gradient_ratio",
    )
