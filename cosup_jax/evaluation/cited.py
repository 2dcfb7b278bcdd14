"""Raw outputs, `text [Ret] title :: text [Cs] span [Ce] text ...`, as the official code reads them.

From its run_inference_ntp_nsp.py (how markers become citations) and eval_metric.py (grounding).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from cosup_jax.evaluation import alce, text
from cosup_jax.evaluation import nli as nli_lib
from cosup_jax.evaluation.nli import Judge

Item = Mapping[str, Any]


def parse_cited_output(raw: str) -> dict[str, Any]:
    """A raw output as an answer with citations.

    For each `[Ret]` outside the last span, the first `[Cs]` after it and the first `[Ce]` after
    that; what lies between is the passage and the span. A passage's number is its rank among the
    distinct ones, in order of appearance. A span that ends in a full stop becomes `span[k]. `,
    another `span[k] `, an empty one nothing. Stray markers stay, `</s>` goes, and so does a prompt
    in front, up to `## Raw Output:` or else `## Output:`.

    Returns:
        "raw", without the prompt; "output", with citations; "spans", `{"text", "number",
        "passage"}` each, empty ones too; "passages", of which the k-th has number k.
    """
    for mark in ("## Raw Output:\n\n", "## Output:\n\n"):
        if mark in raw:
            raw = raw.split(mark)[1]
            break
    spans, parts, end = [], [], 0
    for start, span, stop in _spans(raw):
        spans.append(span)
        parts += [raw[end:start], rendered(span)]
        end = stop
    output = "".join([*parts, raw[end:]]).replace("</s>", "")
    passages = list(dict.fromkeys(span["passage"] for span in spans))
    return {"raw": raw, "output": output, "spans": spans, "passages": passages}


def groundings(
    items: Sequence[Item],
    nli: Judge,
    *,
    at_most_citations: int | None = 3,
    qampari: bool = False,
    peer_compat: bool = False,
) -> list[float | None]:
    """Of each item the share of what its cited spans state that their passages entail, in 0..1.

    Nothing but the cited spans is read: those of `raw_output`, or, where an item has `spans`
    (`{"text", "number"}` each), those, whose number k is docs[k - 1]. Their sentences are grouped,
    each group ending in a cited one, and judged against the passages that this one cites, joined
    as ALCE joins them; a group's share is that of its sentences, and the item's the mean over
    groups. A group that cites a passage there is not has 0. None where there is no span.

    Args:
        qampari: in place of spans, the comma items of `output`, each after the question.
        peer_compat: `[k]` is docs[k - 1], and `[0]` the last of them; else `[k]` is the k-th
            passage that the raw output shows.
    """
    groups = [_groups(item, at_most_citations, qampari, peer_compat) for item in items]
    verdicts = nli_lib.entailed(
        nli, [(premise, claim) for each in groups for premise, claims in each for claim in claims]
    )

    def share(premise: str, claims: list[str]) -> float:
        return text.mean([verdicts[premise, claim] for claim in claims]) if claims else 0.0

    return [text.mean([share(*group) for group in each]) if each else None for each in groups]


def _spans(raw: str) -> list[tuple[int, dict[str, Any], int]]:
    """(start, span, end) of each span, with its passage's markers and its own."""
    at = {m: [f.start() for f in re.finditer(re.escape(m), raw)] for m in ("[Ret]", "[Cs]", "[Ce]")}
    found, numbers, end = [], {}, 0
    for ret in at["[Ret]"]:
        cs = next((place for place in at["[Cs]"] if place > ret), None)
        ce = next((place for place in at["[Ce]"] if cs is not None and place > cs), None)
        if ret < end or ce is None:
            continue
        end = ce + len("[Ce]")
        passage = raw[ret + len("[Ret]") : cs].strip()
        number = numbers.setdefault(passage, len(numbers) + 1)
        span = {"text": raw[cs + len("[Cs]") : ce].strip(), "number": number, "passage": passage}
        found.append((ret, span, end))
    return found


def rendered(span: Item) -> str:
    """A span with its citation, as an output has it; "" of one without words."""
    words, citation = span["text"], f"[{span['number']}]"
    if not words:
        return ""
    return f"{words[:-1]}{citation}. " if words.endswith(".") else f"{words}{citation} "


def _groups(
    item: Item, at_most_citations: int | None, qampari: bool, peer_compat: bool
) -> list[tuple[str, list[str]]]:
    """(premise, claims) of each group of sentences; the last ones, uncited, are left out."""
    from cosup_jax.evaluation.sentences import sentences  # NLTK takes a second to import

    docs = item.get("docs", [])
    if qampari:
        parts = alce.list_items(item["question"], item["output"])
    else:
        spans = item.get("spans")
        if spans is None:
            spans = [span for _, span, _ in _spans(item["raw_output"])]
            if not peer_compat:
                docs = _shown(dict.fromkeys(span["passage"] for span in spans), docs)
        parts = sentences("".join(map(rendered, spans)).replace("</s>", ""))
    groups, claims = [], []
    for part in parts:
        claims.append(text.remove_citations(part).strip())
        if alce.cites(part):
            refs = alce.references(part, len(docs), peer_compat)[:at_most_citations]
            found = sentences(" ".join(claims)) if refs else []
            groups.append((alce.premise(docs, refs), found))
            claims = []
    return groups


def _shown(passages: Sequence[str], docs: Sequence[Item]) -> list[Item]:
    """The documents in the order in which the raw output shows them.

    A passage that is none of them, as tokens and back it may not be the same text, is one itself.
    """
    whole = lambda doc: f"{doc['title']} :: {doc['text']}" if doc["title"] else doc["text"]
    known = {"".join(whole(doc).split()): doc for doc in docs}
    found = []
    for passage in passages:
        title, colons, body = passage.partition(" :: ")
        own = {"title": title, "text": body} if colons else {"text": passage}
        found.append(known.get("".join(passage.split()), own))
    return found
