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
    """An answer record, as report.py shows it."""
    passages = held_out.corpus.passages
    numbers = {row: n for n, row in enumerate(dict.fromkeys(r for r, _ in answer.retrieved), 1)}
    decode = lambda part: tokenizer.decode(part.tokens, skip_control=True)
    parts = [(decode(part), part.passage) for part in answer.parts]
    cited = lambda text, row: text if row is None else f"{text}[{numbers[row]}]"
    sources = [(number, passages[row]) for row, number in numbers.items()]
    return {
        "set": held_out.name,
        "id": example.id,
        "question": example.question,
        "answers": list(example.answers),
        "evidence": list(example.evidence),
        "output": "".join(cited(*part) for part in parts),
        "spans": [
            {"text": text, "passage": passages[row].id, "number": numbers[row]}
            for text, row in parts
            if row is not None
        ],
        "retrieved": [
            {"id": passages[row].id, "score": score, "number": numbers[row]}
            for row, score in answer.retrieved
        ],
        "sources": [
            {"number": number, "id": p.id, "title": p.title, "text": p.text}
            for number, p in sources
        ],
        "correct": float(answer_present("".join(text for text, _ in parts), example.answers)),
    }
