"""What studies compare: arms, each a variant of every study's config file."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from cosup_jax.config import make
from cosup_jax.studies.scales import SCALES, WORLD

# Before a variant: what its run has made. As a tower's init, the Gen that it exports; as data, its
# sources with the hard negatives that its towers find.
START, MINED = "start:", "mined:"
PRETRAINED = {  # Gen has read the passages before, Ctx starts from its weights
    "gen.init": f"{START}stage0",
    "optim.gen_learning_rate": 1e-3,
    "optim.ctx_learning_rate": 1e-3,
}
ARMS = {
    "N": {"loss.nsp_weight": 0.0},  # NTP alone
    "S": {"loss.ntp_weight": 0.0, "tie_ctx_to_gen": True},  # NSP alone, one tower in both roles
    "S2": {"loss.ntp_weight": 0.0},  # NSP alone, two towers
    "C": {},  # both, two towers that start from the same weights
    "T": {"tie_ctx_to_gen": True},  # both, in one tower
    "stage0": {  # NTP on the passages alone
        "data.train": "corpus:tfds:world",
        "loss.nsp_weight": 0.0,
        "gen.arch.tie_embeddings": False,
        "optim.gen_learning_rate": 1e-3,
    },
    "N_pre": PRETRAINED | {"loss.nsp_weight": 0.0},
    "S2_pre": PRETRAINED | {"loss.ntp_weight": 0.0},
    "C_pre": PRETRAINED,
}
# Whose Gen writes, and whose pair retrieves for it. Kept beside the runs: a study that names the
# same pairs as one before it answers nothing anew.
CROSSED = "C|S,C|S2,C|T,N|C,N|S,N|S2,N|T"


def scale(variant: str) -> ml_collections.ConfigDict:
    """The config of a variant's scale, which its arms then vary."""
    return make(WORLD, SCALES, "+".join(name for name in variant.split("+") if name in SCALES))


def config(
    variant: str, own: Mapping[str, Mapping[str, Any]] | None = None, /, **study: Any
) -> ml_collections.ConfigDict:
    """A study's config, or that of one of its arms, at WORLD's or another scale.

    Args:
      variant: "", a scale, an arm, or "scale+arm".
      own: arms that only this study has.
      study: the keys of config.study.
    """
    base = WORLD | {f"study.{name}": value for name, value in study.items()}
    return make(base, SCALES | ARMS | dict(own or {}), variant)
