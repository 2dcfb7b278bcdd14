"""A few held-out questions, answered with retrieval, as report.py shows them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from cosup_jax import generate
from cosup_jax.config import Config
from cosup_jax.data import markup
from cosup_jax.data.tokenizer import Tokenizer
from cosup_jax.evaluation.metrics import answer_present
from cosup_jax.held_out import Evaluator, HeldOut
from cosup_jax.towers import Towers


def example_answers(
    params: dict,
    sets: Sequence[HeldOut],
    evaluator: Evaluator,
    tokenizer: Tokenizer,
    mesh: Mesh,
    towers: Towers,
    config: Config,
) -> list[dict[str, Any]]:
    """generate.examples questions, drawn by the seed from all sets; `tokenizer` is Gen's."""
    if not config.generate.examples or not sets:
        return []
    marks = generate.Marks(tokenizer.ret, tokenizer.cs, tokenizer.ce, tokenizer.eos)
    writer = generate.Generator(mesh, towers, config, marks)
    shown, each = [], -(-config.generate.examples // len(sets))
    for held_out in sets:
        questions = held_out.examples
        rng = np.random.default_rng(config.seed)
        chosen = [questions[i] for i in rng.permutation(len(questions))[:each]]
        answers = writer.answer(
            params,
            [markup.prompt(example, tokenizer) for example in chosen],
            evaluator.vectors(params, held_out),
            lambda row, passages=held_out.corpus.passages: markup.insertion(
                passages[row], tokenizer, config.data.max_ctx_tokens
            ),
        )
        shown += map(lambda e, a, h=held_out: _shown(h, e, a, tokenizer), chosen, answers)
    return shown[: config.generate.examples]


def _shown(
    held_out: HeldOut, example, answer: generate.Answer, tokenizer: Tokenizer
) -> dict[str, Any]:
    numbers = {row: n for n, row in enumerate(dict.fromkeys(r for r, _ in answer.retrieved), 1)}
    scores = dict(answer.retrieved)
    decode = lambda part: tokenizer.decode(part.tokens, skip_control=True)
    parts = [(decode(part), part.passage) for part in answer.parts]
    text = "".join(text for text, _ in parts)
    sources = []
    for row, number in numbers.items():
        passage = held_out.corpus.passages[row]
        cited = [text for text, where in parts if where == row and text in passage.text and text]
        span = (passage.text.find(cited[0]), len(cited[0])) if cited else None
        sources.append(
            {
                "number": number,
                "id": passage.id,
                "title": passage.title,
                "text": passage.text,
                "score": scores[row],
                "span": span and [span[0], sum(span)],
                "gold": passage.id in example.evidence,
            }
        )
    return {
        "set": held_out.name,
        "question": example.question,
        "gold_answers": list(example.answers),
        "answer_parts": [
            {"text": text, "cite": None if row is None else numbers[row]} for text, row in parts
        ],
        "sources": sources,
        "right": answer_present(text, example.answers),
    }
