"""Do the token space and the sequence space meet?

Gen's state at [Ret] is read twice: against the columns of its unembedding it says the next token,
against passage vectors it finds a passage. Both times it is the state behind Gen's last norm; a
passage's vector is Ctx's pooled state behind its own last norm, projected where the widths differ.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from cosup_jax.data.markup import passage_text
from cosup_jax.held_out import HeldOut
from cosup_jax.search import index
from cosup_jax.studies import run as run_lib
from cosup_jax.studies.geometry import unit
from cosup_jax.studies.run import SHARE, Asked, Gives, Metrics, Run, Sample, Scores, by_item, whole

GIVES: Gives = {
    r"(nearest_is_passage|passages_in_top10|mutual_nearest)(_centred)?": SHARE,
    r"(title_at_ret|title_in_vector|mutual_knn10)(_centred)?(_shuffled)?": SHARE,
    r"passages_in_index|mutual_nearest_most": SHARE,
}
# Whose shares are also taken of earlier checkpoints.
OVER_TRAINING = ("title_in_vector", "title_at_ret", "mutual_knn10", "mutual_nearest")
OVER_TRAINING_GIVES: Gives = {
    rf"({'|'.join(OVER_TRAINING)})(_centred)?(_shuffled)?/step_\d+": SHARE,
}
NEIGHBOURS = 10
TOKENS = 50  # the likeliest, among which a title's are sought
_SEED, _SHUFFLES = 2, 10  # of the shuffled baselines, which are means over so many


class Vocabulary(NamedTuple):
    """Gen's text tokens: all but control tokens and padding."""

    ids_V: np.ndarray  # int64
    out_VxD: np.ndarray  # float32, their columns of the unembedding
    embedding_ExD: np.ndarray  # float32, the whole embedding, by id


def spaces(run: Run) -> Scores:
    """Shares in 0..1. Those of questions and passages are also given as `NAME_centred`: about the
    mean of each kind (vocabulary, passages, queries), which takes away that the kinds lie apart;
    and where a `NAME_shuffled` is told of, as `NAME_centred_shuffled`. Neighbours are by cosine.

    Of each question:
    nearest_is_passage   has its state at [Ret] a passage nearest, of all passages and text tokens?
    passages_in_top10    share of passages among its 10 nearest of those
    mutual_nearest       are it and its passage each other's nearest, of the queries of the set and
                         the passages of its corpus?
    title_at_ret         share of the tokens of its passage's title among the 50 likeliest text
                         tokens at [Ret]; _shuffled: of other questions'

    Of each set, for comparison:
    passages_in_index    share of passages among all passages and text tokens
    mutual_nearest_most  the most that mutual_nearest can be: a passage has one nearest query

    Of each of 500 passages:
    title_in_vector      as title_at_ret, of the passage's vector in place of Gen's state; _shuffled
    mutual_knn10         share of its 10 nearest others by their vectors that also are by the means
                         of their tokens' embeddings in Gen (arXiv 2405.07987); _shuffled: with the
                         embeddings dealt out to other passages
    """
    vocabulary, sample = vocabulary_of(run), run_lib.sample(run)
    found: Scores = {"": _of_passages(run, sample, vocabulary)}
    corpora: dict[str, np.ndarray] = {}
    for part in run.sets:
        source = part.dataset.version  # sets of one source share its corpus
        if source not in corpora:
            corpora[source] = run_lib.corpus_vectors(run, part)
        asked = run_lib.asked(run, part)
        if len(asked.ids) > 1:
            gold_Q = part.corpus.row_of[asked.passage_Q]
            titles = [_title(run, part, row) for row in asked.passage_Q.tolist()]
            given = (asked, gold_Q, titles, corpora[source])
            found[part.name] = _of_queries(*given, vocabulary)
    return found


def spaces_over_training(run: Run) -> Scores:
    """`NAME/step_N` of every kept checkpoint: what `spaces` has for each NAME of OVER_TRAINING and
    its endings."""
    found: Scores = {}
    for at in run_lib.over_training(run):
        for held_out, metrics in spaces(at).items():
            of_set = found.setdefault(held_out, {})
            for name, values in metrics.items():
                if name.startswith(OVER_TRAINING) and not name.endswith("_most"):
                    of_set[f"{name}/step_{at.trained.step}"] = values
    return found


def _of_queries(
    asked: Asked,
    gold_Q: np.ndarray,
    titles: Sequence[set[int]],
    passage_NxD: np.ndarray,
    vocabulary: Vocabulary,
) -> Metrics:
    """The metrics of a set; a query's own passage is row gold_Q of all N."""
    found = whole(
        passages_in_index=len(passage_NxD) / (len(passage_NxD) + len(vocabulary.ids_V)),
        mutual_nearest_most=len(np.unique(gold_Q)) / len(gold_Q),
    )
    for ending, about in (("", unit), ("_centred", centred)):
        query_QxD, passages = about(asked.query_QxD), about(passage_NxD)
        is_passage_QxK = nearest_passages(query_QxD, passages, about(vocabulary.out_VxD))
        values = {
            "nearest_is_passage": is_passage_QxK[:, 0],
            "passages_in_top10": is_passage_QxK.mean(axis=1),
            "mutual_nearest": mutual_nearest(query_QxD, passages, gold_Q),
        }
        for name, value_Q in values.items():
            found[name + ending] = by_item(asked.ids, value_Q)
        likely_QxK = likeliest(query_QxD, vocabulary)
        found |= _titles(f"title_at_ret{ending}", asked.ids, likely_QxK, titles)
    return found


def _of_passages(run: Run, sample: Sample, vocabulary: Vocabulary) -> Metrics:
    """The metrics of no set."""
    tokenizer, most = run.trained.tokenizers.gen, run.trained.config.data.max_ctx_tokens
    vector_NxD = run_lib.vectors(run, sample.tokens)
    texts = tokenizer.encode_batch([passage_text(passage) for passage in sample.passages])
    mean_NxD = np.stack([vocabulary.embedding_ExD[ids[:most]].mean(axis=0) for ids in texts])
    titles = [set(tokenizer.encode(passage.title)) for passage in sample.passages]
    rng, found = np.random.default_rng(_SEED), {}
    orders = [rng.permutation(len(texts)) for _ in range(_SHUFFLES)]
    for ending, about in (("", unit), ("_centred", centred)):
        likely_NxK = likeliest(about(vector_NxD), vocabulary)
        found |= _titles(f"title_in_vector{ending}", sample.ids, likely_NxK, titles)
        own_NxK = neighbours(about(vector_NxD))
        for shuffled, given in (("", [slice(None)]), ("_shuffled", orders)):
            shared = [overlap(own_NxK, neighbours(about(mean_NxD[order]))) for order in given]
            found[f"mutual_knn10{ending}{shuffled}"] = by_item(sample.ids, np.mean(shared, axis=0))
    return found


def _titles(
    name: str, ids: Sequence[str], likely_NxK: np.ndarray, titles: Sequence[set[int]]
) -> Metrics:
    """`name` and `name_shuffled`, of the items whose passage has a title."""
    N, likely = len(ids), [set(likely_K) for likely_K in likely_NxK.tolist()]
    order = np.random.default_rng(_SEED).permutation(N)
    place = np.argsort(order)
    share = lambda i, title: len(title & likely[i]) / len(title)
    own = {i: share(i, title) for i, title in enumerate(titles) if title}
    others = {}
    for i in own:
        after = range(1, min(_SHUFFLES, N - 1) + 1)  # never its own
        shares = [share(i, t) for k in after if (t := titles[order[(place[i] + k) % N]])]
        if shares:
            others[i] = float(np.mean(shares))
    return {
        name + ending: by_item([ids[i] for i in found], [*found.values()])
        for ending, found in (("", own), ("_shuffled", others))
        if found
    }


def nearest_passages(
    query_QxD: np.ndarray, passage_NxD: np.ndarray, vocabulary_VxD: np.ndarray
) -> np.ndarray:
    """bool [Q, 10]: which of a query's nearest, of passages and vocabulary, are passages."""
    both = np.concatenate([passage_NxD, vocabulary_VxD]).astype(np.float32)
    return index.search(query_QxD, both, min(NEIGHBOURS, len(both)))[1] < len(passage_NxD)


def mutual_nearest(query_QxD: np.ndarray, passage_NxD: np.ndarray, gold_Q: np.ndarray):
    """bool [Q]: a query's nearest passage is its own, and that one's nearest query is it."""
    passage_NxD, query_QxD = passage_NxD.astype(np.float32), query_QxD.astype(np.float32)
    found_Q = index.search(query_QxD, passage_NxD, 1)[1][:, 0]
    back_Q = index.search(passage_NxD[gold_Q], query_QxD, 1)[1][:, 0]
    return (found_Q == gold_Q) & (back_Q == np.arange(len(gold_Q)))


def neighbours(unit_NxD: np.ndarray) -> np.ndarray:
    """[N, 10]: the rows nearest to each, itself left out."""
    cosine_NxN = unit_NxD @ unit_NxD.T
    np.fill_diagonal(cosine_NxN, -np.inf)
    return np.argsort(-cosine_NxN, axis=1, kind="stable")[:, : min(NEIGHBOURS, len(unit_NxD) - 1)]


def overlap(a_NxK: np.ndarray, b_NxK: np.ndarray) -> np.ndarray:
    """[N]: the share of each row of a that its row of b has too."""
    return np.mean(np.any(a_NxK[:, :, None] == b_NxK[:, None], axis=2), axis=1)


def likeliest(vector_NxD: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """[N, 50] ids of the text tokens of largest logit, in no order.

    The length of a vector changes no order of logits, nor does a mean taken off all columns.
    """
    logits_NxV = vector_NxD @ vocabulary.out_VxD.T
    most = min(TOKENS, logits_NxV.shape[1])
    return vocabulary.ids_V[np.argpartition(-logits_NxV, most - 1, axis=1)[:, :most]]


def centred(vector_NxD: np.ndarray) -> np.ndarray:
    """About the mean of the vectors at length 1, at length 1 again."""
    unit_NxD = unit(vector_NxD)
    return unit(unit_NxD - unit_NxD.mean(axis=0))


def vocabulary_of(run: Run) -> Vocabulary:
    """Gen's, of a run."""
    gen, params, tokenizer = run.trained.towers.gen, run.trained.params, run.trained.tokenizers.gen
    ids_V = np.setdiff1d(np.arange(tokenizer.vocab_size), list(tokenizer.control))
    floats = lambda x: np.asarray(jax.device_get(x), np.float32)
    out_ExD = floats(gen.unembedding(params["gen"])).T
    return Vocabulary(ids_V, out_ExD[ids_V], floats(params["gen"]["embed"]["table"]))


def _title(run: Run, part: HeldOut, row: int) -> set[int]:
    """Ids of the title of a passage of the set's store."""
    return set(run.trained.tokenizers.gen.encode(part.dataset.passages.at(row).title))
