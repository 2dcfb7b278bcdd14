"""The objective in plain NumPy loops, written from the paper: slow, float64, no masks."""

import numpy as np


def ntp(logits, targets, weights):
    """Sum of weighted -log softmax(logits)[target], and the weight."""
    nats = 0.0
    for row, target, weight in zip(logits, targets, weights, strict=True):
        if weight:
            row = np.asarray(row, np.float64)
            nats += weight * (np.log(np.sum(np.exp(row - row.max()))) + row.max() - row[target])
    return nats, float(np.sum(weights))


def nsp(queries, live, bank=(), bank_queries=(), temperature=1.0):
    """Next-sequence prediction with identities, over live passages and a bank.

    Args:
      queries: list of (vector, [own id, sibling ids...]) of valid live queries.
      live: list of (vector, id) of valid passages, copies allowed.
      bank: list of (vector, id), newest first; may overlap live and itself.
      bank_queries: as queries, from earlier steps.

    Returns:
      mean nats per live query, gradient per live query [n, D], gradient per live passage [m, D]
      (copies after the first have none).
    """
    columns, seen = [], set()
    for source, entries in (("live", live), ("bank", bank)):
        for index, (vector, identity) in enumerate(entries):
            if identity not in seen:  # live first, then the newest copy in the bank
                seen.add(identity)
                columns.append((source, index, np.asarray(vector, np.float64), identity))
    grad_query = np.zeros((len(queries), len(queries[0][0]) if queries else 0))
    grad_live = np.zeros((len(live), len(live[0][0])))
    loss = 0.0
    rows = [("live", i, *q) for i, q in enumerate(queries)]
    rows += [("bank", i, *q) for i, q in enumerate(bank_queries)]
    for kind, i, vector, (own, *siblings) in rows:
        vector = np.asarray(vector, np.float64)
        counted = [c for c in columns if c[3] == own or c[3] not in siblings]
        if own not in {c[3] for c in counted}:
            continue
        scores = np.array([vector @ c[2] / temperature for c in counted])
        p = np.exp(scores - scores.max())
        p /= p.sum()
        for (source, j, candidate, identity), share in zip(counted, p, strict=True):
            pull = (share - (identity == own)) / temperature / len(queries)
            if identity == own:
                loss -= np.log(share) / len(queries)
            if kind == "live":
                grad_query[i] += pull * candidate
            if source == "live":
                grad_live[j] += pull * vector
    return loss, grad_query, grad_live
