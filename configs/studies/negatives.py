"""Which negatives?

Shows       the batch halved and doubled at the same number of examples; past passages and past
            queries as negatives; four hard ones an example, which the arm C finds; negatives that
            score above the passage masked as likely false; identities ignored, so that a passage
            that two ask for is a negative of both. Not by default, as they share nothing with C but
            the data: C_detached and C_full, the released code's objective with and without a
            gradient through other ranks' passages, from the tower that T has learned
Hardware    2 CPU cores, 4 GB of memory
Expected    docs/results/negatives.md
Command     python -m cosup_jax.main --config=configs/studies/negatives.py --workdir=runs/studies \\
                --mode=study
Variants    small: some minutes, learns nothing; smollm2, smollm2_cpu: SmolLM2-135M on data of one's
            own (docs/results); an arm, such as C: that run alone, by --mode=train
"""

import ml_collections

from cosup_jax.studies import arms

WORSE = ("C_half", "C_unmasked")  # finds less than C, the study claims; all others find more


def own_arms(at: ml_collections.ConfigDict):
    """The arms at a scale."""
    resized = lambda of, to: {
        "batch_size": at.batch_size * to // of,
        "data.ctx_rows": at.data.ctx_rows * to // of,
        "num_steps": at.num_steps * of // to,
        "checkpoint.every_steps": at.checkpoint.every_steps * of // to,
    }
    late = {"bank.start_step": at.num_steps * 7 // 10}  # when vectors no longer move much
    mined = dict.fromkeys(("data.train", "data.eval"), f"{arms.MINED}C")
    room = {"data.ctx_rows": 3 * at.data.ctx_rows}  # for two thirds of the examples, on `world`
    own = {
        "C_half": resized(2, 1),
        "C_double": resized(1, 2),
        "C_passage_bank": {"bank.kind": "passage", **late},
        "C_dual_bank": {"bank.kind": "dual", **late},
        "C_margin": {"loss.margin_mask": True},
        "C_unmasked": {"loss.identity_mask": False},
    }
    # Data that the command line gives is that of every arm.
    return own | ({"C_hard": mined | room} if at.data.train else {})


def released(at: ml_collections.ConfigDict):
    """compat=official at a scale: over 8 ranks gradients stop at other ranks' passages, over one
    there are none; beside that, ranks are averaged over one by one, and padded one by one.

    On `world` from T's tower, in both roles: from random weights its NSP does not begin."""
    room = {"data.max_gen_tokens": 216}  # the longest example of `world` has 213
    start = {"gen.init": f"{arms.START}T"}
    official = {
        "compat": "official",
        "batch_size": 2 * at.batch_size,  # rows of one example
        "data.ret_slots": 2,
        "loss.temperature": 1.0,
        "loss.mask_evidence": False,
        **(room | start if at.data.train else {}),
    }
    return {
        "C_detached": official | {"loss.compat_ranks": 8},
        "C_full": official | {"loss.compat_ranks": 1},
    }


def get_config(variant=""):
    at = arms.scale(variant)
    own = own_arms(at)
    return arms.config(
        variant,
        own | released(at),
        question="Which negatives?",
        arms=f"C,{','.join(own)}",
        crossed=",".join(f"C|{name}" for name in own),
        claims="; ".join(
            (f"C > {name}" if name in WORSE else f"{name} > C") + ": corpus/retrieval_hit"
            for name in own
        ),
        shown="corpus/correct,corpus/retrieval_hit,corpus/recall@5,gold/correct,none/correct",
    )
