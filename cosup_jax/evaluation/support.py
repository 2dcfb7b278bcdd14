"""Did an item's retrieval succeed? As the official code's eval_metric.py judges it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cosup_jax.evaluation import text

Item = Mapping[str, Any]
BY_ANSWER = ("kilt_nq", "kilt_triviaqa", "kilt_zsre", "kilt_trex")  # a passage with the answer
BY_GOLD = ("kilt_hotpotqa", "kilt_fever", "kilt_wow", "kilt_eli5")  # a passage of gold_docs


class Support(NamedTuple):
    """One item's retrieved passages, in 0..1; None where there is nothing to compare with."""

    precision: float  # share of the distinct retrieved passages that are right
    hit: float | None  # 1 if one of them is
    recall: float | None = None  # of the gold passages, as are the next two
    f1: float | None = None
    exact: float | None = None  # 1 if the retrieved ones are the gold ones


def supports(items: Sequence[Item], data_name: str) -> list[Support]:
    """Of each item, as the data set wants it: by answers or by gold passages."""
    if data_name not in BY_ANSWER + BY_GOLD:
        names = ", ".join(BY_ANSWER + BY_GOLD)
        raise ValueError(f"retrieval is not judged for {data_name!r}, only for {names}")
    return list(map(support_by_answer if data_name in BY_ANSWER else support_by_gold, items))


def support_by_answer(item: Item) -> Support:
    """A passage is right if one of `answers` is in its `title :: text`, byte for byte."""
    answers = text.listed(item["answers"])
    if not answers:
        return Support(0.0, None)
    passages: dict[Any, str] = {}
    for doc in item.get("docs", ()):
        passages.setdefault(doc["id"], f"{doc['title']} :: {doc['text']}")
    right = [any(answer in passage for answer in answers) for passage in passages.values()]
    return Support(text.mean(right) if right else 0.0, float(any(right)))


def support_by_gold(item: Item) -> Support:
    """A passage is right if it is one of `gold_docs`: ids, or documents with ids.

    An id that stands twice among ids counts twice in recall.
    """
    found, gold = {doc["id"] for doc in item.get("docs", ())}, list(item["gold_docs"])
    if not gold:
        return Support(0.0, None, 0.0)
    if isinstance(gold[0], Mapping):
        gold = list({doc["id"] for doc in gold})
    right = found & set(gold)
    precision = len(right) / len(found) if found else 0.0
    recall = sum(name in found for name in gold) / len(gold)
    f1 = text.harmonic(precision, recall)
    return Support(precision, float(bool(right)), recall, f1, float(found == set(gold)))
