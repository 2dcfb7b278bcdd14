"""Should the annotated evidence be a target of NTP, or be masked?

Shows       whether Gen that is trained to write the passage too knows its answers without it, on up
            to a thousand held-out questions a set, most about passages that training reads, and
            follows it less where it contradicts what Gen has learned
Hardware    2 CPU cores, 4 GB of memory
Expected    docs/results/evidence.md
Command     python -m cosup_jax.main --config=configs/studies/evidence.py --workdir=runs/studies \\
                --mode=study
Variants    small: some minutes, learns nothing; smollm2, smollm2_cpu: SmolLM2-135M on data of one's
            own (docs/results); an arm, such as C: that run alone, by --mode=train
"""

from cosup_jax.studies import arms

ARMS = {
    "C_target": {"loss.mask_evidence": False},
    "N_target": {"loss.mask_evidence": False, "loss.nsp_weight": 0.0},
}


def get_config(variant=""):
    return arms.config(
        variant,
        ARMS,
        question="Should the annotated evidence be a target of NTP, or be masked?",
        arms="C,C_target,N,N_target",
        crossed="C_target|C,N|C,N_target|C",
        measures="answers,majority,evidence,closed_book",
        claims="C > C_target: swapped/swap_wins - original/swap_wins, gold/correct,"
        "gold/correct - wrong/correct, corpus/retrieval_hit;"
        "N > N_target: gold/correct;"
        "C_target > C: none/correct, -closed_book/answer_nats_seen;"
        "N_target > N: none/correct, -closed_book/answer_nats_seen",
        shown="corpus/correct,corpus/retrieval_hit,gold/correct,wrong/correct,none/correct,"
        "swapped/swap_wins,original/swap_wins,answer_nats_with_evidence,answer_nats_without_evidence,"
        "closed_book/answer_nats,closed_book/answer_nats_seen,closed_book/answer_nats_unseen",
    )
