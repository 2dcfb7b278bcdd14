"""The training text: an example as pieces, and pieces as token ids with a role each.

    {instruction}## Input:\\n\\n{question}## Output:\\n\\n
    [Ret]{title :: text}[Cs]{span}[Ce]        once per evidence passage
    {answer}{eos}

Every piece is tokenised by itself, so that control tokens are ids and an inserted passage has the
same tokens in training and in generation.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cosup_jax.data.schema import Example, Passage
from cosup_jax.data.tokenizer import Tokenizer
from cosup_jax.errors import UserError

VERSION = 4  # raise it whenever the same example gives other pieces

# Roles of a token, uint8. EVIDENCE, from the token after [Ret] to [Cs], is a target unless
# loss.mask_evidence.
PROMPT, TARGET, EVIDENCE = 0, 1, 2

INSTRUCTION = "Answer the question.\n\n"
INSTRUCTIONS = {
    "slot_filling": "Fill the slot.\n\n",
    "fact_check": "Judge the claim.\n\n",
    "dialog": "Reply.\n\n",
    "long_form": "Explain.\n\n",
}

# Letters of Latin, Greek and Cyrillic, and digits. In other scripts an answer may stand within a
# word: there are none, or a particle or an article is written together with the answer.
_WORD = "[0-9A-Za-z\u00c0-\u024f\u0370-\u03ff\u0400-\u04ff\u1e00-\u1fff]"
_INSERTION = re.compile(r"\[Ret:([^\]]*)\]")


class Piece(NamedTuple):
    """One stretch of the training text: plain text, a passage, or one control token."""

    role: int
    text: str = ""
    control: str = ""  # attribute of Tokenizer: ret, cs, ce or eos; then `text` is empty
    passage: str = ""  # id of the passage that `text` is; its tokens are cut to a limit


class Marked(NamedTuple):
    """One example as Gen reads it."""

    tokens: np.ndarray  # int32 [n]
    roles: np.ndarray  # uint8 [n]
    ret_positions: np.ndarray  # int32 [rets], indices into tokens
    evidence: list[str]  # passage id of each [Ret]


def passage_text(passage: Passage) -> str:
    """What both towers read of a passage."""
    return f"{passage.title} :: {passage.text}" if passage.title else passage.text


def inserted_ids(output: str) -> list[str]:
    """Passage ids of the [Ret:ID] in an example's output, in order."""
    return _INSERTION.findall(output)


def prompt_text(example: Example) -> str:
    """Everything up to the output."""
    instruction = INSTRUCTIONS.get(example.task, INSTRUCTION)
    return f"{instruction}## Input:\n\n{example.question}## Output:\n\n"


def prompt(example: Example, tokenizer: Tokenizer) -> list[int]:
    """Ids from which generation starts: bos where the tokenizer has one, then the prompt."""
    return list(tokenizer.prefix) + tokenizer.encode(prompt_text(example))


def insertion(
    passages: Sequence[Passage], tokenizer: Tokenizer, max_passage_tokens: int
) -> list[int]:
    """Ids that follow a generated [Ret]: the passages, each cut, a line break between, and [Cs]."""
    joined = [*_text_ids(passages[0], tokenizer, max_passage_tokens)]
    for passage in passages[1:]:
        joined += [*tokenizer.encode("\n"), *_text_ids(passage, tokenizer, max_passage_tokens)]
    return [*joined, tokenizer.cs]


@functools.lru_cache(maxsize=1024)  # a passage is read for many questions, and shown with each
def _text_ids(passage: Passage, tokenizer: Tokenizer, most: int) -> tuple[int, ...]:
    return tuple(tokenizer.encode(passage_text(passage))[:most])


def ctx_tokens(
    passages: Iterable[Passage],
    tokenizer: Tokenizer,
    pooling: str,
    max_ctx_tokens: int,
    prompt: str = "",
) -> list[tuple[np.ndarray, int]]:
    """What Ctx reads of each passage, int32, at most `max_ctx_tokens` long, and how many are cut.

    The vector is read at the last token: under pooling "eos" an eos, under "token" [Emb] and under
    "pad" a padding token, which the cut never removes. Else a text ends as the tokenizer itself
    ends one: "last" reads the last token of that, "cls" the first and "mean" all.
    """
    head, tail = list(tokenizer.prefix), ctx_tail(tokenizer, pooling)
    room = ctx_room(tokenizer, pooling, max_ctx_tokens)
    encoded = tokenizer.encode_batch([prompt + passage_text(passage) for passage in passages])
    return [
        (np.array(head + ids[:room] + tail, np.int32), max(0, len(ids) - room)) for ids in encoded
    ]


def ctx_room(tokenizer: Tokenizer, pooling: str, max_ctx_tokens: int) -> int:
    """Tokens that Ctx has for prompt and passage. Raises UserError if that is none."""
    control = len(tokenizer.prefix) + len(ctx_tail(tokenizer, pooling))
    if control >= max_ctx_tokens:
        raise UserError(
            f"config.data.max_ctx_tokens={max_ctx_tokens} leaves no room for a passage beside "
            f"{control} control tokens; raise it"
        )
    return max_ctx_tokens - control


def ctx_tail(tokenizer: Tokenizer, pooling: str) -> list[int]:
    """Ids that Ctx reads after a passage."""
    own = tokenizer.suffix
    tails = {"last": own, "cls": own, "mean": own}
    tails |= {"eos": [tokenizer.eos], "token": [tokenizer.emb], "pad": [tokenizer.pad]}
    return list(tails[pooling])


def encode(
    examples: Sequence[Sequence[Piece]], tokenizer: Tokenizer, max_passage_tokens: int
) -> list[Marked]:
    """Token ids of examples given as pieces; each distinct text is tokenised once."""
    texts = list(dict.fromkeys(p.text for pieces in examples for p in pieces if not p.control))
    ids = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    marked = []
    for pieces in examples:
        tokens = list(tokenizer.prefix)
        roles = [PROMPT] * len(tokens)
        ret_positions, evidence = [], []
        for piece in pieces:
            new = [getattr(tokenizer, piece.control)] if piece.control else ids[piece.text]
            if piece.control == "ret":
                ret_positions.append(len(tokens))
            if piece.passage:
                evidence.append(piece.passage)
                new = new[:max_passage_tokens]
            tokens = tokens + new
            roles += [piece.role] * len(new)
        marked.append(
            Marked(
                np.array(tokens, np.int32),
                np.array(roles, np.uint8),
                np.array(ret_positions, np.int32),
                evidence,
            )
        )
    return marked


def pieces(
    example: Example, passages: Mapping[str, Passage], with_evidence: bool = True
) -> list[Piece]:
    """The training text of an example, piece by piece; without evidence on request.

    Raises UserError where the example has neither answer nor output, or `output` is malformed.
    """
    if example.output:
        body = _output_pieces(example, passages, with_evidence)
    elif with_evidence and example.evidence:
        body = _evidence_pieces(example, passages)
    else:
        body = [Piece(TARGET, _answer(example))]
    return [Piece(PROMPT, prompt_text(example)), *body, Piece(TARGET, control="eos")]


def long_answer(example: Example, passages: Mapping[str, Passage]) -> str:
    """`long_answer`, or all that an output without short answers says; "" where neither is."""
    if example.long_answer or example.answers:
        return example.long_answer
    said = _output_pieces(example, passages, with_evidence=False)
    return "".join(piece.text for piece in said).strip()


def _evidence_pieces(example: Example, passages: Mapping[str, Passage]) -> list[Piece]:
    evidence = [passages[id] for id in example.evidence]
    look = len(evidence) == 1 and example.kind != "label"
    if look and (span := find_answer(_answers(example), evidence[0].text)):
        return [*_inserted(evidence[0]), Piece(TARGET, span), Piece(TARGET, control="ce")]
    body = []
    for passage, support in zip(evidence, example.support or [None] * len(evidence), strict=True):
        span = passage.text[slice(*support)] if support else passage.text
        body += [*_inserted(passage), Piece(TARGET, span), Piece(TARGET, control="ce")]
    return [*body, Piece(TARGET, _answer(example))]


def _output_pieces(
    example: Example, passages: Mapping[str, Passage], with_evidence: bool
) -> list[Piece]:
    """`text[Ret:ID]span[Ce]text`; a [Cs] may follow the insertion, and the span ends with the
    stretch where no [Ce] does."""
    first, *rest = _INSERTION.split(example.output)
    body = [Piece(TARGET, first)]
    for id, stretch in zip(rest[::2], rest[1::2], strict=True):
        if id not in passages:
            raise UserError(f"example {example.id!r}: output inserts unknown passage {id!r}")
        span, _, after = stretch.removeprefix("[Cs]").partition("[Ce]")
        if with_evidence:
            body += [*_inserted(passages[id]), Piece(TARGET, span), Piece(TARGET, control="ce")]
            body.append(Piece(TARGET, after))
        else:
            # What [Ce] kept apart.
            blank = " " if span and not span[-1].isspace() and after[:1].isalnum() else ""
            body.append(Piece(TARGET, span + blank + after))
    if any(mark in piece.text for piece in body for mark in ("[Cs]", "[Ce]") if not piece.passage):
        raise UserError(
            f"example {example.id!r}: output has a [Cs] or [Ce] that belongs to no [Ret:ID]"
        )
    return [piece for piece in body if piece.text or piece.control]


def _inserted(passage: Passage) -> list[Piece]:
    return [
        Piece(TARGET, control="ret"),
        Piece(EVIDENCE, passage_text(passage), passage=passage.id),
        Piece(EVIDENCE, control="cs"),
    ]


def find_answer(answers: Sequence[str], text: str) -> str:
    """The first answer that stands in a text as whole words, as the text spells it, or "".

    "no" does not stand in "north"; in scripts other than those of `_WORD` it may stand anywhere. An
    answer in other letters of case counts where none stands there as it is; "US" is never "us".
    """
    lower = text.lower()
    rest = [answer for answer in answers if answer.lower() in lower and not answer.isupper()]
    tries = [(answer, re.NOFLAG) for answer in answers if answer in text]
    tries += [(answer, re.IGNORECASE) for answer in rest]
    found = (_whole_words(*one).search(text) for one in tries)
    return next((match[0] for match in found if match), "")


def replace_answer(answer: str, other: str, text: str) -> str:
    """The text with `other` wherever `answer` stands, as it is spelt, as whole words."""
    return _whole_words(answer, re.NOFLAG).sub(lambda _: other, text)


def _whole_words(answer: str, flags: re.RegexFlag) -> re.Pattern:
    before = f"(?<!{_WORD})" if re.match(_WORD, answer) else ""
    after = f"(?!{_WORD})" if re.match(_WORD, answer[-1:]) else ""
    return re.compile(before + re.escape(answer) + after, flags)


def _answers(example: Example) -> tuple[str, ...]:
    return (example.long_answer,) if example.long_answer else example.answers


def _answer(example: Example) -> str:
    answers = _answers(example)
    if not answers:
        raise UserError(f"example {example.id!r} has neither an answer nor an output")
    return answers[0]
