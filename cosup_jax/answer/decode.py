"""Answers to many questions at once, with retrieval where Gen asks for it.

The device writes (advance.py); this is the host's part: it searches for rows that wait, collects
those that have ended and starts the next questions in them. It is asked once a good part of the
batch has need of it, never for a single token.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from cosup_jax import sharding
from cosup_jax.answer import advance
from cosup_jax.answer.advance import Marks, Rows, Status, vacant
from cosup_jax.config import Config
from cosup_jax.data import markup
from cosup_jax.data.schema import Passage
from cosup_jax.data.tokenizer import Tokenizer
from cosup_jax.errors import UserError
from cosup_jax.model import attention
from cosup_jax.model.transformer import padded_vocab
from cosup_jax.runtime.notices import safepoint
from cosup_jax.towers import Towers

TOGETHER = 4  # a quarter of the batch is served at once


class Found(NamedTuple):
    """A passage that was retrieved."""

    row: int  # of the retriever's passages
    score: float | None  # None where nothing is scored


class Budget(NamedTuple):
    """Of one question."""

    tokens: int  # at least 1; as generate.max_tokens counts them
    retrievals: int


class Retriever(Protocol):
    """Where passages come from; retrieve.py has them all."""

    passages: Sequence[Passage]

    def limit(self, question: int) -> int:
        """How often this question may ask, beside the budget."""
        ...

    def __call__(
        self,
        query_QxD: np.ndarray,
        questions: Sequence[int],
        turns: Sequence[int],
        k: int,
        texts: Sequence[np.ndarray],
    ) -> list[list[Found]]:
        """For each query at least one passage and at most k, best first.

        Args:
          query_QxD: Gen's vectors.
          questions: of which prompt each is.
          turns: how often that question has asked before.
          texts: token ids of all that stands there, up to and including [Ret].
        """
        ...


class Answer(NamedTuple):
    """What was written behind a prompt."""

    tokens: list[int]  # passages included, unless they were dropped behind their spans
    retrieved: list[list[Found]]  # of each [Ret], best first
    written: int  # tokens of Gen's own choice, [Ret] and [Ce] not counted
    stopped: str  # eos | tokens | context | prompt (which left no room for an answer)


class Decoder:
    """Compiled once for a number of rows; parameters are arguments."""

    def __init__(
        self, mesh: Mesh, towers: Towers, config: Config, tokenizer: Tokenizer, most: int = 0
    ):
        """`most` questions at once instead of generate.batch_size; `tokenizer` is Gen's."""
        parts = sharding.row_parts(mesh)
        self.rows = -(-(most or config.generate.batch_size) // parts) * parts
        self.compiled: list[str] = []  # shapes, as they are traced
        self._mesh, self._config, self._tokenizer = mesh, config, tokenizer
        self._width = towers.gen.width
        gen, settings = towers.gen, config.generate
        marks = Marks.of(tokenizer, padded_vocab(gen.vocab_size))
        self._sizes = sorted({-(-self.rows // part // parts) * parts for part in (TOGETHER, 2, 1)})
        self._slots = sorted({-(-settings.context_tokens // part) for part in (4, 2, 1)})
        axes = ("layers", "batch", "kv_heads", None, None)
        placed = lambda cache: jax.tree.map(lambda x: sharding.constrain(x, *axes), cache)

        def write(params, cache, rows, *until):
            self.compiled.append(f"write {len(rows.status_B)} x 1 of {attention.slots(cache)}")
            cache, rows = advance.write(params, cache, rows, *until, gen, marks, config)
            return placed(cache), rows

        def fill(params, cache, *rows):
            slots = attention.slots(cache)
            self.compiled.append(f"fill {len(rows[0])} x {settings.chunk_tokens} of {slots}")
            return placed(advance.fill(params, cache, *rows, gen, settings.chunk_tokens))

        self._unstack = jax.jit(gen.unstack)  # once, not in every call of the others
        self._empty = jax.jit(lambda *shape: placed(gen.cache(*shape)), static_argnums=(0, 1))
        self._cut = jax.jit(lambda *args: placed(attention.cut(*args)), static_argnums=2)
        self._paste = jax.jit(lambda *args: placed(attention.paste(*args)), donate_argnums=0)
        shardings = (None, sharding.replicated(mesh))
        self._write = jax.jit(write, donate_argnums=1, out_shardings=shardings)
        self._fill = jax.jit(fill, donate_argnums=1)

    def answers(
        self,
        params: dict,
        prompts: Sequence[Sequence[int]],
        retriever: Retriever | None = None,
        budgets: Sequence[Budget] | None = None,
    ) -> Iterator[Answer]:
        """One Answer per prompt, in their order, each as soon as all before it are there.

        Args:
          params: of the train state.
          prompts: token ids up to and including `## Output:`.
          retriever: None: Gen has to do without [Ret].
          budgets: of each prompt; None: the config's for all.

        Raises:
          UserError: a model whose vectors are no numbers.
        """
        own = Budget(self._config.generate.max_tokens, self._config.generate.max_retrievals)
        budgets = budgets or [own] * len(prompts)
        batch = _Batch(self.rows, self._width, self._config, self._tokenizer, retriever, budgets)
        with jax.set_mesh(self._mesh):
            gen_params = self._unstack(params["gen"])
            cache = self._empty(self.rows, self._slots[0])
        waiting, finished, wanted = enumerate(prompts), {}, 0
        while wanted < len(prompts):
            safepoint()
            batch.insert()
            finished |= batch.collect()
            finished |= batch.load(waiting)
            with jax.set_mesh(self._mesh):
                cache = self._fit(cache, batch)
                cache = self._read(gen_params, cache, batch.rows)
                cache, rows = self._run(gen_params, cache, batch.rows)
            while wanted in finished:  # the device goes on meanwhile
                yield finished.pop(wanted)
                wanted += 1
            batch.rows = jax.tree.map(np.array, jax.device_get(rows))  # copies: we write

    def _fit(self, cache: dict, batch: "_Batch") -> dict:
        """The cache: fewer rows once no question is left for them, more slots for longer texts.

        Each step reads all of it, so it is not larger than the batch has need of.
        """
        vacant_B = batch.rows.status_B == Status.VACANT
        size = next(n for n in self._sizes if n >= np.count_nonzero(~vacant_B))
        if size < len(vacant_B):
            kept = np.argsort(vacant_B, kind="stable")[:size]
            batch.keep(kept)
            cache = self._cut(cache, kept, attention.slots(cache))
        longest = np.max(batch.rows.known_B, where=batch.rows.status_B != Status.VACANT, initial=0)
        slots = next(n for n in self._slots if n >= longest)
        if slots > attention.slots(cache):
            cache = self._paste(self._empty(size, slots), cache, np.arange(size))
        return cache

    def _read(self, gen_params: dict, cache: dict, rows: Rows) -> dict:
        """All that stands unread in running rows but for the last token; like with like.

        Only these rows are computed: a few with much to read do not make all others pay for it.
        """
        unread_B = np.where(rows.status_B == Status.RUNNING, rows.known_B - 1 - rows.cached_B, 0)
        todo = np.argsort(-unread_B, kind="stable")[: np.count_nonzero(unread_B)]
        together = self._sizes[0]
        for start in range(0, len(todo), together):
            group = todo[start : start + together]
            group_P = np.resize(group, together)  # of too few the first ones again
            slots = next(n for n in self._slots if n >= rows.known_B[group].max())
            own = self._cut(cache, group_P, slots)
            texts = (rows.tokens_BxS[group_P], rows.cached_B[group_P], rows.known_B[group_P])
            cache = self._paste(cache, self._fill(gen_params, own, *texts), group_P)
            rows.cached_B[group] = rows.known_B[group] - 1
        return cache

    def _run(self, gen_params: dict, cache: dict, rows: Rows) -> tuple[dict, Rows]:
        """Until a good part of the rows has need of the host, or a smaller batch would do."""
        size, running = len(rows.status_B), np.count_nonzero(rows.status_B == Status.RUNNING)
        if not running:
            return cache, rows
        served = max(1, running // TOGETHER)
        smaller = max((n for n in self._sizes if n < size), default=0)
        fewest = size - served if running == self.rows else smaller
        return self._write(gen_params, cache, rows, np.int32(fewest), np.int32(served))


class _Batch:
    """The rows of a batch between two runs, and whose they are."""

    def __init__(
        self,
        rows: int,
        width: int,
        config: Config,
        tokenizer: Tokenizer,
        retriever: Retriever | None,
        budgets: Sequence[Budget],
    ):
        self.rows = vacant(rows, config.generate.context_tokens, width)
        self._config, self._tokenizer, self._retriever = config, tokenizer, retriever
        self._budgets = budgets
        self._question, self._start = np.zeros(rows, int), np.zeros(rows, int)
        self._retrieved: list[list[list[Found]]] = [[] for _ in range(rows)]

    def keep(self, kept: np.ndarray) -> None:
        """Forgets all rows but these."""
        self.rows = jax.tree.map(lambda x: x[kept], self.rows)
        self._question, self._start = self._question[kept], self._start[kept]
        self._retrieved = [self._retrieved[row] for row in kept]

    def load(self, waiting: Iterator[tuple[int, Sequence[int]]]) -> dict[int, Answer]:
        """Starts questions in all vacant rows; those whose prompt is too long have their answer."""
        rows, settings, refused = self.rows, self._config.generate, {}
        for row in np.flatnonzero(rows.status_B == Status.VACANT):
            for question, prompt in waiting:
                limit = self._retriever.limit(question) if self._retriever else 0
                budget = self._budgets[question]
                retrievals = min(budget.retrievals, limit)
                forced = settings.retrieve_first and retrievals > 0
                text = [*prompt, *[self._tokenizer.ret] * forced]
                if len(text) >= settings.context_tokens:
                    refused[question] = Answer([], [], 0, "prompt")
                    continue
                rows.tokens_BxS[row, : len(text)] = text
                rows.known_B[row], rows.cached_B[row] = len(text), 0
                rows.status_B[row], rows.spanning_B[row] = Status.RUNNING, False
                rows.ret_B[row] = len(prompt)
                rows.tokens_left_B[row] = budget.tokens
                rows.retrievals_left_B[row] = retrievals - forced
                rows.stream_B[row] = zlib.crc32(np.array(prompt, np.int32).tobytes())
                rows.drawn_B[row] = 0
                self._question[row], self._start[row] = question, len(prompt)
                self._retrieved[row] = []
                break
        return refused

    def insert(self) -> None:
        """Puts passages and [Cs] behind the [Ret] of rows that wait; ends those without room."""
        rows = self.rows
        asking = np.flatnonzero(rows.status_B == Status.WAITING)
        if not len(asking):
            return
        turns = [len(self._retrieved[row]) for row in asking]
        k, questions = self._config.generate.passages, self._question[asking]
        if not np.isfinite(rows.query_BxD[asking]).all():
            raise UserError(
                "Gen's vectors at [Ret] are no numbers: this model has diverged; take another "
                "checkpoint"
            )
        texts = [rows.tokens_BxS[row, : rows.known_B[row]] for row in asking]
        answers = self._retriever(rows.query_BxD[asking], questions.tolist(), turns, k, texts)
        for row, found in zip(asking, answers, strict=True):
            if not found:  # no score is above another where vectors are NaN
                raise UserError(
                    "the vectors of passages are no numbers: this model has diverged; take another "
                    "checkpoint"
                )
            tokens, known = self._insertion(found), rows.known_B[row]
            if known + len(tokens) >= rows.tokens_BxS.shape[1]:
                rows.status_B[row] = Status.CONTEXT
                continue
            self._retrieved[row].append(found)
            rows.tokens_BxS[row, known : known + len(tokens)] = tokens
            rows.known_B[row] += len(tokens)
            rows.cs_B[row] = rows.known_B[row] - 1
            rows.status_B[row], rows.spanning_B[row] = Status.RUNNING, True

    def _insertion(self, found: Sequence[Found]) -> list[int]:
        passages = [self._retriever.passages[one.row] for one in found]
        longest = self._config.data.max_ctx_tokens
        return markup.insertion(passages, self._tokenizer, longest)

    def collect(self) -> dict[int, Answer]:
        """The answers of all rows that have ended, which are vacant then."""
        rows, found = self.rows, {}
        for row in np.flatnonzero(rows.status_B >= Status.EOS):
            tokens = rows.tokens_BxS[row, self._start[row] : rows.known_B[row]].tolist()
            question = int(self._question[row])
            written = self._budgets[question].tokens - int(rows.tokens_left_B[row])
            stopped = Status(rows.status_B[row]).name.lower()
            answer = Answer(tokens, self._retrieved[row], written, stopped)
            found[question] = answer
            rows.status_B[row] = Status.VACANT
        return found
