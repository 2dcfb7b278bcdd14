"""--mode=prepare: all sources, checked and tokenised, as ArrayRecord files for any run to read."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from cosup_jax import assemble
from cosup_jax.assemble import Tokenizers
from cosup_jax.config import Config
from cosup_jax.data import prepared, tokens
from cosup_jax.data.prepared import Encoded
from cosup_jax.data.schema import Dataset
from cosup_jax.data.sources import by_name
from cosup_jax.data.tokens import TokenStore
from cosup_jax.errors import UserError
from cosup_jax.runtime import processes
from cosup_jax.runtime.workdir import Workdir


def prepare(config: Config, workdir: str) -> None:
    """Writes WORKDIR/prepared; name it as `prepared:WORKDIR/prepared` in data.train and data.eval.

    Raises UserError for whatever is wrong with config or data.
    """
    config, first = assemble.resolve(config), jax.process_index() == 0
    with Workdir(workdir) as directory:
        data = assemble.read_sources(config, directory.path / "data")
        say = lambda text: print(text, flush=True) if first else None
        for line in assemble.refuse_bad_rows(data, config):
            say(line)
        assemble.refuse_untrained(data)
        datasets = by_name([*(dataset for dataset, _ in data.train), *data.held_out])
        tokenizers = assemble.read_tokenizers(config, directory.path, data)
        target = directory.path / "prepared"
        target.mkdir(exist_ok=True)
        if first:
            (target / "manifest.json").unlink(missing_ok=True)  # until all files are there again
        made = {}
        for dataset in datasets:
            stores = _tokenize(dataset, tokenizers, config, directory.path / "data")
            if first:  # every process tokenises, one writes
                made[dataset.name] = _write(target, dataset, stores)
            rows = ", ".join(f"{split} {len(rows):,}" for split, rows in dataset.splits.items())
            say(f"{dataset.name}: {rows}; {len(dataset.passages):,} passages")
        if first:
            tokenizers.gen.save(target / "tokenizer" / "gen")
            tokenizers.ctx.save(target / "tokenizer" / "ctx")
        about = {
            "format": prepared.FORMAT,
            "settings": assemble.token_settings(config, tokenizers),
            "problems": {name: dict(found.counts) for name, found in data.problems.items()},
            "sources": made,
        }
        directory.write_text("prepared/manifest.json", json.dumps(about, indent=2) + "\n")
        say(f"done: name prepared:{target} in config.data.train and data.eval")
        processes.barrier("prepared")


def _tokenize(
    dataset: Dataset, tokenizers: Tokenizers, config: Config, directory: Path
) -> dict[str, TokenStore]:
    """Every split that has an example."""
    # What has no [Ret] is left to the run that reads it.
    data = dataclasses.replace(config.data, drop_without_ret=False)
    config = dataclasses.replace(config, data=data)
    stores = {
        split: tokens.tokenize([(dataset, 1.0)], *tokenizers, config, directory, split)
        for split, rows in dataset.splits.items()
        if len(rows)
    }
    if not stores:
        raise UserError(f"data source {dataset.name}: no good row; see --mode=validate")
    return stores


def _write(target: Path, dataset: Dataset, stores: dict[str, TokenStore]) -> dict[str, Any]:
    corpus = next(iter(stores.values()))
    ctx = zip(corpus.ctx, corpus.ctx_cut, strict=True)
    gen = {
        split: _encoded(stores[split]) if len(rows) else ()
        for split, rows in dataset.splits.items()
    }
    return prepared.write(target, dataset, ctx, gen)


def _encoded(store: TokenStore) -> Iterator[Encoded]:
    for example in range(store.num_examples):
        yield Encoded(*store.gen(example), *store.rets(example), store.negatives(example))
