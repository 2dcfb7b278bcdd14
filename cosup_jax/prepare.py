"""--mode=prepare: all sources, checked and tokenised, as ArrayRecord files for any run to read."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax

from cosup_jax import assemble
from cosup_jax.assemble import Tokenizers
from cosup_jax.config import Config
from cosup_jax.data import prepared, tokens
from cosup_jax.data.prepared import Encoded
from cosup_jax.data.schema import Dataset
from cosup_jax.data.tokens import TokenStore
from cosup_jax.errors import UserError
from cosup_jax.workdir import Workdir


def prepare(config: Config, workdir: str) -> None:
    """Writes WORKDIR/prepared; name it as `prepared:WORKDIR/prepared` in data.train and data.eval.

    Raises UserError for whatever is wrong with config or data.
    """
    config = assemble.resolve(config)
    with Workdir(workdir) as directory:
        data = assemble.read_sources(config, directory.path / "data")
        for line in assemble.refuse_bad_rows(data, config):
            print(line, flush=True)
        tokenizers = assemble.read_tokenizers(config, directory.path, data)
        target = directory.path / "prepared"
        target.mkdir(exist_ok=True)
        if jax.process_index() == 0:
            (target / "manifest.json").unlink(missing_ok=True)  # until all files are there again
        assemble.wait_for_all("old manifest removed")
        about = {"format": prepared.FORMAT, "settings": assemble.token_settings(config, tokenizers)}
        about |= {"problems": {}, "sources": {}}
        for name, problems in data.problems.items():
            about["problems"][name] = dict(problems.counts)
        datasets = dict.fromkeys([*(dataset for dataset, _ in data.train), *data.held_out])
        for dataset in datasets:
            if dataset.name in about["sources"]:
                raise UserError(f"two sources are called {dataset.name}; rename one of the files")
            made = _write(target, dataset, tokenizers, config, directory.path / "data")
            about["sources"][dataset.name] = made
            rows = ", ".join(f"{split} {count:,}" for split, count in made["splits"].items())
            if jax.process_index() == 0:
                print(f"{dataset.name}: {rows}; {made['passages']:,} passages", flush=True)
        if jax.process_index() == 0:
            tokenizers.gen.save(target / "tokenizer" / "gen")
            tokenizers.ctx.save(target / "tokenizer" / "ctx")
            directory.write_text("prepared/manifest.json", json.dumps(about, indent=2) + "\n")
            print(f"done: name prepared:{target} in config.data.train and data.eval", flush=True)
        assemble.wait_for_all("prepared")


def _write(
    target: Path, dataset: Dataset, tokenizers: Tokenizers, config: Config, directory: Path
) -> dict:
    """One source; every process tokenises, the first one writes."""
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
    if jax.process_index() != 0:
        return {"splits": {}, "passages": len(dataset.passages)}
    first = next(iter(stores.values()))
    ctx = zip(first.ctx, first.ctx_cut, strict=True)
    gen = {split: _encoded(store) for split, store in stores.items()}
    return prepared.write(target, dataset, ctx, {**dict.fromkeys(dataset.splits, ()), **gen})


def _encoded(store: TokenStore) -> Iterator[Encoded]:
    for example in range(store.num_examples):
        yield Encoded(*store.gen(example), *store.rets(example), store.negatives(example))
