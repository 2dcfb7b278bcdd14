"""Made-up texts and records on which our scorers and the peers' are compared; see record_metrics.

A suite is a generator of cases and our scores of one case, a flat dict of numbers or a text.
"""

import math
import zlib
from random import Random

from cosup_jax.evaluation import alce, cited, kilt, official, text

SOME = (
    "the a an Paris paris Rome capital of France is was not in 1990 19905 3.14 U.S.A. U. S. usa "
    "rock-and-roll snake_case vitamin A café cafe\u0301 “quoted” — 。 ... . .. ? ! Suicide. "
    "suicide Dr. Smith e.g. art party yes no SUPPORTS REFUTES [a] | [Ret] </s> No. \u00a0x \u3000 "
    "Über ß İ ,. : ; 'tis the-end (1) 5"
)
WORDS = SOME.split(" ")
CITATIONS = ("[1]", " [2].", "[1][2].", "[2][1]", "[1][2][1].", "[1][1]", "[3] ", "[2][3][1][4].")
CITATIONS = 3 * CITATIONS + (
    "[1, 3]",
    "[1-3]",
    "[0]",
    "[9]",
    "[1",
    "[ 1 ]",
    "(1)",
    "[1990]",
    "[0].",
)
MARKERS = ("[Ret]", "[Cs]", "[Ce]", " [Ret] ", "[Ret] ", "[Cs] ", " [Ce] ", "</s>", "<PAD>")
TASKS = {
    "kilt_nq": "answers",
    "kilt_hotpotqa": "answers",
    "kilt_wow": "answer",
    "kilt_eli5": "answers",
    "kilt_fever": "label",
}


def nli(premise: str, claim: str) -> bool:
    """A judge without sense but with a fixed mind: one other blank and it may say the opposite."""
    return zlib.crc32(f"{premise}\0{claim}".encode()) % 3 > 0


def words(rng: Random, most: int, more: tuple[str, ...] = ()) -> str:
    """Up to `most` of the words, joined by blanks and less."""
    chosen = [rng.choice(more if more and rng.random() < 0.3 else WORDS) for _ in range(most)]
    joined = "".join(w + rng.choice((" ", " ", " ", "  ", "", ". ")) for w in chosen)
    return joined[: rng.randint(0, len(joined))]


def text_case(rng: Random) -> dict:
    gold = [words(rng, 6) for _ in range(rng.randint(1, 3))]
    prediction = rng.choice((*gold, words(rng, 8), rng.choice(gold) + rng.choice((".", " ", "s"))))
    return {"prediction": prediction, "answers": [*gold, "Paris"]}


def page(rng: Random) -> dict:
    found = {"wikipedia_id": rng.choice(("1", "2", "3", " 2", 4)), "title": rng.choice(WORDS)}
    if rng.random() < 0.1:
        del found["wikipedia_id"]
    return found | ({"text": words(rng, 6)} if rng.random() < 0.8 else {})


def kilt_case(rng: Random) -> dict:
    gold, guess = [], []
    for number in range(rng.randint(1, 3)):
        outputs = []
        for _ in range(rng.randint(1, 4)):
            output = {"answer": words(rng, 3)} if rng.random() < 0.7 else {}
            if rng.random() < 0.8:
                output["provenance"] = [page(rng) for _ in range(rng.randint(0, 3))]
            outputs.append(output)
        outputs.append({"answer": "Paris"})
        gold.append({"id": number, "input": words(rng, 6), "output": outputs})
        found = [page(rng) for _ in range(rng.randint(0, 7))]
        answer = rng.choice((words(rng, 3), "Paris", "paris", " ", "3"))
        guess.append({"id": f" {number}", "output": [{"answer": answer, "provenance": found}]})
    rng.shuffle(guess)
    return {"gold": gold, "guess": guess}


def document(rng: Random, number: int) -> dict:
    found = {"id": number, "title": rng.choice(WORDS), "text": words(rng, 6)}
    return found | ({"sent": words(rng, 3)} if rng.random() < 0.1 else {})


def alce_case(rng: Random) -> dict:
    items = []
    for _ in range(rng.randint(1, 3)):
        names = [
            [words(rng, 2) for _ in range(rng.randint(1, 3))] for _ in range(rng.randint(1, 7))
        ]
        listed = ", ".join(
            rng.choice((rng.choice(rng.choice(names)), words(rng, 2))) for _ in "abc"
        )
        cited_text = words(rng, 20, CITATIONS)
        commas = cited_text.replace("  ", ", ")
        output = rng.choice((cited_text, cited_text, commas, listed, f"\n {listed}.\nx", " "))
        items.append(
            {
                "question": words(rng, 4),
                "output": output,
                "docs": [document(rng, n) for n in range(rng.randint(1, 5))],
                "qa_pairs": [{"short_answers": each} for each in names],
                "annotations": [{"long_answer": words(rng, 12) + "."} for _ in "ab"],
                "answers": names,
                "claims": [words(rng, 5) for _ in range(rng.randint(1, 3))],
            }
        )
    return {"items": items}


def raw_output(rng: Random, docs: list[dict]) -> str:
    parts = []
    for _ in range(rng.randint(0, 5)):
        if docs and rng.random() < 0.8:
            doc = rng.choice(docs)
            span = rng.choice((words(rng, 5), "It is so. ", "Really? ", "", "[0] a. B."))
            parts.append(f"[Ret] {doc['title']} :: {doc['text']} [Cs] {span} [Ce]")
        parts.append(words(rng, 4, MARKERS))
    return rng.choice(("", "", "", "## Input:\n\nx## Output:\n\n")) + " ".join(parts)


def official_case(rng: Random) -> dict:
    data_name, items = rng.choice(("kilt_nq", *TASKS)), []
    for _ in range(rng.randint(1, 4)):
        docs = [document(rng, n) for n in rng.sample(range(6), rng.randint(0, 4))]
        raw = raw_output(rng, docs)
        answers = [rng.choice(WORDS) for _ in range(rng.randint(1, 3))]
        if TASKS[data_name] != "answers":
            label = rng.choice(("SUPPORTS", "REFUTES"))
            part = raw[rng.randint(0, 9) :][:20]
            answers = [label if TASKS[data_name] == "label" else rng.choice((part, words(rng, 5)))]
        gold = rng.choice(([], [1, 2], [{"id": 3}, {"id": 3}], [2, 2, 4]))
        if data_name == "kilt_nq" and rng.random() < 0.1:
            answers = []
        items.append(
            {
                "question": words(rng, 4),
                "answers": answers,
                "raw_output": raw,
                "output": cited.parse_cited_output(raw)["output"] + rng.choice(("", "\n[1] x")),
                "docs": docs,
                "gold_docs": gold,
            }
        )
    return {"data_name": data_name, "items": items}


def parse_case(rng: Random) -> dict:
    return {"raw": raw_output(rng, [document(rng, n) for n in range(2)])}


def string_case(rng: Random) -> dict:
    return {"text": words(rng, 8, CITATIONS)}


def our_text(case: dict) -> dict:
    return {n: score(case["prediction"], case["answers"]) for n, score in kilt.DOWNSTREAM.items()}


def our_kilt(case: dict) -> dict:
    found = kilt.kilt_scores(case["gold"], case["guess"], ks=(1, 2, 5))
    return found["downstream"] | found["kilt"] | found["retrieval"]


def our_alce(case: dict) -> dict:
    items = case["items"]
    found = alce.str_em(items) | alce.qampari_scores(items)
    found |= {f"cot_{n}": v for n, v in alce.qampari_scores(items, cot=True).items()}
    found |= alce.citation_scores(items, nli, peer_compat=True) | alce.claim_recall(items, nli)
    lists = alce.citation_scores(items, nli, qampari=True, peer_compat=True)
    found |= {f"list_{name}": value for name, value in lists.items()}
    rouge = [100 * alce.rouge_lsum_of(item) for item in items]
    return without_counts(found) | {f"rougeLsum_{n}": value for n, value in enumerate(rouge)}


def our_official(case: dict) -> dict:
    return official.official_scores(case["items"], case["data_name"], nli, peer_compat=True)


def our_parse(case: dict) -> str:
    return cited.parse_cited_output(case["raw"])["output"]


def our_string(case: dict) -> str:
    return text.normalize_answer(case["text"]) + "\n" + text.remove_citations(case["text"])


def without_counts(scores: dict) -> dict:
    """Without our denominators, which the peers do not give."""
    return {n: v for n, v in scores.items() if n.rpartition("_")[2] not in ("n", "answered")}


def difference(ours: dict | str, theirs: dict | str) -> float:
    """The largest between two scores of a name; infinite where one has none or texts differ."""
    if isinstance(ours, str):
        return 0.0 if ours == theirs else math.inf
    if set(ours) != set(theirs):
        return math.inf
    pairs = [(float(ours[name]), float(theirs[name])) for name in ours]
    far = [abs(a - b) for a, b in pairs if not (math.isnan(a) and math.isnan(b))]
    return max((math.inf if math.isnan(each) else each for each in far), default=0.0)


SUITES = {  # name: (case, our scores, cases recorded)
    "text": (text_case, our_text, 100),
    "string": (string_case, our_string, 60),
    "kilt": (kilt_case, our_kilt, 12),
    "alce": (alce_case, our_alce, 14),
    "parse": (parse_case, our_parse, 24),
    "official": (official_case, our_official, 20),
}
