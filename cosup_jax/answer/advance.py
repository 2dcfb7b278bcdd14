"""Gen writes many answers at once, token by token, on the device: pure functions of a batch.

`write` gives every running row its next token until some rows wait for a passage or have ended;
`fill` reads a chunk at a time what was put into rows meanwhile. What was read stays in a cache of
keys and values. A row depends on its own question and the seed, never on the other rows.

B rows, S tokens of context, V padded vocabulary, D features, P rows that are filled together,
C tokens of a chunk.
"""

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cosup_jax.config import Config
from cosup_jax.data.tokenizer import Tokenizer
from cosup_jax.model import attention
from cosup_jax.model.transformer import Transformer
from cosup_jax.towers import similarity_space

TURN = 64  # tokens, after which the host is asked: a notice to stop must not wait for an answer


class Status(enum.IntEnum):
    """What a row is doing; from EOS on it has ended, for that reason."""

    RUNNING = 0
    WAITING = 1  # at [Ret], for a passage
    VACANT = 2
    EOS = 3
    TOKENS = 4  # its budget is spent
    CONTEXT = 5  # no room for the next token, or for a passage


class Rows(NamedTuple):
    """The batch between two runs, small enough to travel to the host.

    Row b's text is tokens_BxS[b, :known_B[b]], of which the cache holds the first cached_B[b].
    """

    tokens_BxS: Any  # int32: prompt, passages and answer
    known_B: Any  # int32
    cached_B: Any  # int32
    status_B: Any  # int32, of Status
    spanning_B: Any  # bool, between [Cs] and [Ce]
    ret_B: Any  # int32, position of the last [Ret]
    cs_B: Any  # int32, position of the last [Cs]
    tokens_left_B: Any  # int32, that it may still write, markers not counted
    retrievals_left_B: Any  # int32, [Ret]s that it may still write
    stream_B: Any  # uint32, of random numbers
    drawn_B: Any  # int32, tokens chosen so far
    query_BxD: Any  # float32, Gen's vector at the [Ret] at which it waits


def vacant(rows: int, slots: int, width: int) -> Rows:
    """A batch without questions, in NumPy."""
    zeros = lambda *shape, dtype=np.int32: np.zeros(shape, dtype)
    return Rows(
        tokens_BxS=zeros(rows, slots),
        known_B=zeros(rows),
        cached_B=zeros(rows),
        status_B=np.full(rows, Status.VACANT, np.int32),
        spanning_B=zeros(rows, dtype=bool),
        ret_B=zeros(rows),
        cs_B=zeros(rows),
        tokens_left_B=zeros(rows),
        retrievals_left_B=zeros(rows),
        stream_B=zeros(rows, dtype=np.uint32),
        drawn_B=zeros(rows),
        query_BxD=zeros(rows, width, dtype=np.float32),
    )


class Marks(NamedTuple):
    """Token ids that steer, and which others Gen may write."""

    ret: int
    cs: int
    ce: int
    eos: int
    text_V: np.ndarray  # bool: no control token

    @classmethod
    def of(cls, tokenizer: Tokenizer, padded_vocab: int) -> "Marks":
        text_V = np.arange(padded_vocab) < tokenizer.vocab_size
        text_V[list(tokenizer.control)] = False
        return cls(tokenizer.ret, tokenizer.cs, tokenizer.ce, tokenizer.eos, text_V)


def write(
    params: dict,
    cache: dict,
    rows: Rows,
    fewest,
    patience,
    gen: Transformer,
    marks: Marks,
    config: Config,
) -> tuple[dict, Rows]:
    """Tokens for all running rows, until `fewest` run, `patience` wait or one has no slot left, and
    at most TURN for each."""

    def goes_on(carry):
        cache, rows, turn = carry
        running_B, waiting_B = (rows.status_B == s for s in (Status.RUNNING, Status.WAITING))
        fits = jnp.max(jnp.where(running_B, rows.cached_B, 0)) < attention.slots(cache)
        return (
            (jnp.sum(running_B) > fewest) & (jnp.sum(waiting_B) < patience) & fits & (turn < TURN)
        )

    step = lambda carry: (*advance(params, *carry[:2], gen, marks, config), carry[2] + 1)
    return jax.lax.while_loop(goes_on, step, (cache, rows, jnp.int32(0)))[:2]


def advance(
    params: dict, cache: dict, rows: Rows, gen: Transformer, marks: Marks, config: Config
) -> tuple[dict, Rows]:
    """Each running row reads one token and, if that is its last one, chooses the next.

    A row whose last token is [Ret] waits instead, and leaves its query vector.
    """
    token_B = _at(rows.tokens_BxS, rows.cached_B)
    hidden_Bx1xD, cache = gen.extend(params, cache, token_B[:, None], rows.cached_B)
    hidden_BxD = hidden_Bx1xD[:, 0]
    running_B = rows.status_B == Status.RUNNING
    cached_B = rows.cached_B + running_B
    current_B = running_B & (cached_B == rows.known_B)
    asks_B = current_B & (token_B == marks.ret)
    query_BxD = similarity_space(hidden_BxD, config)
    rows = rows._replace(
        cached_B=cached_B,
        status_B=jnp.where(asks_B, Status.WAITING, rows.status_B),
        query_BxD=jnp.where(asks_B[:, None], query_BxD, rows.query_BxD),
    )
    next_B = _choose(gen.next_logits(params, hidden_BxD), rows, marks, config)
    return cache, _append(rows, next_B, current_B & ~asks_B, marks, config)


def fill(
    params: dict, cache: dict, tokens_PxS, cached_P, known_P, gen: Transformer, chunk: int
) -> dict:
    """A cache of P rows with all but the last of their tokens in it; it has room for them."""

    def step(carry):
        cache, cached_P = carry
        at_PxC = cached_P[:, None] + jnp.arange(chunk)[None]
        _, cache = gen.extend(params, cache, _at(tokens_PxS, at_PxC), cached_P)
        return cache, jnp.minimum(cached_P + chunk, known_P - 1)

    return jax.lax.while_loop(lambda c: jnp.any(c[1] < known_P - 1), step, (cache, cached_P))[0]


def _choose(logits_VxB, rows: Rows, marks: Marks, config: Config) -> jax.Array:
    """[B] the next token, out of those that may stand there."""
    settings, steering = config.generate, jnp.array([marks.ret, marks.ce, marks.eos])
    plain_B = ~rows.spanning_B
    may_3xB = jnp.stack([plain_B & (rows.retrievals_left_B > 0), rows.spanning_B, plain_B])
    steering_3xB = jnp.where(may_3xB, logits_VxB[steering], -jnp.inf)
    logits_VxB = jnp.where(marks.text_V[:, None], logits_VxB, -jnp.inf)
    logits_VxB = logits_VxB.at[steering].set(steering_3xB)
    if not settings.ret_threshold:
        return _draw(logits_VxB, rows, config)
    likely_B = jax.nn.softmax(logits_VxB, axis=0)[marks.ret] >= settings.ret_threshold
    other_VxB = logits_VxB.at[marks.ret].set(-jnp.inf)
    return jnp.where(likely_B, marks.ret, _draw(other_VxB, rows, config))


def _draw(logits_VxB, rows: Rows, config: Config) -> jax.Array:
    """[B] the likeliest token, or one drawn from a row's own stream of random numbers."""
    settings = config.generate
    if not settings.temperature:  # argmax takes eight times as long on a CPU
        token_Vx1, best_1xB = jnp.arange(len(logits_VxB))[:, None], jnp.max(logits_VxB, 0)[None]
        likeliest_VxB = (logits_VxB == best_1xB) | jnp.isnan(best_1xB)  # any, where none is
        return jnp.min(jnp.where(likeliest_VxB, token_Vx1, len(logits_VxB)), axis=0)
    logits_BxV = logits_VxB.T / settings.temperature
    if settings.top_p < 1:
        falling_BxV = -jnp.sort(-logits_BxV)
        share_BxV = jax.nn.softmax(falling_BxV)
        kept_BxV = jnp.cumsum(share_BxV, axis=-1) - share_BxV < settings.top_p
        least_B = jnp.min(jnp.where(kept_BxV, falling_BxV, jnp.inf), axis=-1)
        logits_BxV = jnp.where(logits_BxV >= least_B[:, None], logits_BxV, -jnp.inf)

    def draw(stream, drawn, logits_V):
        key = jax.random.fold_in(jax.random.key(settings.seed), stream)
        return jax.random.categorical(jax.random.fold_in(key, drawn), logits_V)

    return jax.vmap(draw)(rows.stream_B, rows.drawn_B, logits_BxV)


def _append(rows: Rows, next_B, writes_B, marks: Marks, config: Config) -> Rows:
    """`next_B` behind the text of rows that write; at [Ce] the passage goes, where that is asked.

    Then everything from [Ret] on is forgotten and [Cs] span [Ce] stands in its place, to be read.
    """
    B, S = rows.tokens_BxS.shape
    known_B, cached_B = rows.known_B, rows.cached_B
    where_B = jnp.where(writes_B, known_B, S)
    tokens_BxS = rows.tokens_BxS.at[jnp.arange(B), where_B].set(next_B, mode="drop")
    known_B += writes_B
    closes_B = writes_B & (next_B == marks.ce)
    if not config.generate.keep_passages:
        gone_B = jnp.where(closes_B, rows.cs_B - rows.ret_B, 0)
        slot_1xS = jnp.arange(S)[None]
        shift_BxS = jnp.where(slot_1xS >= rows.ret_B[:, None], gone_B[:, None], 0)
        tokens_BxS = _at(tokens_BxS, slot_1xS + shift_BxS)
        known_B -= gone_B
        cached_B = jnp.where(closes_B, rows.ret_B, cached_B)
    asks_B, ends_B = writes_B & (next_B == marks.ret), writes_B & (next_B == marks.eos)
    tokens_left_B = rows.tokens_left_B - (writes_B & ~asks_B & ~closes_B)
    status_B = jnp.where(writes_B & (known_B == S), Status.CONTEXT, rows.status_B)
    status_B = jnp.where(writes_B & (tokens_left_B == 0), Status.TOKENS, status_B)
    return rows._replace(
        tokens_BxS=tokens_BxS,
        known_B=known_B,
        cached_B=cached_B,
        status_B=jnp.where(ends_B, Status.EOS, status_B),
        spanning_B=rows.spanning_B & ~closes_B,
        ret_B=jnp.where(asks_B, rows.known_B, rows.ret_B),
        tokens_left_B=tokens_left_B,
        retrievals_left_B=rows.retrievals_left_B - asks_B,
        drawn_B=rows.drawn_B + writes_B,
    )


def _at(tokens_BxS: jax.Array, positions: jax.Array) -> jax.Array:
    """Each row's tokens at positions [B] or [B, n]; beyond the last, the last."""
    if positions.ndim == 1:
        return _at(tokens_BxS, positions[:, None])[:, 0]
    positions = jnp.minimum(positions, tokens_BxS.shape[1] - 1)
    return jnp.take_along_axis(tokens_BxS, positions, axis=1)
