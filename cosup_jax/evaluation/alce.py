"""ALCE's scores (Gao et al. 2023), as its eval.py has them, without MAUVE and the QA model.

Items are ALCE's: `{"question", "output", "docs": [{"title", "text"}], "qa_pairs": [{"short_answers"
}], "annotations": [{"long_answer"}], "answers", "answer", "claims"}`, those that a score reads.
`[k]` in an output cites docs[k - 1]. Only an output's first line counts. Scores are in 0..100 and,
unless said otherwise, means over all n items; of no items they are nan.

Departures, which `peer_compat` takes back: `[0]` cites nothing, where ALCE takes it for the last
document; an output without a sentence counts 0 in the citation scores, where ALCE leaves the item
out (its number stands beside, as `*_answered`); rougeLsum is a mean, where ALCE gives the median of
1000 unseeded bootstrap means.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cosup_jax.evaluation import nli as nli_lib
from cosup_jax.evaluation import text
from cosup_jax.evaluation.nli import Judge

Item = Mapping[str, Any]
TASKS = ("asqa", "qampari", "eli5")


class Citation(NamedTuple):
    """Of one item's statements: the share that is supported, and the share of citations needed."""

    recall: float  # 0..1
    precision: float  # 0..1


class Statement(NamedTuple):
    """A sentence of an output, or an item of its list."""

    claim: str  # without citations
    refs: tuple[int, ...]  # rows of docs; () where nothing, or a document there is not, is cited


def alce_scores(
    items: Sequence[Item],
    task: str,
    nli: Judge | None = None,
    *,
    at_most_citations: int = 3,
    cot: bool = False,
    peer_compat: bool = False,
) -> dict[str, float]:
    """What ALCE reports for a task, under ALCE's names; what needs a judge only where one is given.

    Args:
        task: "asqa", "qampari" or "eli5"; ALCE looks for "qampari" in the file's name.
        cot: the list of a QAMPARI output starts after its first colon.
    """
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}; ALCE's are {', '.join(TASKS)}")
    found = {"length": text.mean([len(answer_text(item).split()) for item in items])}
    if task == "asqa" or peer_compat:
        found |= str_em(items)
    if task == "qampari":
        found |= qampari_scores(items, cot=cot)
    else:
        found |= rouge_lsum(items, peer_compat=peer_compat)
    if nli is not None:
        found |= citation_scores(
            items,
            nli,
            at_most_citations=at_most_citations,
            qampari=task == "qampari",
            peer_compat=peer_compat,
        )
        if task == "eli5":
            found |= claim_recall(items, nli)
    return found


def first_line(output: str) -> str:
    """What ALCE scores of an output."""
    return output.strip().split("\n")[0].replace("<|im_end|>", "")


def answer_text(item: Item) -> str:
    """What it scores for everything but citations: the first line without them."""
    return text.remove_citations(first_line(item["output"]))


def str_em(items: Sequence[Item]) -> dict[str, float]:
    """STR-EM (ALCE's "EM recall") of items, or of one item: `{"str_em", "str_hit", "n"}`.

    str_em is the mean over items of the share of `qa_pairs` of which a short answer is in the text
    (`exact_presence`), str_hit the share of items where all are. Both are 0 where the first item
    has no qa_pairs, and nan where an item has an empty list of them.
    """
    items = [items] if isinstance(items, Mapping) else items
    if items and items[0].get("qa_pairs") is None:
        return {"str_em": 0.0, "str_hit": 0.0, "n": len(items)}
    shares = [str_em_of(item) for item in items]
    hits = [float(share == 1) for share in shares]
    return {"str_em": 100 * text.mean(shares), "str_hit": 100 * text.mean(hits), "n": len(items)}


def str_em_of(item: Item) -> float:
    """One item's share in `str_em`, in 0..1."""
    output = answer_text(item)
    return text.mean([text.exact_presence(qa["short_answers"], output) for qa in item["qa_pairs"]])


def qampari_scores(items: Sequence[Item], *, cot: bool = False) -> dict[str, float]:
    """QAMPARI: means over items of `qampari_of`, times 100; num_preds is a count."""
    rows = [qampari_of(item, cot=cot) for item in items]
    names = ("num_preds", "prec", "rec", "rec_top5", "f1", "f1_top5")
    mean = {name: text.mean([row[name] for row in rows]) for name in names}
    return {
        "num_preds": mean.pop("num_preds"),
        **{f"qampari_{name}": 100 * value for name, value in mean.items()},
        "n": len(items),
    }


def qampari_of(item: Item, *, cot: bool = False) -> dict[str, float]:
    """Of one item: answers listed (num_preds), and in 0..1 prec, rec, rec_top5, f1, f1_top5.

    Listed is what stands between commas. `answers` has the aliases of each gold answer; `*_top5`
    asks for five of them at most.
    """
    output = answer_text(item)
    if cot:
        output = output.partition(":")[2]
    listed = [text.normalize_answer(part) for part in _comma_items(output)]
    listed = [name for name in listed if name]
    gold = [[text.normalize_answer(alias) for alias in aliases] for aliases in item["answers"]]
    known = {alias for aliases in gold for alias in aliases}
    right = sum(any(alias in listed for alias in aliases) for aliases in gold)
    precision = sum(name in known for name in listed) / len(listed) if listed else 0.0
    recall, top5 = right / len(gold), min(5, right) / min(5, len(gold))
    return {
        "num_preds": len(listed),
        "prec": precision,
        "rec": recall,
        "rec_top5": top5,
        "f1": text.harmonic(precision, recall),
        "f1_top5": text.harmonic(precision, top5),
    }


def rouge_lsum(items: Sequence[Item], *, peer_compat: bool = False) -> dict[str, float]:
    """`{"rougeLsum", "n"}`: the mean over items of `rouge_lsum_of`, times 100."""
    if peer_compat and items:
        from rouge_score import scoring

        aggregator = scoring.BootstrapAggregator()  # draws from NumPy's global generator
        for item in items:
            aggregator.add_scores({"rougeLsum": _rouge_score(item)})
        value = aggregator.aggregate()["rougeLsum"].mid.fmeasure
    else:
        value = text.mean([rouge_lsum_of(item) for item in items])
    return {"rougeLsum": 100 * value, "n": len(items)}


def rouge_lsum_of(item: Item) -> float:
    """F of rouge-score's rougeLsum with stems, in 0..1.

    Against the better of the first two `annotations`, or `answer` where there are none.
    """
    return float(_rouge_score(item).fmeasure)


def claim_recall(items: Sequence[Item], nli: Judge) -> dict[str, float]:
    """`{"claims_nli", "n"}`: mean over items of the share of `claims` that the output entails."""
    pairs = [[(answer_text(item), claim) for claim in item["claims"]] for item in items]
    if not all(pairs):
        raise ValueError(f"item {pairs.index([])} has no claims")
    verdicts = nli_lib.entailed(nli, [pair for each in pairs for pair in each])
    shares = [text.mean([verdicts[pair] for pair in each]) for each in pairs]
    return {**nli_lib.labelled(nli, {"claims_nli": 100 * text.mean(shares)}), "n": len(items)}


def citation_scores(
    items: Sequence[Item],
    nli: Judge,
    *,
    at_most_citations: int | None = 3,
    qampari: bool = False,
    peer_compat: bool = False,
) -> dict[str, float]:
    """ALCE's citation recall and precision: are statements supported by what they cite?

    Args:
        nli: a judge, `nli(premise, claim) -> bool`. Names of scores begin with its prefix.
        at_most_citations: what a statement cites beyond these is not looked at.
        qampari: a statement is the question and one item of the list, in place of a sentence.

    Returns:
        citation_rec and citation_prec over all n items, and citation_rec_answered and
        citation_prec_answered over the n_answered items with a statement. With `peer_compat` the
        latter take the former's names, as ALCE reports them.
    """
    found = citations_of(
        items,
        nli,
        at_most_citations=at_most_citations,
        qampari=qampari,
        peer_compat=peer_compat,
    )
    answered = [item for item in found if item is not None]
    every = [item or Citation(0.0, 0.0) for item in found]

    def means(citations: list[Citation], ending: str = "") -> dict[str, float]:
        recall, precision = ([c[i] for c in citations] for i in (0, 1))
        scores = {f"citation_rec{ending}": recall, f"citation_prec{ending}": precision}
        return nli_lib.labelled(nli, {name: 100 * text.mean(v) for name, v in scores.items()})

    counts = {"n": len(every), "n_answered": len(answered)}
    if peer_compat:
        return {**means(answered), **counts}
    return {**means(every), **means(answered, "_answered"), **counts}


def citations_of(
    items: Sequence[Item],
    nli: Judge,
    *,
    at_most_citations: int | None = 3,
    qampari: bool = False,
    peer_compat: bool = False,
) -> list[Citation | None]:
    """Each item's share in `citation_scores`; None where the output has no statement.

    A statement is supported if the documents it cites, together, entail it. A citation is needed
    if the statement is supported, and either the document alone entails it or the others without
    it do not. Statements that cite nothing, or a document there is not, are unsupported, and their
    citations are not counted.
    """
    rows = [
        statements(item, at_most_citations, qampari=qampari, peer_compat=peer_compat)
        for item in items
    ]
    cited = [
        (item["docs"], statement)
        for item, row in zip(items, rows, strict=True)
        for statement in row
        if statement.refs
    ]
    needed = iter(_needed(cited, nli))

    def citation(row: list[Statement]) -> Citation:
        supported = [n for n in (next(needed) for s in row if s.refs) if n is not None]
        total = sum(len(s.refs) for s in row)
        return Citation(len(supported) / len(row), sum(supported) / total if total else 0.0)

    return [citation(row) if row else None for row in rows]


def _needed(cited: Sequence[tuple[Sequence[Item], Statement]], nli: Judge) -> list[int | None]:
    """Of each statement that cites some of its documents, how many of its citations are needed;
    None where it is not supported."""
    together = nli_lib.entailed(nli, [(premise(docs, s.refs), s.claim) for docs, s in cited])
    several = [
        (docs, s)
        for docs, s in cited
        if len(s.refs) > 1 and together[premise(docs, s.refs), s.claim]
    ]
    alone = nli_lib.entailed(
        nli, [(premise(docs, (r,)), s.claim) for docs, s in several for r in s.refs]
    )
    others = nli_lib.entailed(
        nli,
        [
            (premise(docs, _without(s.refs, r)), s.claim)
            for docs, s in several
            for r in s.refs
            if not alone[premise(docs, (r,)), s.claim]
        ],
    )

    def needed(docs: Sequence[Item], s: Statement) -> int | None:
        if not together[premise(docs, s.refs), s.claim]:
            return None
        if len(s.refs) == 1:
            return 1
        return sum(
            alone[premise(docs, (r,)), s.claim]
            or not others[premise(docs, _without(s.refs, r)), s.claim]
            for r in s.refs
        )

    return [needed(docs, s) for docs, s in cited]


def statements(
    item: Item, at_most_citations: int | None, *, qampari: bool, peer_compat: bool
) -> list[Statement]:
    """What an output states, with the documents that each statement cites."""
    from cosup_jax.evaluation.sentences import sentences  # NLTK takes a second to import

    output = first_line(item["output"])
    parts = list_items(item["question"], output) if qampari else sentences(output)
    return [
        Statement(
            text.remove_citations(part).strip(),
            references(part, len(item.get("docs", ())), peer_compat)[:at_most_citations],
        )
        for part in parts
    ]


def list_items(question: str, output: str) -> list[str]:
    """What a QAMPARI output states: the question with each item of its list."""
    return [f"{question} {part.strip()}" for part in _comma_items(output)]


def cites(sentence: str) -> bool:
    """Whether there is a citation in it, of a document that is there or not."""
    return bool(re.search(r"\[\d", sentence))


def references(sentence: str, documents: int, peer_compat: bool) -> tuple[int, ...]:
    """Rows of the documents that a sentence cites, in order, with repeats.

    () if it cites one that is not there. With `peer_compat`, `[0]` is row -1, which is.
    """
    refs = tuple(int(number) - 1 for number in re.findall(r"\[(\d+)", sentence))
    lowest = -1 if peer_compat else 0
    return refs if all(lowest <= ref < documents for ref in refs) else ()


def premise(docs: Sequence[Item], refs: Sequence[int]) -> str:
    """The documents as a judge reads them; of a document, `sent` in place of `text` if it is there.

    One without a title is its text alone, as the official code has it.
    """
    shown = []
    for ref in refs:
        doc = docs[ref]
        body = doc["sent"] if "sent" in doc else doc["text"]
        shown.append(f"Title: {doc['title']}\n{body}" if "title" in doc else body)
    return "\n".join(shown)


def _comma_items(output: str) -> list[str]:
    return output.rstrip().rstrip(".").rstrip(",").split(",")


def _without(refs: tuple[int, ...], ref: int) -> tuple[int, ...]:
    """As ALCE has it: of a document cited twice, one citation is left."""
    first = refs.index(ref)
    return refs[:first] + refs[first + 1 :]


@functools.cache
def _scorer():
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeLsum"], use_stemmer=True)


def _rouge_score(item: Item):
    from cosup_jax.evaluation.sentences import sentences

    if item.get("annotations") is not None:
        references = [annotation["long_answer"] for annotation in item["annotations"][:2]]
    else:
        references = [item["answer"]]
    lines = lambda passage: "\n".join(sentences(passage.lower()))
    output = lines(answer_text(item))
    scores = [_scorer().score(lines(each), output)["rougeLsum"] for each in references]
    return max(scores, key=lambda score: score.fmeasure)
