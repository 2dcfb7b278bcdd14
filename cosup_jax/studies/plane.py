"""The token space and the sequence space as a picture: vectors of both on one plane."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cosup_jax.studies import run as run_lib
from cosup_jax.studies import spaces
from cosup_jax.studies.geometry import unit
from cosup_jax.studies.run import NUMBER, SHARE, Gives, Run, Scores, drawn, whole

GIVES: Gives = {
    r"plane/(passages|vocabulary|queries)/[xy]": NUMBER,
    r"plane/share": SHARE,
}
MOST = 300  # points of a kind


class Cloud(NamedTuple):
    """Vectors of one kind."""

    held_out: str  # "" is of no set
    kind: str
    ids: list[str]  # distinct
    vector_NxD: np.ndarray


def plane(run: Run) -> Scores:
    """`plane/KIND/x` and `plane/KIND/y` of each vector drawn, at length 1 and on the plane of
    `projected`: of up to 300 passages, 300 text tokens of the vocabulary (columns of Gen's
    unembedding), and of each set the queries (states at [Ret]) of 300 questions, its first each.

    Of the whole run `plane/share`. Vectors are drawn alike for every run over the same data.
    """
    sample, vocabulary = run_lib.sample(run, MOST), spaces.vocabulary_of(run)
    tokens = [str(token) for token in vocabulary.ids_V.tolist()]
    clouds = [
        _cloud("", "passages", sample.ids, run_lib.vectors(run, sample.tokens)),
        _cloud("", "vocabulary", tokens, vocabulary.out_VxD),
    ]
    for part in run.sets:
        asked = run_lib.asked(run, part)
        if asked.ids:
            clouds.append(_cloud(part.name, "queries", asked.ids, asked.query_QxD))
    places_Nx2, share = projected(np.concatenate([unit(cloud.vector_NxD) for cloud in clouds]))
    found: Scores = {"": whole(**{"plane/share": share})}
    ends = np.cumsum([len(cloud.ids) for cloud in clouds])[:-1]
    for cloud, own_Nx2 in zip(clouds, np.split(places_Nx2, ends), strict=True):
        for axis, values in zip("xy", own_Nx2.T.tolist(), strict=True):
            of_set = found.setdefault(cloud.held_out, {})
            of_set[f"plane/{cloud.kind}/{axis}"] = dict(zip(cloud.ids, values, strict=True))
    return found


def projected(vector_NxD: np.ndarray) -> tuple[np.ndarray, float]:
    """[N, 2] places on the first two principal components, about the mean of all, and the share of
    the variance that they hold.

    The largest loading of a component is positive: its sign is arbitrary, and a picture would turn
    over from one machine to another.
    """
    centred_NxD = vector_NxD - vector_NxD.mean(axis=0)
    _, singular, axes_KxD = np.linalg.svd(centred_NxD, full_matrices=False)
    axes_2xD = axes_KxD[:2]
    largest_2 = np.abs(axes_2xD).argmax(axis=1)
    axes_2xD = axes_2xD * np.sign(axes_2xD[np.arange(2), largest_2])[:, None]
    variance = singular**2
    return centred_NxD @ axes_2xD.T, float(variance[:2].sum() / max(variance.sum(), 1e-30))


def _cloud(held_out: str, kind: str, ids: Sequence[str], vector_NxD: np.ndarray) -> Cloud:
    """Up to MOST of them; of an id that comes several times the first, as two have no one place."""
    first = np.sort(np.unique(ids, return_index=True)[1])
    rows = first[drawn(len(first), MOST)]
    return Cloud(held_out, kind, [ids[row] for row in rows], vector_NxD[rows])
