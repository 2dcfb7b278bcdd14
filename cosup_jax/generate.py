"""Answers with citations: Gen writes, and at `[Ret]` the nearest passage is inserted.

Greedy, a handful of questions at once, the whole prefix read again for every token.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cosup_jax import index, sharding
from cosup_jax.config import Config
from cosup_jax.towers import Towers, similarity_space


class Part(NamedTuple):
    """A stretch of an answer: plain text, or a span grounded in a retrieved passage."""

    tokens: list[int]
    passage: int | None  # row of the corpus; None = not grounded


@dataclasses.dataclass
class Answer:
    """What was written, and what was retrieved on the way, tracked by corpus row."""

    parts: list[Part] = dataclasses.field(default_factory=list)
    retrieved: list[tuple[int, float]] = dataclasses.field(default_factory=list)  # row, score
    finished: bool = False  # False: the token budget ran out


class Marks(NamedTuple):
    """Token ids that steer decoding."""

    ret: int
    cs: int
    ce: int
    eos: int


class Generator:
    """Compiled once for a number of questions; parameters are arguments."""

    def __init__(self, mesh: Mesh, towers: Towers, config: Config, marks: Marks):
        self._mesh, self._marks, self._budget = mesh, marks, config.generate.max_tokens

        def look(params, tokens_BxT, last_B):
            T = tokens_BxT.shape[1]
            positions_BxT = jnp.broadcast_to(jnp.arange(T), tokens_BxT.shape)
            segments_BxT = (positions_BxT <= last_B[:, None]).astype(jnp.int32)
            hidden_BxTxD = towers.gen.hidden(params["gen"], tokens_BxT, segments_BxT, positions_BxT)
            hidden_BxD = jnp.take_along_axis(hidden_BxTxD, last_B[:, None, None], axis=1)[:, 0]
            logits_BxV = towers.gen.logits(params["gen"], hidden_BxD)
            return jnp.argmax(logits_BxV, axis=-1), similarity_space(hidden_BxD, config)

        self._look = jax.jit(look, out_shardings=sharding.replicated(mesh))

    def answer(
        self,
        params: dict,
        prompts: Sequence[Sequence[int]],
        corpus_NxD: np.ndarray,
        insertion: Callable[[int], list[int]],
    ) -> list[Answer]:
        """One Answer per prompt.

        Args:
          params: of the train state.
          prompts: token ids up to and including `## Output:`.
          corpus_NxD: passage vectors.
          insertion: corpus row -> token ids of its passage as Gen reads it, and `[Cs]`.
        """
        writers = [_Writer(list(prompt), self._marks, self._budget) for prompt in prompts]
        tokens_BxT = np.zeros((len(writers), self._budget), np.int32)
        while not all(writer.done for writer in writers):
            last_B = np.zeros(len(writers), np.int32)
            for row, writer in enumerate(writers):
                if not writer.done:  # a prompt beyond the budget never was anything else
                    tokens_BxT[row, : len(writer.tokens)] = writer.tokens
                    last_B[row] = len(writer.tokens) - 1
            with jax.set_mesh(self._mesh):
                next_B, query_BxD = jax.device_get(self._look(params, tokens_BxT, last_B))
            waiting = [i for i, w in enumerate(writers) if w.waiting and not w.done]
            if waiting:
                scores, rows = jax.device_get(index.search(query_BxD, corpus_NxD, 1))
            for i, writer in enumerate(writers):
                if writer.done:
                    continue
                if i in waiting:
                    row = int(rows[i, 0])
                    writer.insert(row, float(scores[i, 0]), insertion(row))
                else:
                    writer.write(int(next_B[i]))
        return [writer.answer for writer in writers]


class _Writer:
    """One question: its tokens so far, and the answer as it grows."""

    def __init__(self, prompt: list[int], marks: Marks, budget: int):
        self.tokens, self.answer = prompt, Answer()
        self.done = len(prompt) >= budget
        self._marks, self._budget = marks, budget
        self._passage: int | None = None  # set between [Cs] and [Ce]

    @property
    def waiting(self) -> bool:
        """The last token is `[Ret]`: a passage comes next."""
        return self.tokens[-1] == self._marks.ret

    def write(self, token: int) -> None:
        """Takes the next token that Gen chose."""
        self.tokens.append(token)
        if token == self._marks.eos:
            self.answer.finished = self.done = True
        elif token == self._marks.ce:
            self._passage = None
        elif token not in (self._marks.ret, self._marks.cs):
            parts = self.answer.parts
            if not parts or parts[-1].passage != self._passage:
                parts.append(Part([], self._passage))
            parts[-1].tokens.append(token)
        self.done |= len(self.tokens) >= self._budget

    def insert(self, row: int, score: float, passage: list[int]) -> None:
        """Puts a retrieved passage and the forced `[Cs]` behind `[Ret]`, if they fit the budget."""
        if len(self.tokens) + len(passage) >= self._budget:
            self.done = True
            return
        self.answer.retrieved.append((row, score))
        self.tokens += passage
        self._passage = row
