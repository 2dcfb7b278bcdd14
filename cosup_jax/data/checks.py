"""What only an example and its corpus together can tell: references, markers, spans, answers."""

import itertools
import re
from collections.abc import Iterator

from cosup_jax.data import markup
from cosup_jax.data.problems import BadRow
from cosup_jax.data.schema import Example, Passage, Passages
from cosup_jax.data.tokenizer import RET
from cosup_jax.errors import UserError

# What a user may take for a control token, ours or a common one.
_CONTROL = re.compile(r"\[Ret(?::[^\]]*)?\]|\[Cs\]|\[Ce\]|\[Emb\]|<pad>|</?s>|<\|[a-z_]+\|>")
_SPLIT = re.compile(r"\w[\w.-]{0,63}")  # it names files
_KINDS_WITH_SPAN = ("", "span")


def check_references(example: Example, passages: Passages) -> None:
    """Raises BadRow unless the example can be written as training text."""
    if not _SPLIT.fullmatch(example.split):
        raise BadRow("wrong_type", f"split {example.split!r:.60} must be a short word")
    if example.split != "train" and example.split.lower() == "train":
        raise BadRow("wrong_type", f"split {example.split!r} would be held out; write 'train'")
    if not example.answers and not example.long_answer and not example.output:
        raise BadRow("empty_text", "'answers' is empty")
    for field in ("long_answer", "output"):
        if (text := getattr(example, field)) and not text.strip():
            raise BadRow("empty_text", f"'{field}' holds nothing but blanks; leave it out")
    for field in ("evidence", "hard_negatives", "candidates"):
        for id in getattr(example, field):
            if id not in passages:
                raise BadRow("missing_passage", f"{field} {id!r} has no passage")
    _check_support(example, passages)
    if example.output:
        _check_output(example, passages)


def warnings(example: Example, passages: Passages) -> Iterator[tuple[str, str]]:
    """(kind, reason) of what is odd about an example that `check_references` accepts."""
    texts = [example.question, example.long_answer, *example.answers]
    if example.output:
        texts += [piece.text for piece in markup.pieces(example, passages) if not piece.passage]
    for text in texts:
        if found := _CONTROL.search(text):
            yield "control_text", f"{found[0]!r} in the text is plain characters"
            break
    for id in example.hard_negatives:
        if id in example.evidence:
            yield "own_negative", f"hard_negatives {id!r} is in evidence too"
            break
    wanted = example.kind in _KINDS_WITH_SPAN and example.answers and example.evidence
    if wanted and not example.output:
        evidence = [markup.passage_text(passages[id]) for id in example.evidence]
        if not any(markup.find_answer(example.answers, text) for text in evidence):
            answer = f"{example.answers[0]!r:.60}"
            yield "answer_not_in_evidence", f"answer {answer} stands in none of its passages"


def passage_warnings(passage: Passage) -> Iterator[tuple[str, str]]:
    """As `warnings`, of a passage alone."""
    if found := _CONTROL.search(markup.passage_text(passage)):
        yield "control_text", f"{found[0]!r} in the text is plain characters"


def _check_support(example: Example, passages: Passages) -> None:
    if not example.support:
        return
    count, expected = len(example.support), len(example.evidence)
    if count != expected:
        raise BadRow("bad_support", f"'support' has {count} spans for {expected} evidence ids")
    for id, span in zip(example.evidence, example.support, strict=True):
        if span is None:
            continue
        text = passages[id].text
        if not 0 <= span[0] < span[1] <= len(text):
            where = f"passage {id!r} of {len(text)}"
            raise BadRow("bad_support", f"support {span} lies outside {where}")
        if not text[slice(*span)].strip():
            raise BadRow("empty_text", f"support {span} of passage {id!r} covers only blanks")


def _check_output(example: Example, passages: Passages) -> None:
    """The output inserts the evidence, all of it, in its order; a passage may come again."""
    inserted = list(dict.fromkeys(markup.inserted_ids(example.output)))
    evidence = list(dict.fromkeys(example.evidence))
    for id in inserted:
        if id not in passages:
            raise BadRow("missing_passage", f"output's [Ret:{id}] has no passage")
        if id not in evidence:
            raise BadRow("marker_without_evidence", f"output's [Ret:{id}] is not in evidence")
    for id in evidence:
        if id not in inserted:
            raise BadRow("evidence_without_marker", f"output has no [Ret:{id}] for this evidence")
    if RET in example.output:
        raise BadRow("bad_marker", "output has a [Ret] without a passage; write [Ret:ID]")
    if inserted != evidence:
        raise BadRow("order_mismatch", f"output inserts {inserted}, evidence is {evidence}")
    try:
        pieces = markup.pieces(example, passages)
    except UserError as error:
        raise BadRow("bad_marker", str(error)) from None
    for piece, span in itertools.pairwise(pieces):
        if piece.control == "cs" and not span.text.strip():
            raise BadRow("empty_text", "a [Ret:ID] of the output grounds no text: write its span")
