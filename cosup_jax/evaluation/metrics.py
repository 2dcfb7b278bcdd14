"""Every metric under one roof, to be called on one's own strings and records.

`normalize_answer, accuracy, exact_match, f1, rouge_l` compare texts; the others read the records
of KILT and of ALCE, whose own formats, scales and names they keep. What each computes, and where it
departs from them on purpose, stands in its docstring.
"""

from cosup_jax.evaluation.alce import (
    alce_scores,
    citation_scores,
    claim_recall,
    qampari_scores,
    rouge_lsum,
    str_em,
)
from cosup_jax.evaluation.cited import parse_cited_output
from cosup_jax.evaluation.kilt import (
    answer_in_context,
    kilt_scores,
    precision_at_k,
    r_precision,
    recall_at_k,
    success_at_k,
)
from cosup_jax.evaluation.official import official_scores
from cosup_jax.evaluation.text import (
    accuracy,
    answer_present,
    exact_match,
    exact_presence,
    f1,
    normalize_answer,
    remove_citations,
    rouge_l,
)

__all__ = [
    "accuracy",
    "alce_scores",
    "answer_in_context",
    "answer_present",
    "citation_scores",
    "claim_recall",
    "exact_match",
    "exact_presence",
    "f1",
    "kilt_scores",
    "normalize_answer",
    "official_scores",
    "parse_cited_output",
    "precision_at_k",
    "qampari_scores",
    "r_precision",
    "recall_at_k",
    "remove_citations",
    "rouge_l",
    "rouge_lsum",
    "str_em",
    "success_at_k",
]
