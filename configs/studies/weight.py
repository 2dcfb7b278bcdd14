"""How much NSP, and is the sequence space stable without NTP?

Shows       the arm C at several nsp_weights, the share of NSP in Gen's gradient beside each, and
            T beside C at an equal share (C@T: C at T's gradient ratio); spread and drift of passage
            vectors with and without NTP, from a Gen that has read the passages and from a random
            one, and whether seeds come to one space. N_pre, NTP alone from the former, on demand
Hardware    2 CPU cores, 4 GB of memory
Expected    docs/results/weight.md
Command     python -m cosup_jax.main --config=configs/studies/weight.py --workdir=runs/studies \\
                --mode=study
Variants    small: some minutes, learns nothing; smollm2, smollm2_cpu: SmolLM2-135M on data of one's
            own (docs/results); an arm, such as C: that run alone, by --mode=train
"""

from cosup_jax.studies import arms

# At 1.7 NSP weighs about as much in C as it does in T.
ARMS = {f"C_{weight:g}": {"loss.nsp_weight": weight} for weight in (0.1, 0.3, 1.7, 3.0)}


def get_config(variant=""):
    at = arms.scale(variant)
    half = f"drift/to_last/step_{at.num_steps // 2}"
    steps = range(at.checkpoint.every_steps, at.num_steps + 1, at.checkpoint.every_steps)
    ratios = [f"gradient_ratio/step_{step}" for step in steps]
    matched = ""
    if at.log.probe_every_steps:  # the first batch's is known
        ratios.insert(0, "gradient_ratio/at_start")
        matched = "T > C@T: corpus/retrieval_hit, -ntp_nats_per_token;"
    # A Gen that starts from random weights can have read the passages before, or not.
    scratch = at.gen.init == "scratch"
    return arms.config(
        variant,
        ARMS,
        question="How much NSP, and is the sequence space stable without NTP?",
        arms=f"N,C,S,S2,T,{'C_pre,S2_pre,' if scratch else ''}{','.join(ARMS)}",
        crossed=arms.CROSSED + (",C_pre|S2_pre" if scratch else ""),
        measures="answers,majority,training,geometry,gradients",
        claims="C > C_0.1: corpus/retrieval_hit; C > C_3: -ntp_nats_per_token;"
        f"{matched} C > S2: {half}; T > S: {half}"
        + (f"; C_pre > S2_pre: {half}" if scratch else ""),
        shown="corpus/retrieval_hit,corpus/correct,gold/correct,ntp_nats_per_token,"
        f"{','.join(ratios)},passages/uniformity,passages/anisotropy,passages/effective_rank,alignment",
    )
