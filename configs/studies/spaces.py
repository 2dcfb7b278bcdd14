"""Do the token space and the sequence space meet?

Shows       how near the states at [Ret], the passage vectors and the rows of the vocabulary come to
            each other in every arm, at the end of training and on the way, beside shuffled
            baselines; how they lie on a plane is drawn in index.html
Hardware    2 CPU cores, 4 GB of memory
Expected    docs/results/spaces.md
Command     python -m cosup_jax.main --config=configs/studies/spaces.py --workdir=runs/studies \\
                --mode=study
Variants    small: some minutes, learns nothing; smollm2, smollm2_cpu: SmolLM2-135M on data of one's
            own (docs/results); an arm, such as C: that run alone, by --mode=train
"""

from cosup_jax.studies import arms


def get_config(variant=""):
    at = arms.scale(variant)
    last = at.num_steps
    kept = range(at.checkpoint.every_steps, last, at.checkpoint.every_steps)
    shares = ("title_in_vector", "title_at_ret", "mutual_knn10", "mutual_nearest")
    beyond_chance = ", ".join(f"{share} - {share}_shuffled" for share in shares[:3])
    on_the_way = [f"{share}/step_{step}" for share in shares for step in kept]
    parts = ("gen", "layer_0", "layer_1")
    cosines = [f"gradient_cosine/{part}/step_{step}" for part in parts for step in (*kept, last)]
    return arms.config(
        variant,
        question="Do the token space and the sequence space meet?",
        arms="N,S,S2,C,T",
        crossed=arms.CROSSED,
        measures="answers,majority,spaces,spaces_over_training,plane,gradients",
        claims=f"C > S2: {beyond_chance}, mutual_nearest; T > C: {beyond_chance}",
        shown="title_in_vector,title_in_vector_shuffled,title_at_ret,title_at_ret_shuffled,"
        "mutual_knn10,mutual_knn10_shuffled,mutual_nearest,mutual_nearest_most,"
        "nearest_is_passage,nearest_is_passage_centred,"
        "passages_in_top10,passages_in_top10_centred,passages_in_index,"
        "title_in_vector_centred,title_in_vector_centred_shuffled,"
        "title_at_ret_centred,title_at_ret_centred_shuffled,"
        "mutual_knn10_centred,mutual_knn10_centred_shuffled,mutual_nearest_centred,"
        + ",".join([*cosines, *on_the_way]),
    )
