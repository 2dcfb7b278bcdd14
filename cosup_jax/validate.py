"""--mode=validate: every bad or odd row with file, line, id and reason; nothing is compiled."""

import functools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cosup_jax import assemble, show
from cosup_jax.assemble import Sources, Tokenizers
from cosup_jax.config import Config
from cosup_jax.data import markup, tokens
from cosup_jax.data.near import NearDuplicates
from cosup_jax.data.plan import Plan, left_out
from cosup_jax.data.problems import ERRORS, KINDS, Problems
from cosup_jax.data.schema import Dataset, Example
from cosup_jax.data.sources import eval_sets
from cosup_jax.data.tokens import TokenStore
from cosup_jax.errors import UserError
from cosup_jax.runtime.workdir import Workdir
from cosup_jax.wording import counted


class _Split(NamedTuple):
    """One split of one or several sources, tokenised."""

    name: str
    datasets: list[Dataset]
    store: TokenStore
    left_out: np.ndarray  # rows of the store that fit no row

    def examples(self, rows: Iterable[int]) -> Iterator[tuple[Dataset, int]]:
        """Data set, and row in it, of some rows of the store."""
        for row in rows:
            yield self.datasets[self.store.sources[row]], int(self.store.gen_rows[row])

    def read(self) -> Iterator[tuple[Dataset, int]]:
        """Data set, and row in it, of every example that fits."""
        return self.examples(np.setdiff1d(np.arange(self.store.num_examples), self.left_out))

    def asking(self, rets: np.ndarray) -> np.ndarray:
        """Rows of the store, ascending, that have one of the [Ret] (bool, of each)."""
        owner = np.repeat(np.arange(self.store.num_examples), np.diff(self.store.ret_offsets))
        return np.unique(owner[rets])


def validate(config: Config, workdir: str, show_rows: int = 0, limit: int = 5) -> None:
    """Prints what is in the data and what is wrong with it; all findings go to validation.jsonl.

    Args:
      show_rows: training rows that are printed as the model reads them.
      limit: findings printed of each kind.

    Raises:
      UserError: if any row is bad, or nothing can be read at all.
    """
    assemble.mesh_for(config)
    with Workdir(workdir) as directory:
        data = assemble.read_sources(config, directory.path / "data")
        found = Problems().extend(data.problems.values())
        datasets = dict.fromkeys([*(dataset for dataset, _ in data.train), *data.held_out])
        print(_table(_source_rows(datasets)))
        shown = None
        try:
            rows = _check_tokens(config, data, datasets, directory.path, found, show_rows)
            _check_corpora(config, directory.path / "data", found)
            shown = rows
        except UserError as error:
            if not found.errors:
                raise
            assemble.refuse_all_bad(data)
            raise UserError(
                f"{counted(found.errors, 'bad row')}, and without them: {error}"
            ) from error
        finally:  # whatever stops us, what was found is said
            if found.listed or shown is not None:
                print(_findings(found, limit))
            lines = (json.dumps(problem._asdict()) for problem in found.listed)
            directory.write_text("validation.jsonl", "".join(f"{line}\n" for line in lines))
            if found.listed:
                print(f"all findings: {directory.path / 'validation.jsonl'}")
        print("\n".join(shown), end="")
    if found.errors and config.data.bad_rows == "refuse":
        raise UserError(
            f"{counted(found.errors, 'bad row')}; mend them, or train without them by "
            "--config.data.bad_rows=drop"
        )


def _check_corpora(config: Config, directory: Path, found: Problems) -> None:
    """Adds the bad rows of the passages without questions that `encode` and `evaluate` read."""
    named = filter(None, (config.index.corpus, config.eval.corpus))
    corpora = []
    for where in {os.path.realpath(where): where for where in named}.values():
        corpus, bad = assemble.read_corpus(where, config, directory)
        corpora.append(corpus)
        found.extend([bad])
    if corpora:
        print(_table(_source_rows(corpora)))
    for corpus in corpora:
        if not len(corpus.passages):
            raise UserError(f"corpus {corpus.name}: no good passage")


def _check_tokens(
    config: Config,
    data: Sources,
    datasets: Iterable[Dataset],
    workdir: Path,
    found: Problems,
    show_rows: int,
) -> list[str]:
    """Adds what tokens and plan tell; returns the training rows to show."""
    assemble.refuse_untrained(data)
    config = assemble.resolve(config)
    tokenizers = assemble.read_tokenizers(config, workdir, data)
    split = functools.partial(_split, tokenizers=tokenizers, config=config, workdir=workdir)
    train = split("training", data.train, "train")
    sets = eval_sets(data.held_out).items()
    held_out = [split(name, [(dataset, 1.0)], of) for name, (dataset, of) in sets]
    plan = Plan(train.store, config)
    print(_table(_split_rows(train, plan, held_out)))
    for part in (train, *held_out):
        _check_lengths(part, tokenizers, config, found)
    for dataset in datasets:
        holds = next(part for part in (train, *held_out) if dataset in part.datasets)
        _check_passages(dataset, holds, found)
    for part in held_out:
        _check_leaks(part, train, found)
    if held_out:
        _check_copies(held_out, train, found)
    rows = range(min(show_rows, plan.shape.B * plan.total_steps(1)))
    return [
        show.row(train.store, plan, config, tokenizers.gen, train.datasets, row) for row in rows
    ]


def _split(
    name: str,
    sources: Sequence[tuple[Dataset, float]],
    split: str,
    tokenizers: Tokenizers,
    config: Config,
    workdir: Path,
) -> _Split:
    store = tokens.tokenize(sources, *tokenizers, config, workdir / "data", split)
    return _Split(name, [dataset for dataset, _ in sources], store, left_out(store, config))


def _check_lengths(part: _Split, tokenizers: Tokenizers, config: Config, found: Problems) -> None:
    """Examples that fit no row, passages that are cut, spans behind the cut."""
    lengths, rets = np.diff(part.store.gen_offsets), np.diff(part.store.ret_offsets)
    for row, (dataset, number) in zip(part.left_out, part.examples(part.left_out), strict=True):
        example, most = dataset.examples[number], config.data.max_gen_tokens
        if lengths[row] > most:
            kind, reason = "example_too_long", f"{lengths[row]} tokens, a Gen row has {most}"
        else:
            kind = "passages_too_many"
            reason = f"{rets[row]} [Ret] and {len(example.hard_negatives)} hard negatives"
        found.add(kind, dataset.examples.where(number), example.id, f"left out: {reason}")
    cut = _cut_in_gen(part.store, config) | (part.store.ctx_cut[part.store.ret_passages] > 0)
    for dataset, number in part.examples(np.setdiff1d(part.asking(cut), part.left_out)):
        example = dataset.examples[number]
        for passage, span in _spans(example, dataset):
            if tower := _behind_cut(passage, span, tokenizers, config):
                reason = f"{span!r:.60} lies behind the cut of its passage in {tower}"
                found.add("answer_cut", dataset.examples.where(number), example.id, reason)
                break


def _cut_in_gen(store: TokenStore, config: Config) -> np.ndarray:
    """bool, of each [Ret]: whether Gen's passage is as long as it may be, and so perhaps cut."""
    owner = np.repeat(np.arange(store.num_examples), np.diff(store.ret_offsets))
    cs = store.gen_offsets[owner] + store.ret_positions + config.data.max_ctx_tokens + 1
    return store.gen_roles[np.minimum(cs, len(store.gen_roles) - 1)] == markup.EVIDENCE


def _behind_cut(passage: str, span: str, tokenizers: Tokenizers, config: Config) -> str:
    """The tower that does not read all of a span that the passage has; "" where both do."""
    if span not in passage:
        return ""
    until = passage[: passage.index(span) + len(span)]
    most, pooling, prompt = config.data.max_ctx_tokens, config.ctx.pooling, config.ctx.prompt
    if len(tokenizers.gen.encode(until)) > most:
        return "Gen"
    room = markup.ctx_room(tokenizers.ctx, pooling, most)
    return "Ctx" if len(tokenizers.ctx.encode(prompt + until)) > room else ""


def _check_passages(dataset: Dataset, part: _Split, found: Problems) -> None:
    """Passages that are cut; `part` is any split that holds the data set."""
    first = sum(len(d.passages) for d in part.datasets[: part.datasets.index(dataset)])
    cut = part.store.ctx_cut[first : first + len(dataset.passages)]
    for row in np.flatnonzero(cut).tolist():
        id, where = dataset.passages.at(row).id, dataset.passages.where(row)
        found.add("passage_cut", where, id, f"{cut[row]} tokens are cut off")


def _spans(example: Example, dataset: Dataset) -> Iterator[tuple[str, str]]:
    """(passage, span) of each [Ret] in the training text, but where the span is all of it."""
    passage, whole = "", ""
    for piece in markup.pieces(example, dataset.passages):
        if piece.passage:
            passage, whole = piece.text, dataset.passages[piece.passage].text
        elif passage and not piece.control:
            if piece.text != whole:
                yield passage, piece.text
            passage = ""


def _check_leaks(part: _Split, train: _Split, found: Problems) -> None:
    """Passages that training reads as evidence too, by identity."""
    seen = tokens.seen_in(part.store, train.store, train.left_out)
    for dataset, number in part.examples(part.asking(seen)):
        example = dataset.examples[number]
        reason = "training reads a passage of its evidence, the same up to the cut"
        found.add("leaked_passage", dataset.examples.where(number), example.id, reason)


def _check_copies(held_out: list[_Split], train: _Split, found: Problems) -> None:
    """Held-out questions that training asks in the same, or almost the same words."""
    questions = lambda part: (
        (dataset.examples.where(number), dataset.examples[number])
        for dataset, number in part.read()
    )
    near = NearDuplicates({_plain(e.question): None for _, e in questions(train)})
    for part in held_out:
        for where, example in questions(part):
            if not (copy := near.find(_plain(example.question))):
                continue
            text, alike = copy
            if text == _plain(example.question):
                reason = f"training asks {example.question!r:.60} too"
                found.add("leaked_question", where, example.id, reason)
            else:
                reason = f"{alike:.0%} the words of training's {text!r:.60}"
                found.add("near_duplicate", where, example.id, reason)


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _source_rows(datasets: Iterable[Dataset]) -> list[list[str]]:
    rows = [["source", "examples", "passages", "splits"]]
    for dataset in datasets:
        splits = ", ".join(f"{name} {len(rows):,}" for name, rows in dataset.splits.items())
        count = f"{len(dataset.examples):,}", f"{len(dataset.passages):,}"
        rows.append([dataset.name, *count, splits])
    return rows


def _split_rows(train: _Split, plan: Plan, held_out: Sequence[_Split]) -> list[list[str]]:
    """`Gen filled` and `Ctx filled` are of the first block of the plan."""
    heading = ["split", "examples", "left out", "tokens"]
    rows = [[*heading, "Gen filled", "Ctx filled", "seen in training"]]
    used = plan.utilization()
    for part in (train, *held_out):
        count = part.store.num_examples, len(part.left_out), int(part.store.gen_offsets[-1])
        if part is train:
            rest = [f"{used['gen_tokens']:.1%}", f"{used['ctx_tokens']:.1%}", ""]
        else:
            seen = tokens.seen_in(part.store, train.store, train.left_out)
            share = f"{seen.mean():.0%} of {len(seen):,} [Ret]" if len(seen) else "no [Ret]"
            rest = ["", "", share]
        rows.append([part.name, *(f"{n:,}" for n in count), *rest])
    return rows


def _findings(found: Problems, limit: int) -> str:
    """Every kind with its count, its meaning, and the first few rows."""
    lines = []
    for kind in KINDS:
        if not (count := found.counts[kind]):
            continue
        level = "error" if kind in ERRORS else "warning"
        lines.append(f"{level} {kind}: {count:,} x {KINDS[kind]}")
        first = [problem for problem in found.listed if problem.kind == kind][:limit]
        lines += [f"  {problem}" for problem in first]
        if count > len(first):
            lines.append(f"  ... and {count - len(first):,} more")
    return "\n".join(lines) or "nothing is wrong"


def _table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    line = lambda row: "  ".join(
        cell.ljust(w) for cell, w in zip(row, widths, strict=True)
    ).rstrip()
    return "\n".join([line(rows[0]), line(["-" * w for w in widths]), *map(line, rows[1:])]) + "\n"
