"""A few held-out questions, answered with retrieval, as report.py shows them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from cosup_jax import cited
from cosup_jax.config import Config
from cosup_jax.data import markup
from cosup_jax.data.tokenizer import Tokenizer
from cosup_jax.decode import Decoder
from cosup_jax.evaluation.text import answer_present
from cosup_jax.held_out import Evaluator, HeldOut
from cosup_jax.retrieve import Search
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
    shown, each = [], -(-config.generate.examples // len(sets))
    decoder = Decoder(mesh, towers, config, tokenizer, most=each)
    for held_out in sets:
        questions, passages = held_out.examples, held_out.corpus.passages
        rng = np.random.default_rng(config.seed)
        chosen = [questions[i] for i in rng.permutation(len(questions))[:each]]
        prompts = [markup.prompt(example, tokenizer) for example in chosen]
        search = Search(passages, evaluator.vectors(params, held_out))
        for example, answer in zip(chosen, decoder.answers(params, prompts, search), strict=True):
            row = cited.record(example, answer, passages, tokenizer, config.data.max_ctx_tokens)
            right = float(answer_present(row["text"], example.answers))
            about = {"set": held_out.name, "evidence": list(example.evidence), "correct": right}
            shown.append(row | about)
    return shown[: config.generate.examples]
