"""Is the answer right? Text rules exactly as KILT's and ALCE's scorers have them."""

import re
import string
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, ASCII punctuation deleted, articles blanked, white space folded."""
    text = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION))
    return " ".join(text.split())


def answer_present(prediction: str, answers: Sequence[str]) -> bool:
    """Whether some answer, normalised, is a substring of the prediction, normalised.

    ALCE's exact_presence, but an empty prediction is never right.
    """
    text = normalize_answer(prediction)
    return bool(text) and any(normalize_answer(answer) in text for answer in answers)
