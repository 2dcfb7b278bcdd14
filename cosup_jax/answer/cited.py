"""An answer as people and files have it: text with [1][2], its spans and its sources.

Citations are tracked by passage, never by text: number n is the n-th passage that was retrieved.
Where the pieces meet is as in the official code: a span loses its outer blanks, its citation stands
before its full stop, and a blank follows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from cosup_jax.answer.decode import Answer, Found
from cosup_jax.data import markup
from cosup_jax.data.schema import Example, Passage
from cosup_jax.data.tokenizer import CE, CS, RET, Tokenizer
from cosup_jax.evaluation.cited import rendered


class Part(NamedTuple):
    """A stretch of an answer."""

    text: str
    found: list[Found] | None  # what grounds it, as it was retrieved; None: plain text


def parts(answer: Answer, tokenizer: Tokenizer) -> list[Part]:
    """Plain text and spans in turn; a span that the end of the answer cuts off ends there."""
    found, pieces = iter(answer.retrieved), [([], None)]
    passage = False  # between [Ret] and [Cs]
    for token in answer.tokens:
        if token == tokenizer.eos:
            break
        if token == tokenizer.cs:
            pieces.append(([], next(found)))
        elif token == tokenizer.ce:
            pieces.append(([], None))
        elif token != tokenizer.ret and not passage:
            pieces[-1][0].append(token)
        passage = token == tokenizer.ret or (passage and token != tokenizer.cs)
    read = [Part(tokenizer.decode(tokens), found) for tokens, found in pieces]
    return [part for part in read if part.text or part.found]


def record(
    example: Example,
    answer: Answer,
    passages: Sequence[Passage],
    tokenizer: Tokenizer,
    longest: int,
) -> dict[str, Any]:
    """One line of an output file.

    Args:
      passages: those that were searched, by row.
      longest: tokens of a passage that Gen reads.
    """
    shown = [one for found in answer.retrieved for one in found]
    numbers = {row: n for n, row in enumerate(dict.fromkeys(one.row for one in shown), 1)}
    raw = output = text = ""
    spans = []
    for part in parts(answer, tokenizer):
        if part.found is None:
            raw, output, text = raw + part.text, output + part.text, text + part.text
            continue
        inserted = markup.insertion([passages[one.row] for one in part.found], tokenizer, longest)
        raw += f"{RET}{tokenizer.decode(inserted[:-1])}{CS}{part.text}{CE}"
        row = _grounds(part, passages)
        span = {"text": part.text.strip(), "passage": passages[row].id, "number": numbers[row]}
        output += rendered(span)
        text += f"{span['text']} " if span["text"] else ""
        spans.append(span)
    return {
        "id": example.id,
        "question": example.question,
        "answers": list(example.answers),
        "output": output.strip(),
        "text": text.strip(),
        "raw": raw,
        "spans": spans,
        "retrieved": [
            {"id": passages[one.row].id, "score": _score(one), "number": numbers[one.row]}
            for one in shown
        ],
        "sources": [
            {"number": n, "id": (p := passages[row]).id, "title": p.title, "text": p.text}
            for row, n in numbers.items()
        ],
        "tokens": answer.written,
        "retrievals": len(answer.retrieved),
        "stopped": answer.stopped,
    }


def _score(found: Found) -> float | None:
    """To five digits: the last ones depend on which questions were answered together."""
    return None if found.score is None else float(f"{found.score:.5g}")


def _grounds(part: Part, passages: Sequence[Passage]) -> int:
    """Row of the passage that a span cites: of several at one [Ret] the first that contains it."""
    rows = [one.row for one in part.found]
    span = part.text.strip()
    return next((row for row in rows if span in passages[row].text), rows[0])
