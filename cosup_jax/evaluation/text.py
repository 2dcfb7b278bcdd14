"""Short answers and texts compared, by the text rules that KILT's and ALCE's scorers share.

A score is in 0..1, of one prediction against all its gold answers: the best of them counts. Gold
answers that are blank are no answers. A blank prediction scores 0, whatever the answers are.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, ASCII punctuation deleted, articles blanked, white space folded."""
    text = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION))
    return " ".join(text.split())


def remove_citations(text: str) -> str:
    """ALCE's rule: deletes `[1`, a blank before it, ` |`, and every `]` there is."""
    text = re.sub(r"\[\d+", "", re.sub(r" \[\d+", "", text))
    return text.replace(" |", "").replace("]", "")


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """KILT's accuracy: 1 if the prediction is one of the answers, byte for byte, stripped."""
    return _best(str.__eq__, prediction, answers)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """KILT's EM: 1 if the prediction is one of the answers, both normalised.

    "..." and "?" are both nothing when normalised, so they match.
    """
    return _best(lambda p, a: normalize_answer(p) == normalize_answer(a), prediction, answers)


def f1(prediction: str, answers: Sequence[str]) -> float:
    """KILT's F1 of the bags of normalised tokens; 0 where they share none, or have none."""
    return _best(f1_of, prediction, answers)


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """KILT's ROUGE-L (`rouge_l_of` says which), of the stripped texts."""
    return _best(rouge_l_of, prediction, answers)


def exact_presence(answers: Sequence[str], text: str) -> bool:
    """ALCE's: some answer is a substring of the text, both normalised ("art" is in "party").

    An answer of which nothing is left when normalised is in every text.
    """
    normalized = normalize_answer(text)
    return any(normalize_answer(answer) in normalized for answer in listed(answers))


def answer_present(prediction: str, answers: Sequence[str]) -> bool:
    """`exact_presence`, but a prediction with nothing in it is never right."""
    return bool(normalize_answer(prediction)) and exact_presence(answers, prediction)


def f1_of(prediction: str, answer: str) -> float:
    """F1 of two bags of normalised tokens; 0 where they share none."""
    guess, gold = normalize_answer(prediction).split(), normalize_answer(answer).split()
    same = (Counter(guess) & Counter(gold)).total()
    if not same:
        return 0.0
    precision, recall = same / len(guess), same / len(gold)
    return harmonic(precision, recall)


def rouge_l_of(prediction: str, answer: str) -> float:
    """F of the package `rouge` 1.0.1, which is not the textbook's ROUGE-L.

    Cased and unstemmed; every full stop ends a piece. The distinct words on a longest common
    subsequence of any two pieces are divided by the distinct words of each side. The 1e-8 makes a
    perfect match 0.999999995. Texts of any length, where the package exceeds its recursion limit.
    """
    guess, gold = _pieces(prediction), _pieces(answer)
    if not guess or not gold:
        return 0.0
    common = set().union(*(_on_lcs(g, p) for g in gold for p in guess))
    precision = len(common) / len(set().union(*guess))
    recall = len(common) / len(set().union(*gold))
    return 2.0 * (precision * recall / (precision + recall + 1e-8))


def listed(answers: Sequence[str]) -> Sequence[str]:
    """Answers as a list; a single text is one answer, not a list of letters."""
    return [answers] if isinstance(answers, str) else answers


def harmonic(a: float, b: float) -> float:
    """Harmonic mean, 0 where both are 0."""
    return 2 * a * b / (a + b) if a + b else 0.0


def mean(values: Sequence[float]) -> float:
    """Of nothing it is nan, as the peers' is."""
    return sum(values) / len(values) if values else math.nan


def _best(score: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    prediction = prediction.strip()
    if not prediction:
        return 0.0
    gold = {answer.strip() for answer in listed(answers)} - {""}
    if not gold:
        raise ValueError("there is no gold answer to compare with")
    return max(float(score(prediction, answer)) for answer in gold)


def _pieces(text: str) -> list[list[str]]:
    """Words of each piece between full stops; a piece of blanks has the one word ""."""
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _on_lcs(gold: list[str], guess: list[str]) -> set[str]:
    """Words of the longest common subsequence that `rouge` finds, walking back from the ends."""
    length = [[0] * (len(guess) + 1) for _ in range(len(gold) + 1)]
    for i, word in enumerate(gold):
        above, row = length[i], length[i + 1]
        for j, other in enumerate(guess):
            row[j + 1] = above[j] + 1 if word == other else max(above[j + 1], row[j])
    found, i, j = set(), len(gold), len(guess)
    while i and j:
        if gold[i - 1] == guess[j - 1]:
            found.add(gold[i - 1])
            i, j = i - 1, j - 1
        elif length[i - 1][j] > length[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found
