"""Retrieval metrics from ranks, counted from 1."""

import numpy as np


def recall_at_k(ranks: np.ndarray, k: int) -> float:
    """Share of queries whose passage is among the first k; one gold passage a query."""
    return float(np.mean(np.asarray(ranks) <= k))


def mrr_at_k(ranks: np.ndarray, k: int) -> float:
    """Mean reciprocal rank, 0 where the passage is not among the first k."""
    ranks = np.asarray(ranks, np.float64)
    return float(np.mean(np.where(ranks <= k, 1.0 / ranks, 0.0)))


def summary(ranks: np.ndarray) -> dict[str, float]:
    """The three numbers that every evaluation reports."""
    return {
        "recall_at_1": recall_at_k(ranks, 1),
        "recall_at_10": recall_at_k(ranks, 10),
        "mrr_at_10": mrr_at_k(ranks, 10),
    }
