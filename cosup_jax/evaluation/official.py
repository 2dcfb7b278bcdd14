"""The scores of the paper's released code, as its eval_metric.py has them.

Items are its own: `{"question", "answers", "output", "raw_output", "docs": [{"id", "title",
"text"}], "gold_docs"}`. Scores are in 0..100.

Its correctness is the share of texts with an answer in them, whatever else they say; a retrieval
succeeds if any passage is right; its grounding reads cited spans alone. They are reported here as
`acc_substring`, `retrieval_hit` and `grounding`, so that none is taken for KILT's or ALCE's score.
`peer_compat` gives its own keys with its ways instead; without, it is departed from in these:
`[k]` is the k-th passage shown, where it takes the k-th of `docs`, which are in another order; a
text without a span counts 0 in `grounding`, where it leaves the item out; `[0]` cites nothing.

Left out: what is dead in it (`answer_generous`, always -1), what is there twice (`raw.unigram_f1`,
`raw.rougel` and `raw.ans_nli` read the same text as the plain ones), `ctx_truncate`, which is
broken, the QA model, and what it does by words in the path of its file.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from cosup_jax.evaluation import alce, text
from cosup_jax.evaluation import nli as nli_lib
from cosup_jax.evaluation.cited import groundings
from cosup_jax.evaluation.nli import Judge
from cosup_jax.evaluation.support import BY_ANSWER, Support, supports

Item = Mapping[str, Any]
JUNK = ("<|im_end|>", "<PAD>", "</s>", "[RELEVANT]")
ALCE = ("alce_asqa", "alce_eli5", "alce_qampari")
MULTIHOP = ("alce_musique", "alce_hotpotqa", "alce_strategyqa")


def official_scores(
    items: Sequence[Item],
    data_name: str,
    nli: Judge | None = None,
    *,
    at_most_citations: int | None = 3,
    peer_compat: bool = False,
) -> dict[str, float]:
    """The official numbers; those that need a judge only where one is given.

    Args:
        data_name: the official --data_name, such as kilt_nq; an alce_ one only with `peer_compat`.

    Returns:
        acc_substring over all n items, and `_retrieved` over the n_retrieved whose retrieval
        succeeded, `_missed` over the n_missed others, `_gated` over all, 0 where retrieval failed;
        retrieval_precision over all, retrieval_hit over the n_judged that have answers or gold
        passages; grounding and grounding_gated over all, grounding_answered over the n_grounded
        with a span. With `peer_compat`, the official keys.
    """
    if peer_compat:
        return _as_released(items, data_name, nli, at_most_citations)
    support = supports(items, data_name)
    success = [each.precision > 0 for each in support]
    right = [text.exact_presence(item["answers"], answer_text(item)) for item in items]
    judged = [each.hit for each in support if each.hit is not None]
    scores = {
        "acc_substring": _percent(right),
        "acc_substring_retrieved": _percent(_only(right, success, True)),
        "acc_substring_missed": _percent(_only(right, success, False)),
        "acc_substring_gated": _percent(_gated(right, success)),
        "retrieval_precision": _percent([each.precision for each in support]),
        "retrieval_hit": _percent(judged),
        "n": len(items),
        "n_retrieved": sum(success),
        "n_missed": len(items) - sum(success),
        "n_judged": len(judged),
    }
    if nli is not None:
        found = groundings(items, nli, at_most_citations=at_most_citations)
        every = [share or 0.0 for share in found]
        answered = [share for share in found if share is not None]
        grounding = {
            "grounding": _percent(every),
            "grounding_gated": _percent(_gated(every, success)),
            "grounding_answered": _percent(answered),
        }
        scores |= nli_lib.labelled(nli, grounding) | {"n_grounded": len(answered)}
    return scores


def answer_text(item: Item, field: str = "output") -> str:
    """What the official code scores of an output for everything but grounding."""
    return text.remove_citations(_cleaned(item[field]))


def _as_released(
    items: Sequence[Item], data_name: str, nli: Judge | None, at_most_citations: int | None
) -> dict[str, float]:
    """Under the official keys. Where retrieval is not judged, it counts as a success."""
    success = [True] * len(items)
    scores = {"length": text.mean([len(answer_text(item).split()) for item in items])}
    if data_name in ALCE + MULTIHOP:
        scores |= _of_alce(items, data_name, nli)
    else:
        support = supports(items, data_name)
        success = [each.precision > 0 for each in support]
        scores |= _retrieval(support, data_name)
        scores |= _answers(items, [answer_text(i) for i in items], data_name, success)
        if items and "raw_output" in items[0]:  # an answer in a retrieved passage counts here
            raw = _answers(items, [item["raw_output"] for item in items], data_name, success)
            scores |= {f"raw.{name}": value for name, value in raw.items()}
        scores |= _of_task(items, data_name, success, nli)
    if nli is not None:
        cleaned = [{**item, "output": _cleaned(item["output"])} for item in items]
        found = groundings(
            cleaned,
            nli,
            at_most_citations=at_most_citations,
            qampari=data_name == "alce_qampari",
            peer_compat=True,
        )
        kept = [(share, s) for share, s in zip(found, success, strict=True) if share is not None]
        grounding = {
            "rev.citation_rec": _percent([share for share, _ in kept]),
            "ret.rev.citation_rec": _percent([share * s for share, s in kept]),
            "wrong.rev.citation_rec": _percent([share * (not s) for share, s in kept]),
        }
        scores |= nli_lib.labelled(nli, grounding)
    return scores


def _retrieval(support: Sequence[Support], data_name: str) -> dict[str, float]:
    if data_name in BY_ANSWER:
        names = {"rev.support_em": "hit", "rev.support_prec": "precision"}
    else:
        fields = {"f1": "f1", "em": "exact", "exist": "hit", "recall": "recall"}
        names = {f"support_{name}": field for name, field in fields.items()}
        names["support_prec"] = "precision"
    columns = {name: [getattr(each, field) for each in support] for name, field in names.items()}
    return {n: _percent([v for v in values if v is not None]) for n, values in columns.items()}


def _answers(
    items: Sequence[Item], texts: Sequence[str], data_name: str, success: Sequence[bool]
) -> dict[str, float]:
    right = [text.exact_presence(i["answers"], t) for i, t in zip(items, texts, strict=True)]
    gated = _percent(_gated(right, success))
    scores = {"answer_em": _percent(right), "remove_ret_wrong_ans_right_em": gated}
    if data_name in BY_ANSWER:
        scores["remove_ret_wrong_ans_right"] = gated
        scores["ret_success.answer_em"] = _percent(_only(right, success, True))
        scores["ret_fail.answer_em"] = _percent(_only(right, success, False))
    return scores


def _of_task(
    items: Sequence[Item], data_name: str, success: Sequence[bool], nli: Judge | None
) -> dict[str, float]:
    """What some tasks have beside answer_em, plain and where retrieval succeeded."""
    texts = [answer_text(item) for item in items]
    extra: list[float] = []
    if data_name == "kilt_eli5":  # a blank after the last full stop is a word of the text
        name = "rougel"
        values = [
            max(text.rouge_l_of(each, answer) for answer in item["answers"])
            for each, item in zip(texts, items, strict=True)
        ]
    elif data_name == "kilt_wow":
        name = "unigram_f1"
        pairs = [(each, _the_answer(item)) for each, item in zip(texts, items, strict=True)]
        values = [text.f1_of(*pair) for pair in pairs]
        tokens = [[text.normalize_answer(side) for side in pair] for pair in pairs]
        extra = [float(a == b) for a, b in tokens if not a or not b]  # such an item counts twice
    elif data_name == "kilt_fever" and nli is not None:
        name = "ans_nli"
        pairs = [(each, item["question"]) for each, item in zip(texts, items, strict=True)]
        verdicts, label = nli_lib.entailed(nli, pairs), {"SUPPORTS": True, "REFUTES": False}
        values = [
            verdicts[pair] is label[_the_answer(item)]
            for pair, item in zip(pairs, items, strict=True)
        ]
    else:
        return {}
    gated = _percent(_gated(values, success))
    scores = {name: _percent(values + extra), f"remove_ret_wrong_{name}": gated}
    return nli_lib.labelled(nli, scores) if name == "ans_nli" else scores


def _of_alce(items: Sequence[Item], data_name: str, nli: Judge | None) -> dict[str, float]:
    texts = [answer_text(item) for item in items]
    if data_name == "alce_musique":  # rounded to three places
        answers = [[item["answer"], *item["answer_alias"]] for item in items]
        pairs = list(zip(texts, answers, strict=True))
        exact = [any(_same(t, a) for a in each) for t, each in pairs]
        overlap = [max(_alce_f1(t, a) for a in each) for t, each in pairs]
        return {"answer_f1": round(_percent(overlap), 3), "answer_em": round(_percent(exact), 3)}
    if data_name in MULTIHOP:
        answers = [str(item["answer"]) for item in items]
        right = [text.exact_presence([a], t) for a, t in zip(answers, texts, strict=True)]
        spoken = [answer not in ("yes", "no", "true", "false") for answer in answers]
        wo_bool = _percent(_only(right, spoken, True))
        return {"answer_em": _percent(right), "answer_em_wo_bool": wo_bool}
    plain = [{**item, "output": each} for item, each in zip(items, texts, strict=True)]
    scores = alce.str_em(plain)
    if data_name == "alce_qampari":
        scores |= alce.qampari_scores(plain)
    if data_name == "alce_eli5" and nli is not None:
        scores |= alce.claim_recall(plain, nli)
    return scores


def _cleaned(output: str) -> str:
    output = output.replace("\n", " ")
    for junk in JUNK:
        output = output.replace(junk, "")
    return output


def _the_answer(item: Item) -> str:
    answers = set(item["answers"])
    if len(answers) != 1:
        raise ValueError(f"this task has exactly one answer, not {len(answers)}: {item}")
    return answers.pop()


def _same(a: str, b: str) -> bool:
    return text.normalize_answer(a) == text.normalize_answer(b)


def _alce_f1(prediction: str, answer: str) -> float:
    """ALCE's compute_f1, in which two texts without tokens agree."""
    if not text.normalize_answer(prediction) and not text.normalize_answer(answer):
        return 1.0
    return text.f1_of(prediction, answer)


def _only(values: Sequence[float], chosen: Sequence[bool], side: bool) -> list[float]:
    return [value for value, which in zip(values, chosen, strict=True) if which is side]


def _gated(values: Sequence[float], success: Sequence[bool]) -> list[float]:
    return [value if right else 0.0 for value, right in zip(values, success, strict=True)]


def _percent(values: Sequence[float]) -> float:
    return 100 * text.mean(values)
