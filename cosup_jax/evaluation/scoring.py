"""Each answer's scores, by KILT's, ALCE's and the official code's rules, under their names.

All are in 0..1, where ALCE and the official code give percent. A score is absent where the question
has no ground for it: no answer, no evidence, no groups of answers. Records are those of
`answering.Answering` with what `asked.about` knows of the question.

A long answer is scored whole, spans included and citations not, as ALCE and the official code score
all answers; of a short one KILT's scores read `answer`, what stands behind the last span.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from cosup_jax.evaluation import alce, kilt, nli, support, text
from cosup_jax.evaluation.cited import groundings, rendered
from cosup_jax.evaluation.nli import Judge

Record = Mapping[str, Any]
Passages = Mapping[str, Any]  # data.schema.Passage by id
Scores = dict[str, float]
KS = (1, 5, 10)
_EXACT = {"label", "choice"}  # kinds of answers that are right letter for letter, or not
_NUMBER = re.compile(r"[ \[]*\[\d+\]?")  # where ALCE's rules see a citation
_LEFT_OUT = ("entity", "answer_and_ent")  # of KILT's: our evidence has no titles to find


def is_long(example: Any) -> bool:
    """Whether the answer to such a question (data.schema.Example) is a text of several parts."""
    text = example.long_answer or example.output or example.task == "long_form"
    return bool(text) and example.kind not in _EXACT


def judged_by(examples: Sequence[Any]) -> str:
    """The score that says whether an answer to such questions (data.schema.Example) is correct.

    Groups of answers ask for str_em, long answers (not an output beside a short one) for rougel,
    labels and choices for accuracy, free text for f1, a string of the evidence for acc_substring,
    and a mixture of kinds for em.
    """
    most = lambda holds: sum(map(bool, map(holds, examples))) > len(examples) / 2
    alone = lambda e: e.task == "long_form" or e.long_answer or not e.answers
    kinds = {example.kind for example in examples}
    if most(lambda example: example.answer_groups):
        return "str_em"
    if most(lambda example: is_long(example) and alone(example)):
        return "rougel"
    if kinds <= _EXACT:
        return "accuracy"
    if kinds == {"text"}:
        return "f1"
    return "em" if kinds & {*_EXACT, "text"} else "acc_substring"


def answer_scores(record: Record) -> Scores:
    """Is it right? KILT's accuracy, em, f1 and rougel of the short answer or of all of a long one,
    ALCE's str_em and rougeLsum and the official acc_substring of the whole text."""
    scores: Scores = {}
    said = record["text"] if record["long"] else record["answer"]
    if answers := gold_answers(record):
        scores |= {name: score(said, answers) for name, score in kilt.DOWNSTREAM.items()}
        scores["acc_substring"] = float(text.answer_present(record["text"], answers))
    if record["long_answer"]:
        scores["rougel"] = text.rouge_l(said, [record["long_answer"]])
        item = {"output": _one_line(record["output"]), "answer": record["long_answer"]}
        scores["rougeLsum"] = alce.rouge_lsum_of(item)
    if record["answer_groups"]:
        pairs = [{"short_answers": group} for group in record["answer_groups"]]
        item = {"output": _one_line(record["output"]), "qa_pairs": pairs}
        scores["str_em"] = alce.str_em_of(item)
    return scores


def retrieval_scores(record: Record, passages: Passages) -> Scores:
    """Were the right passages found? KILT's Rprec, recall@k, ... of the ranking, and the official
    retrieval_hit and retrieval_precision of what was shown.

    Where a question has no evidence, a shown passage is right if it holds a short answer.
    `passages` has those of the ranking by id, few of which were shown.
    """
    shown = {"docs": record["sources"], "gold_docs": record["evidence"]}
    scores: Scores = {}
    if record["evidence"]:
        gold, guess = _kilt_records(record, passages)
        found = kilt.retrieval_scores(guess, gold, KS)
        scores |= {name: v for name, v in found.items() if not name.startswith(_LEFT_OUT)}
        found = support.support_by_gold(shown)
    else:
        found = support.support_by_answer(shown | {"answers": short_answers(record)})
    if found.hit is not None:
        scores |= {"retrieval_hit": found.hit, "retrieval_precision": found.precision}
    return scores


def gated_scores(scores: Scores) -> Scores:
    """KILT's scores that count only where all of the evidence was found first."""
    if "Rprec" not in scores:
        return {}
    passes = scores["Rprec"] == 1
    names = [name for name in kilt.DOWNSTREAM if name in scores]
    return {f"KILT-{name}": scores[name] if passes else 0.0 for name in names}


def grounding_scores(records: Sequence[Record], judge: Judge) -> list[Scores]:
    """Is it supported by what it cites? ALCE's citation_rec and citation_prec, and the official
    grounding, each with the judge's prefix; an answer without a statement or a span has 0.

    The premise is what the sentence cites, several passages joined; of several that one [Ret]
    brought, a span cites one, and is judged by that one alone. `[12]` in what Gen writes or quotes
    is no citation.
    """
    items = [
        {
            "question": record["question"],
            "output": _one_line(_cited_by_spans(record)),
            "spans": [s | {"text": _NUMBER.sub("", s["text"])} for s in record["spans"]],
            "docs": record["sources"],
        }
        for record in records
    ]
    cited = [found or alce.Citation(0.0, 0.0) for found in alce.citations_of(items, judge)]
    return [
        nli.labelled(
            judge,
            {
                "citation_rec": citation.recall,
                "citation_prec": citation.precision,
                "grounding": share or 0.0,
            },
        )
        for citation, share in zip(cited, groundings(items, judge), strict=True)
    ]


def scored(records: Sequence[Record], judge: Judge, passages: Passages) -> list[Scores]:
    """All scores of each answer; `passages` as in `retrieval_scores`."""
    grounded = grounding_scores(records, judge)
    found = []
    for record, grounding in zip(records, grounded, strict=True):
        scores = answer_scores(record) | retrieval_scores(record, passages)
        found.append(scores | gated_scores(scores) | grounding)
    return found


def gold_answers(record: Record) -> list[str]:
    """Answers that are right; of a question with nothing but a long one, that."""
    return short_answers(record) or [a for a in [record["long_answer"]] if a.strip()]


def short_answers(record: Record) -> list[str]:
    """Answers that are right; of a question with nothing but groups, those."""
    flat = [answer for group in record["answer_groups"] for answer in group]
    return [answer for answer in record["answers"] or flat if answer.strip()]


def _cited_by_spans(record: Record) -> str:
    """The output without numbers in brackets but those that cite a span's passage."""
    output, ends, end = record["output"], set(), 0
    for shown in filter(None, (rendered(span).rstrip() for span in record["spans"])):
        start = output.find(shown, end)
        if start >= 0:
            end = start + len(shown)
            ends.add(output.rindex("]", start, end) + 1)
    return _NUMBER.sub(lambda found: found[0] if found.end() in ends else "", output)


def _one_line(output: str) -> str:
    """All of it as ALCE's scorers read one: they stop at its first line."""
    return output.replace("\n", " ")


def _kilt_records(record: Record, passages: Passages) -> tuple[Record, Record]:
    """Gold and guess as KILT has them; a passage is a page."""
    pages = [{"wikipedia_id": id} for id in record["evidence"]]
    answers = gold_answers(record) or [""]
    gold = [{"answer": answer, "provenance": pages} for answer in answers]
    ranked = [{"wikipedia_id": id, "text": passages[id].text} for id in record["ranking"]]
    guess = {"answer": record["answer"], "provenance": ranked}
    return {"id": record["id"], "output": gold}, {"id": record["id"], "output": [guess]}
