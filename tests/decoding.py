"""Answers as one would write them by hand: one question, no cache, all of the text each time."""

import jax
import numpy as np

from cosup_jax.answer.decode import Budget
from cosup_jax.data import markup
from cosup_jax.towers import similarity_space


class ByHand:
    """Greedy; slow on purpose. `gaps` holds, of each question, how little the best token was ahead
    of the second best where that was least."""

    def __init__(self, gen, params, config, tokenizer, search, budgets=None):
        self._config, self._tokenizer, self._search = config, tokenizer, search
        own = Budget(config.generate.max_tokens, config.generate.max_retrievals)
        self._budget = budgets.__getitem__ if budgets else lambda question: own
        self._slots, self.gaps = config.generate.context_tokens, {}
        positions = np.arange(self._slots)[None]

        @jax.jit
        def look(tokens, length):
            real = (positions < length).astype(np.int32)
            hidden = gen.hidden(params, tokens, real, positions)[0, length - 1]
            return gen.logits(params, hidden), similarity_space(hidden, config)

        def last(tokens):
            padded = np.zeros((1, self._slots), np.int32)
            padded[0, : len(tokens)] = tokens
            return map(np.asarray, look(padded, len(tokens)))

        self._last = last

    def answer(self, question: int, prompt: list[int]):
        """(tokens behind the prompt, passages at each [Ret], tokens written, why it stopped)."""
        settings, t = self._config.generate, self._tokenizer
        self._gap = np.inf
        most, budget = self._budget(question)
        tokens, found, written, asked, cited = list(prompt), [], 0, 0, None
        if settings.retrieve_first and budget:
            tokens, asked = [*tokens, t.ret], 1
        if len(tokens) >= self._slots:
            return [], [], 0, "prompt"
        done = lambda why: (tokens[len(prompt) :], found, written, why)
        while True:
            self.gaps[question] = self._gap
            logits, query = self._last(tokens)
            if tokens[-1] == t.ret:
                turns, k = [len(found)], settings.passages
                (best,) = self._search(query[None], [question], turns, k, [tokens])
                passages = [self._search.passages[one.row] for one in best]
                put_in = markup.insertion(passages, t, self._config.data.max_ctx_tokens)
                if len(tokens) + len(put_in) >= self._slots:
                    return done("context")
                found.append(best)
                tokens += put_in
                cited = len(tokens) - 1
                continue
            token = self._choose(logits, cited is not None, asked < budget)
            tokens.append(token)
            asked += token == t.ret
            written += token not in (t.ret, t.ce)
            if token == t.ce:
                if not settings.keep_passages:
                    start = len(tokens) - 1 - tokens[::-1].index(t.ret)
                    tokens = tokens[:start] + tokens[cited:]
                cited = None
            if token == t.eos:
                return done("eos")
            if written == most:
                return done("tokens")
            if len(tokens) == self._slots:
                return done("context")

    def _choose(self, logits, spanning: bool, may_ask: bool) -> int:
        t, settings = self._tokenizer, self._config.generate
        allowed = {*range(t.vocab_size)} - t.control
        allowed |= {t.ce} if spanning else {t.eos} | ({t.ret} if may_ask else set())
        ids = np.array(sorted(allowed))
        if settings.ret_threshold and t.ret in allowed:
            share = np.exp(logits[ids] - logits[ids].max())
            if share[ids == t.ret] / share.sum() >= settings.ret_threshold:
                return t.ret
        if settings.ret_threshold:
            ids = ids[ids != t.ret]
        second, first = np.sort(logits[ids])[-2:]
        self._gap = min(self._gap, first - second)
        return int(ids[np.argmax(logits[ids])])
