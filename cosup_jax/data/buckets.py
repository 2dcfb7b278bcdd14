"""A few static row lengths, chosen from the data so that padding is least."""

import numpy as np

GRAIN = 16  # row lengths are multiples of it, the longest one aside


def row_lengths(lengths: np.ndarray, longest: int, count: int) -> np.ndarray:
    """int32, ascending, at most `count`: rows of these lengths hold all items, one a row.

    Their sum over all items, each in the shortest row that holds it, is the least there is.

    Args:
      lengths: tokens of each item, none over `longest`.
      longest: the last row length.
    """
    if count == 1 or not len(lengths):
        return np.array([longest], np.int32)
    edges = np.append(np.arange(GRAIN, longest, GRAIN), longest)
    held = np.searchsorted(np.sort(lengths), edges, "right")  # items up to each edge
    best, chosen = held * edges, [[i] for i in range(len(edges))]  # of rows up to edge i
    for _ in range(count - 1):
        # With one more length below edge i, edge j, what exceeds j alone takes rows of edge i.
        cost = best[None, :] + (held[:, None] - held[None, :]) * edges[:, None]
        cost[np.triu_indices(len(edges))] = np.iinfo(np.int64).max
        lower = np.argmin(cost, axis=1)
        least = cost[np.arange(len(edges)), lower]
        chosen = [[*chosen[j], i] if least[i] < best[i] else chosen[i] for i, j in enumerate(lower)]
        best = np.minimum(best, least)
    return edges[chosen[-1]].astype(np.int32)
