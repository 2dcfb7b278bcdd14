"""Does an answer come from the passage, or from Gen's parameters?

Log-likelihoods, teacher-forced, of answers to held-out questions: behind their passage, behind
none, and behind one that says otherwise, as in entity-based knowledge conflicts (arXiv 2109.05052):
wherever it says the answer, it says another question's answer of the same relation instead.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from cosup_jax import sharding
from cosup_jax.answer.advance import Marks
from cosup_jax.config import Config
from cosup_jax.data import markup
from cosup_jax.data.batch import batch_shape
from cosup_jax.data.pipeline import PackedPassages, pack_passages
from cosup_jax.data.schema import Example, Passage
from cosup_jax.data.storage import share_of
from cosup_jax.data.tokenizer import Tokenizer
from cosup_jax.held_out import HeldOut
from cosup_jax.model.transformer import Transformer, padded_vocab
from cosup_jax.runtime.notices import safepoint
from cosup_jax.search.encoder import to_mesh
from cosup_jax.studies import run as run_lib
from cosup_jax.studies.run import NUMBER, POSITIVE, SHARE, Gives, Metrics, Run, Scores, whole

GIVES: Gives = {
    r"answer_nats_(with|without)_evidence": POSITIVE,
    r"(original|swapped)/swap_over_answer_nats": NUMBER,
    r"(original|swapped)/(swap_wins|p_answer)": SHARE,
    r"questions|skipped/(no_span|not_in_text|in_title|no_other|too_long)": NUMBER,
}
CLOSED_BOOK_GIVES: Gives = {r"closed_book/answer_nats(_seen|_unseen)?": POSITIVE}
_QUESTIONS = 1000  # of each set, that `closed_book` asks


class Conflict(NamedTuple):
    """A question with its passage, and what that would be if another answer were right."""

    example: Example
    passage: Passage
    answer: str  # as the passage spells it
    swapped: Passage  # with `swap` in place of `answer`
    swap: str


class Text(NamedTuple):
    """Ends with an answer and the token that closes it: [Ce] behind a passage, else eos."""

    tokens: np.ndarray  # int32 [n]
    scored: int  # how many of the last are the answer's, the closing one included


def evidence(run: Run) -> Scores:
    """Of each question with one passage, which says its answer:

    answer_nats_with_evidence     -log p per token of [Cs] answer [Ce] behind the passage
    answer_nats_without_evidence  -log p per token of the answer and eos behind the bare question
    and for both PASSAGEs, `original` and `swapped`, over whole answers:
    PASSAGE/swap_over_answer_nats log p(swap) - log p(answer); negative: the answer is likelier
    PASSAGE/swap_wins             0 or 1, is it positive? On `swapped`: does Gen follow the passage?
    PASSAGE/p_answer              p(answer) / (p(answer) + p(swap)), in 0..1

    Probabilities are those among the tokens that decoding may choose from there: text, and the
    closing one, which counts as the answer's last. Of each set: `questions`, and
    `skipped/REASON`, how many of them have none of these; REASON is one of `conflicts`.
    """
    trained, found = run.trained, {}
    tokenizer, config = trained.tokenizers.gen, trained.config
    for part in run.sets:
        turned, skipped = conflicts(part, tokenizer, config)
        texts = [text for one in turned for text in texts_of(one, tokenizer, config)]
        nats = answer_nats(run, texts) if texts else np.zeros(0)
        scores = _scores(turned, nats.reshape(-1, 5), [text.scored for text in texts[::5]])
        counts = {f"skipped/{reason}": number for reason, number in skipped.items()}
        found[part.name] = whole(questions=len(part.examples), **counts) | scores
    return found


def closed_book(run: Run) -> Scores:
    """`closed_book/answer_nats`: -log p per token of the answer and eos behind the bare question,
    of each of a thousand questions of a set, however many passages they need; also _seen and
    _unseen, of those whose passages training reads, or not.

    The answer is the long one, else the first; a label (yes or no) is none that one knows, and what
    data.max_gen_tokens has no room for is left out. Probabilities are as `evidence` has them.
    """
    trained, found = run.trained, {}
    tokenizer, config = trained.tokenizers.gen, trained.config
    for part in run_lib.sets(trained, run.workdir, run.store, _QUESTIONS):
        asked: list[tuple[int, Text]] = []
        for question, example in enumerate(part.examples):
            if example.answers and example.kind != "label" and not example.output:
                said = example.long_answer or example.answers[0]
                text = text_of(example, None, said, tokenizer, config)
                if len(text.tokens) <= config.data.max_gen_tokens:
                    asked.append((question, text))
        nats = answer_nats(run, [text for _, text in asked]) if asked else ()
        of_set: Metrics = collections.defaultdict(dict)
        for (question, text), value in zip(asked, nats, strict=True):
            names = ["closed_book/answer_nats"]
            if (seen := part.evidence_seen(question)) is not None:
                names.append(f"{names[0]}_{'seen' if seen else 'unseen'}")
            for name in names:
                of_set[name][part.examples[question].id] = float(value) / text.scored
        found[part.name] = dict(of_set)
    return found


def _scores(turned: Sequence[Conflict], nats_Cx5: np.ndarray, tokens: Sequence[int]) -> Metrics:
    """Of each metric, of each question, by the nats of `texts_of`."""
    found: Metrics = collections.defaultdict(dict)
    for one, nats_5, count in zip(turned, nats_Cx5.tolist(), tokens, strict=True):
        id, (without, *original), swapped = one.example.id, nats_5[:3], nats_5[3:]
        found["answer_nats_without_evidence"][id] = without / count
        found["answer_nats_with_evidence"][id] = original[0] / count
        for name, (answer, swap) in (("original", original), ("swapped", swapped)):
            found[f"{name}/swap_over_answer_nats"][id] = answer - swap
            found[f"{name}/swap_wins"][id] = float(swap < answer)
            found[f"{name}/p_answer"][id] = float(np.exp(-np.logaddexp(0.0, answer - swap)))
    return dict(found)


def conflicts(
    part: HeldOut, tokenizer: Tokenizer, config: Config
) -> tuple[list[Conflict], dict[str, int]]:
    """The questions of a set that can be turned around, and how many can not, by reason:

    no_span      trained on otherwise than as one passage and a span of it: see `markup.pieces`
    not_in_text  the text does not say it
    in_title     the title does: the passage is about it
    no_other     no answer of the same relation that the passage does not say too
    too_long     for data.max_ctx_tokens or data.max_gen_tokens
    """
    pools: dict[str, list[str]] = collections.defaultdict(list)
    for example in (*part.examples, *part.split_sample()):
        pools[relation(part.dataset.name, example)] += example.answers[:1]
    found, skipped = [], collections.Counter()
    for example in part.examples:
        pool = sorted(pools[relation(part.dataset.name, example)])
        made = conflict(example, part.dataset.passages, pool)
        if isinstance(made, Conflict) and not _fits(made, tokenizer, config):
            made = "too_long"
        if isinstance(made, Conflict):
            found.append(made)
        else:
            skipped[made] += 1
    return found, dict(skipped)


def conflict(
    example: Example, passages: Mapping[str, Passage], pool: Sequence[str]
) -> Conflict | str:
    """A question turned around, or why it can not be, as `conflicts` says.

    Of the pool, answers of its relation, a hash of its id chooses. They are as frequent there as
    among the questions: a prior of Gen's favours neither side.
    """
    if len(example.evidence) != 1 or example.kind == "label" or example.output:
        return "no_span"
    passage = passages[example.evidence[0]]
    answers = (example.long_answer,) if example.long_answer else example.answers
    answer = markup.find_answer(answers, passage.text)
    if not answer:
        return "not_in_text"
    if markup.find_answer([answer], passage.title):
        return "in_title"
    first = int(share_of(example.id) * len(pool))
    said = markup.passage_text(passage)
    for other in (*pool[first:], *pool[:first]):
        if other.strip() and other not in answers and not markup.find_answer([other], said):
            text = markup.replace_answer(answer, other, passage.text)
            return Conflict(
                example, passage, answer, dataclasses.replace(passage, text=text), other
            )
    return "no_other"


def relation(source: str, example: Example) -> str:
    """What a question asks about its entity, as far as is known.

    In `world` its id says it; elsewhere questions of one task and kind count as alike.
    """
    return example.id.split(".")[1] if source == "world" else f"{example.task} {example.kind}"


def texts_of(one: Conflict, tokenizer: Tokenizer, config: Config) -> list[Text]:
    """The answer behind no passage; answer and swap behind the passage, then behind the swapped."""
    pairs = [(None, one.answer)]
    pairs += [(p, said) for p in (one.passage, one.swapped) for said in (one.answer, one.swap)]
    return [text_of(one.example, passage, said, tokenizer, config) for passage, said in pairs]


def text_of(
    example: Example, passage: Passage | None, said: str, tokenizer: Tokenizer, config: Config
) -> Text:
    """What Gen reads where it says this, as in training (`markup`)."""
    before, close = markup.prompt(example, tokenizer), tokenizer.eos
    if passage:
        inserted = markup.insertion([passage], tokenizer, config.data.max_ctx_tokens)
        before, close = [*before, tokenizer.ret, *inserted], tokenizer.ce
    answer = [*tokenizer.encode(said), close]
    return Text(np.array([*before, *answer], np.int32), len(answer))


def _fits(one: Conflict, tokenizer: Tokenizer, config: Config) -> bool:
    said = [tokenizer.encode(markup.passage_text(p)) for p in (one.passage, one.swapped)]
    tokens = max(len(text.tokens) for text in texts_of(one, tokenizer, config))
    uncut = max(map(len, said)) <= config.data.max_ctx_tokens
    return uncut and tokens <= config.data.max_gen_tokens


def answer_nats(run: Run, texts: Sequence[Text]) -> np.ndarray:
    """[N] -log p of each text's scored tokens, summed, among those that decoding may choose.

    No text is longer than data.max_gen_tokens.
    """
    trained = run.trained
    config, gen, nats_N = trained.config, trained.towers.gen, np.zeros(len(texts))
    scored_N = np.array([text.scored for text in texts], np.int32)
    longest = 1 << (int(scored_N.max()) - 1).bit_length()  # a few compiled shapes serve all
    read = _compiled(trained.mesh, gen, longest)
    text_V = Marks.of(trained.tokenizers.gen, padded_vocab(gen.vocab_size)).text_V
    # Gen's rows are filled as Ctx's are: one segment a text.
    size = {"U": config.batch_size, "L": config.data.max_gen_tokens, "P": config.data.ret_slots}
    shape = dataclasses.replace(batch_shape(config), **size)
    shown = {"desc": "scoring answers", "unit": " texts", "delay": 2, "leave": False}
    with tqdm(total=len(texts), disable=None, **shown) as bar, jax.set_mesh(trained.mesh):
        for rows in pack_passages([text.tokens for text in texts], shape):
            safepoint()
            there_UxP, index_UxP = rows.passage_valid_UxP, rows.index_UxP
            batch = to_mesh((rows, scored_N[index_UxP]), trained.mesh)
            nats_UxP = np.asarray(read(trained.params["gen"], *batch, text_V))
            nats_N[index_UxP[there_UxP]] = nats_UxP[there_UxP]
            bar.update(int(there_UxP.sum()))
    return nats_N


@functools.lru_cache(maxsize=4)
def _compiled(mesh: Mesh, gen: Transformer, longest: int) -> Callable:
    """`nats_of`, compiled once for all checkpoints of a run."""
    read = lambda params, rows, scored_UxP, text_V: nats_of(
        params, rows, scored_UxP, text_V, gen, longest
    )
    return jax.jit(read, out_shardings=sharding.replicated(mesh))


def nats_of(
    params: dict, rows: PackedPassages, scored_UxP, text_V, gen: Transformer, longest: int
) -> jax.Array:
    """[U, P] -log p of the last `scored` tokens of the text in each slot, summed.

    Args:
      params: Gen's.
      rows: texts in place of passages.
      scored_UxP: int32, at most `longest` (A below).
      text_V: bool, the tokens that may be chosen beside a text's last one.
    """
    U, P = scored_UxP.shape
    hidden_UxLxD = gen.hidden(
        params, rows.ctx_tokens_UxL, rows.ctx_segments_UxL, rows.ctx_positions_UxL
    )
    slot_1x1xA = jnp.arange(longest)[None, None]
    wanted_UxPxA = slot_1x1xA < scored_UxP[..., None]
    before_UxPxA = (rows.passage_ends_UxP - scored_UxP)[..., None] + slot_1x1xA
    before_UxPxA = jnp.where(wanted_UxPxA, before_UxPxA, 0)
    flat_UxPA = before_UxPxA.reshape(U, -1)
    take = lambda x, at: jnp.take_along_axis(x, at, axis=1)
    target_UxPxA = take(rows.ctx_tokens_UxL, flat_UxPA + 1).reshape(U, P, -1)
    hidden_UxPxAxD = take(hidden_UxLxD, flat_UxPA[..., None]).reshape(U, P, longest, -1)
    last_UxP = take(rows.ctx_tokens_UxL, rows.passage_ends_UxP)

    def row(parts):
        hidden_PxAxD, target_PxA, last_P = parts
        logits_PxAxV = gen.logits(params, hidden_PxAxD)
        vocabulary_1xV = jnp.arange(logits_PxAxV.shape[-1])[None]
        may_PxV = text_V[None] | (vocabulary_1xV == last_P[:, None])
        logits_PxAxV = jnp.where(may_PxV[:, None], logits_PxAxV, -jnp.inf)
        picked_PxA = jnp.take_along_axis(logits_PxAxV, target_PxA[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits_PxAxV, axis=-1) - picked_PxA

    # The logits of one row at a time.
    nats_UxPxA = jax.lax.map(row, (hidden_UxPxAxD, target_UxPxA, last_UxP))
    return jnp.sum(jnp.where(wanted_UxPxA, nats_UxPxA, 0.0), axis=-1)
