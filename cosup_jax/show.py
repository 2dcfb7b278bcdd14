"""A training row as the model reads it: what is predicted, what is not, what a [Ret] wants."""

import sys
from collections.abc import Iterator, Sequence

import numpy as np

from cosup_jax.config import Config
from cosup_jax.data.batch import Batch
from cosup_jax.data.markup import passage_text
from cosup_jax.data.pipeline import host_batch
from cosup_jax.data.plan import Plan
from cosup_jax.data.problems import printable
from cosup_jax.data.schema import Dataset, Passage
from cosup_jax.data.tokenizer import Tokenizer
from cosup_jax.data.tokens import TokenStore, as_keys

_COLOURS = {"read": "\033[2m", "predict": "\033[32m", "[Ret]": "\033[1;36m"}
_PLAIN = "\033[0m"


def row(
    store: TokenStore,
    plan: Plan,
    config: Config,
    tokenizer: Tokenizer,
    datasets: Sequence[Dataset],
    number: int,
) -> str:
    """Gen row `number` of the run, counted through its steps.

    Args:
      datasets: the sources of the store, in its order.
    """
    step, row = divmod(number, plan.shape.B)
    rows = slice(row, row + 1), slice(0, 0)
    batch = host_batch(store, plan, plan.shape, step, *rows, config.loss.mask_evidence)
    used = int(np.count_nonzero(batch.gen_segments_BxT))
    lines = [f"row {row} of step {step}: {used} of {batch.gen_tokens_BxT.shape[1]} tokens"]
    for segment in range(1, batch.gen_segments_BxT.max() + 1):
        lines.append(f"  example {segment}")
        for kind, first, ids in _runs(batch, segment):
            lines.append(_line(kind, tokenizer.decode(ids)))
            if kind == "[Ret]":
                slot = int(np.flatnonzero(batch.ret_positions_BxR[0] == first)[0])
                lines += _wanted(batch, slot, store, datasets)
    return "\n".join(lines) + "\n"


def _runs(batch: Batch, segment: int) -> Iterator[tuple[str, int, list[int]]]:
    """(kind, position, tokens) of stretches alike: read only, to be predicted, or a [Ret]."""
    here = np.flatnonzero(batch.gen_segments_BxT[0] == segment)
    ids = batch.gen_tokens_BxT[0, here]
    predicted = np.append(False, batch.ntp_weights_BxT[0, here[:-1]] > 0)
    rets = set(batch.ret_positions_BxR[0, batch.ret_valid_BxR[0]].tolist())
    kinds = [
        "[Ret]" if at in rets else "predict" if target else "read"
        for at, target in zip(here.tolist(), predicted, strict=True)
    ]
    first = 0
    for end in range(1, len(here) + 1):
        if end == len(here) or kinds[end] != kinds[first] or kinds[end] == "[Ret]":
            yield kinds[first], int(here[first]), ids[first:end].tolist()
            first = end


def _wanted(batch: Batch, slot: int, store: TokenStore, datasets: Sequence[Dataset]):
    """The [Ret]'s passage, and the example's other evidence, which is no negative of it."""
    keys = as_keys(batch.ret_positives_BxRxSx2[0, slot])
    for name, key in zip(["positive", *["sibling"] * (len(keys) - 1)], keys, strict=True):
        if key:
            passage = _passage(key, store, datasets)
            yield _line(name, f"{passage.id}: {passage_text(passage)}"[:100])


def _passage(key: np.uint64, store: TokenStore, datasets: Sequence[Dataset]) -> Passage:
    row = int(np.flatnonzero(as_keys(store.identities) == key)[0])
    for dataset in datasets:
        if row < len(dataset.passages):
            return dataset.passages.at(row)
        row -= len(dataset.passages)
    raise KeyError(key)


def _line(kind: str, text: str) -> str:
    text = printable(text)
    if kind in _COLOURS and sys.stdout.isatty():
        text = f"{_COLOURS[kind]}{text}{_PLAIN}"
    return f"    {kind:8} | {text}"
