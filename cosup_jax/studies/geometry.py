"""How queries and passages lie on the sphere, and how far training still moves them."""

import itertools
from collections.abc import Sequence

import numpy as np

from cosup_jax.studies import run as run_lib
from cosup_jax.studies.run import (
    COSINE,
    NUMBER,
    POSITIVE,
    Gives,
    Metrics,
    Run,
    Scores,
    by_item,
    whole,
)

PAIRS = "passages/pair_cosine"
GIVES: Gives = {
    r"alignment": POSITIVE,
    r"(queries|passages)/uniformity": NUMBER,
    r"(queries|passages)/anisotropy": COSINE,
    r"(queries|passages)/effective_rank(_centred)?": POSITIVE,
    PAIRS: COSINE,
    r"drift/to_(next|last)(_rotated|_shuffled)?/step_\d+": COSINE,
}
_SEED = 1  # of the shuffled baseline
_PARTNERS = 4  # of each passage, in `pair_cosines`


def geometry(run: Run) -> Scores:
    """Spread and drift of 500 fixed passages; spread and alignment of each set's queries.

    Of each question `alignment`. Of a set `queries/NAME`, of no set `passages/NAME`, for each NAME
    of `spread`. Of each passage the metrics of `drift`; of pairs of them `pair_cosines`.
    """
    sample = run_lib.sample(run)
    past = {
        at.trained.step: unit(run_lib.vectors(at, sample.tokens))
        for at in run_lib.over_training(run)
    }
    passages = {f"passages/{name}": v for name, v in spread(past[run.trained.step]).items()}
    pairs = {PAIRS: pair_cosines(past[run.trained.step], sample.ids)}
    found: Scores = {"": whole(**passages) | drift(past, sample.ids) | pairs}
    for part in run.sets:
        asked = run_lib.asked(run, part)
        if len(asked.ids) > 1:
            query_QxD = unit(asked.query_QxD)
            rows, own_Q = np.unique(asked.passage_Q, return_inverse=True)
            gold_RxD = unit(run_lib.vectors(run, [part.store.ctx[row] for row in rows.tolist()]))
            queries = {f"queries/{name}": v for name, v in spread(query_QxD).items()}
            distance_Q = np.sum((query_QxD - gold_RxD[own_Q]) ** 2, axis=1)
            found[part.name] = whole(**queries) | {"alignment": by_item(asked.ids, distance_Q)}
    return found


def spread(unit_NxD: np.ndarray) -> dict[str, float]:
    """Of vectors of length 1, at least two.

    uniformity              log mean exp(-2 d^2) over distinct pairs, d their distance: from 0, all
                            in one point, down towards -4 (arXiv 2005.10242)
    anisotropy              mean cosine of distinct pairs: 1 in one point, 0 in all directions
    effective_rank          exp of the entropy of the singular values, each as a share of their sum:
                            from 1 to D (Roy & Vetterli 2007)
    effective_rank_centred  the same about the mean
    """
    N = len(unit_NxD)
    cosine_P = (unit_NxD @ unit_NxD.T)[np.triu_indices(N, 1)]
    return {
        "uniformity": float(np.log(np.mean(np.exp(-4 * (1 - cosine_P))))),
        "anisotropy": float(np.mean(cosine_P)),
        "effective_rank": effective_rank(unit_NxD),
        "effective_rank_centred": effective_rank(unit_NxD - unit_NxD.mean(axis=0)),
    }


def pair_cosines(unit_NxD: np.ndarray, ids: Sequence[str]) -> dict[str, float]:
    """{"ID ID": cosine} of each passage and the few that follow it, the same pairs for every run:
    where runs of several seeds agree on them, they have come to one arrangement, however it is
    turned (representational similarity, Kriegeskorte et al. 2008)."""
    N, found = len(ids), {}
    for i, after in itertools.product(range(N), range(1, min(_PARTNERS, N - 1) + 1)):
        j = (i + after) % N
        found[f"{ids[i]} {ids[j]}"] = float(unit_NxD[i] @ unit_NxD[j])
    return found


def effective_rank(vector_NxD: np.ndarray) -> float:
    """As in `spread`; 1 of vectors that are all zero."""
    singular = np.linalg.svd(vector_NxD, compute_uv=False)
    share = singular[singular > 0] / max(singular.sum(), 1e-30)
    return float(np.exp(-np.sum(share * np.log(share))))


def drift(past: dict[int, np.ndarray], ids: list[str]) -> Metrics:
    """Cosine of each passage's vector at a checkpoint with its own at a later one.

    Of each step but the last `drift/TO/step_N`, TO one of

    to_last, to_next  the last checkpoint, the one that follows
    ..._rotated       after the rotation (or reflection) of all vectors that brings them nearest:
                      what is left is a change of the space, not of its axes (Procrustes)
    ..._shuffled      after the rotation nearest to other passages' vectors: what it wins without
                      anything to find, which is much where there are not many more vectors than D

    Args:
      past: step -> unit vectors [N, D], by rising step.
      ids: of the N passages.
    """
    found, order = {}, np.random.default_rng(_SEED).permutation(len(ids))
    pairs = [("next", pair) for pair in itertools.pairwise(past)]
    pairs += [("last", (step, max(past))) for step in past if step < max(past)]
    for to, (step, later) in pairs:
        a_NxD, b_NxD = past[step], past[later]
        cosines = {
            f"to_{to}": (a_NxD, b_NxD),
            f"to_{to}_rotated": (a_NxD @ rotation(a_NxD, b_NxD), b_NxD),
            f"to_{to}_shuffled": (a_NxD @ rotation(a_NxD, b_NxD[order]), b_NxD[order]),
        }
        for name, (x_NxD, y_NxD) in cosines.items():
            values = np.sum(x_NxD * y_NxD, axis=1).tolist()
            found[f"drift/{name}/step_{step}"] = dict(zip(ids, values, strict=True))
    return found


def rotation(a_NxD: np.ndarray, b_NxD: np.ndarray) -> np.ndarray:
    """The orthogonal [D, D] that brings a nearest to b: argmin |a R - b| (Schoenemann 1966)."""
    u_DxD, _, v_DxD = np.linalg.svd(a_NxD.T @ b_NxD)
    return u_DxD @ v_DxD


def unit(vector_NxD: np.ndarray) -> np.ndarray:
    """float64 vectors of length 1; zeros stay zeros."""
    vector_NxD = np.asarray(vector_NxD, np.float64)
    return vector_NxD / np.maximum(np.linalg.norm(vector_NxD, axis=1, keepdims=True), 1e-12)
