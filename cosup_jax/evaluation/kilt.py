"""KILT's scores (Petroni et al. 2021), as its eval_downstream.py and eval_retrieval.py have them.

Records are KILT's: gold `{"id", "input", "output": [{"answer", "provenance": [{"wikipedia_id",
"title", ...}]}, ...]}`, guess `{"id", "output": [{"answer", "provenance"}]}` with one output whose
provenance is in order of rank. Scores are in 0..1.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cosup_jax.evaluation import text

Record = Mapping[str, Any]
PAGE = ("wikipedia_id",)  # what makes a passage the right one; several keys are joined by "+"
DOWNSTREAM = {
    "accuracy": text.accuracy,
    "em": text.exact_match,
    "f1": text.f1,
    "rougel": text.rouge_l,
}


def kilt_scores(
    gold_records: Sequence[Record],
    guess_records: Sequence[Record],
    ks: Sequence[int] = (1, 5, 10, 20),
) -> dict[str, Any]:
    """All of KILT's scores, under KILT's names, each the mean over all N gold records.

    Guesses are found by id; those of other ids are ignored. A guess whose answer is blank scores
    0 and counts; its retrieval is still scored.

    Returns:
        "downstream" (accuracy, em, f1, rougel), "kilt" (the same gated: 0 where R-precision is
        below 1), "retrieval" (Rprec, recall@k, ... of `retrieval_scores`) and "n", which is N.

    Raises:
        ValueError: a gold record has no guess; an id stands twice; a guess has another number of
            outputs than one, or no answer; a gold record has no answer.
    """
    rows = [item_scores(gold, guess, ks) for gold, guess in align(gold_records, guess_records)]
    common = [name for name in (rows[0] if rows else {}) if all(name in row for row in rows)]
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in common}
    gated = {f"KILT-{name}" for name in DOWNSTREAM}
    return {
        "downstream": {name: mean[name] for name in common if name in DOWNSTREAM},
        "kilt": {name: mean[name] for name in common if name in gated},
        "retrieval": {n: mean[n] for n in common if n not in DOWNSTREAM and n not in gated},
        "n": len(rows),
    }


def item_scores(gold: Record, guess: Record, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """One record's share in each of `kilt_scores`."""
    answer = str(guess["output"][0]["answer"])
    answers = gold_answers(gold)
    try:
        scores = {name: score(answer, answers) for name, score in DOWNSTREAM.items()}
    except ValueError as error:
        raise ValueError(f"gold record {gold['id']}: {error}") from None
    retrieval = retrieval_scores(guess, gold, ks)
    passes = retrieval["Rprec"] == 1
    return {
        **scores,
        **{f"KILT-{name}": score if passes else 0.0 for name, score in scores.items()},
        **retrieval,
    }


def align(
    gold_records: Sequence[Record], guess_records: Sequence[Record]
) -> list[tuple[Record, Record]]:
    """(gold, guess) for every gold record, in gold order; ids are compared as stripped text."""
    gold, guesses = _by_id(gold_records, "gold"), _by_id(guess_records, "guess")
    for name in gold:
        if name not in guesses:
            raise ValueError(f"there is no guess for the gold record {name}")
        output = guesses[name]["output"]
        if len(output) != 1 or "answer" not in output[0]:
            raise ValueError(f"the guess for {name} must have exactly one output, with an answer")
    return [(record, guesses[name]) for name, record in gold.items()]


def retrieval_scores(
    guess: Record, gold: Record, ks: Sequence[int], rank_keys: Sequence[str] = PAGE
) -> dict[str, float]:
    """Rprec, precision@k, recall@k, success_rate@k (the last two from k = 2 on, as KILT reports
    them), answer_in_context@k, entity_in_context@k, answer_and_ent_in_context@k, and
    entity_in_input where the gold record has an input."""
    scores = {"Rprec": r_precision(guess, gold, rank_keys)}
    if "input" in gold:
        question = text.normalize_answer(gold["input"])
        scores["entity_in_input"] = float(_any_in(gold_titles(gold), question))
    for k in ks:
        scores[f"precision@{k}"] = precision_at_k(guess, gold, k, rank_keys)
        if k > 1:
            scores[f"recall@{k}"] = recall_at_k(guess, gold, k, rank_keys)
            scores[f"success_rate@{k}"] = success_at_k(guess, gold, k, rank_keys)
        scores[f"answer_in_context@{k}"] = answer_in_context(guess, gold, k)
        scores[f"entity_in_context@{k}"] = entity_in_context(guess, gold, k)
        scores[f"answer_and_ent_in_context@{k}"] = answer_and_entity_in_context(guess, gold, k)
    return scores


def r_precision(guess: Record, gold: Record, rank_keys: Sequence[str] = PAGE) -> float:
    """Share of a gold output's R distinct pages among the first R distinct pages of the guess.

    The best gold output counts. Provenance without the keys is skipped; without any page, 0.
    """
    found, best = _ids(guess["output"][0], rank_keys), 0.0
    for output in gold["output"]:
        wanted = _ids(output, rank_keys)
        if wanted:
            best = max(best, sum(page in wanted for page in found[: len(wanted)]) / len(wanted))
    return best


def precision_at_k(guess: Record, gold: Record, k: int, rank_keys: Sequence[str] = PAGE) -> float:
    """Evidence sets that are complete within the first k places of `_places`, divided by k."""
    return _complete(_places(guess, gold, rank_keys)[0], k) / k


def recall_at_k(guess: Record, gold: Record, k: int, rank_keys: Sequence[str] = PAGE) -> float:
    """The same, divided by the number of distinct evidence sets; 0 where there is none."""
    places, sets = _places(guess, gold, rank_keys)
    return _complete(places, k) / sets if sets else 0.0


def success_at_k(guess: Record, gold: Record, k: int, rank_keys: Sequence[str] = PAGE) -> float:
    """1 if some evidence set is complete within the first k places."""
    return float(_complete(_places(guess, gold, rank_keys)[0], k) > 0)


def answer_in_context(guess: Record, gold: Record, k: int) -> float:
    """1 if a gold answer is a substring, normalised, of one of the first k passages' `text`."""
    answers = gold_answers(gold)
    return _some_text(guess, k, lambda passage: _any_in(answers, passage))


def entity_in_context(guess: Record, gold: Record, k: int) -> float:
    """1 if the title of a gold page is, in the same sense."""
    titles = gold_titles(gold)
    return _some_text(guess, k, lambda passage: _any_in(titles, passage))


def answer_and_entity_in_context(guess: Record, gold: Record, k: int) -> float:
    """1 if one of the first k passages has a gold answer and a gold title."""
    answers, titles = gold_answers(gold), gold_titles(gold)
    return _some_text(
        guess, k, lambda passage: _any_in(answers, passage) and _any_in(titles, passage)
    )


def gold_answers(gold: Record) -> list[str]:
    """Distinct answers of all gold outputs, stripped, without blank ones."""
    answers = [(output.get("answer") or "").strip() for output in gold["output"]]
    return [answer for answer in dict.fromkeys(answers) if answer]


def gold_titles(gold: Record) -> list[str]:
    """Distinct titles of the gold pages, stripped, without blank ones."""
    pages = [page for output in gold["output"] for page in output.get("provenance", ())]
    titles = [(page.get("title") or "").strip() for page in pages]
    return [title for title in dict.fromkeys(titles) if title]


def _by_id(records: Sequence[Record], kind: str) -> dict[str, Record]:
    found: dict[str, Record] = {}
    for record in records:
        name = str(record["id"]).strip()
        if name in found:
            raise ValueError(f"two {kind} records have the id {name}")
        found[name] = record
    return found


def _ids(output: Record, rank_keys: Sequence[str]) -> list[str]:
    """Distinct page ids in order of rank; a page without one of the keys has none."""
    pages = [p for p in output.get("provenance", ()) if all(key in p for key in rank_keys)]
    return list(dict.fromkeys(_joined(page, rank_keys) for page in pages))


def _joined(page: Record, rank_keys: Sequence[str]) -> str:
    return "+".join(str(page[key]).strip() for key in rank_keys if key in page)


def _places(guess: Record, gold: Record, rank_keys: Sequence[str]) -> tuple[list, int]:
    """KILT's rank, in which an evidence set has one place, and the number of distinct sets.

    A set's place is where the guess completes it: True. Until then its last page holds a mark, and
    a page of no set False. A gold page without the keys is a page that no guess can name.
    """
    found = _ids(guess["output"][0], rank_keys)
    if not found:
        return [], 0
    sets: list[set[str]] = []
    for output in gold["output"]:
        if "provenance" in output:
            pages = {_joined(page, rank_keys) for page in output["provenance"]}
            if pages not in sets:
                sets.append(pages)
    places: list[bool | str] = []
    for page in found:
        holders = [number for number, pages in enumerate(sets) if page in pages]
        for number in holders:
            mark = f"part of set {number}"
            if mark in places:
                places.remove(mark)
            sets[number].remove(page)
            places.append(mark if sets[number] else True)
        if not holders:
            places.append(False)
    return places, len(sets)


def _complete(places: list, k: int) -> int:
    if k < 1:
        raise ValueError(f"k is {k}; it must be 1 or more")
    return places[:k].count(True)


def _some_text(guess: Record, k: int, holds: Callable[[str], bool]) -> float:
    passages = guess["output"][0].get("provenance", ())[:k]
    texts = [text.normalize_answer(passage["text"]) for passage in passages if "text" in passage]
    return float(any(map(holds, texts)))


def _any_in(names: Sequence[str], normalized: str) -> bool:
    return any(text.normalize_answer(name) in normalized for name in names)
