"""--mode=export: the newest checkpoint as models that others serve.

WORKDIR/export/gen       a transformers directory: AutoModelForCausalLM, AutoTokenizer, vLLM
WORKDIR/export/ctx       a transformers and a sentence-transformers directory
WORKDIR/export/params    the parameters alone, adapters and all, as Orbax stores them
WORKDIR/export/parity.json   how far the written models are from the trained ones
"""

import dataclasses
import json
import shutil
from itertools import chain, islice
from pathlib import Path

import jax
import numpy as np
import safetensors

from cosup_jax import assemble, optim, parity
from cosup_jax.assemble import Sources, Tokenizers
from cosup_jax.checkpoint import Checkpointer, restore_params
from cosup_jax.config import Config, LoraConfig
from cosup_jax.contract import EmbeddingContract
from cosup_jax.data import markup
from cosup_jax.errors import UserError
from cosup_jax.hf import saving, sentence
from cosup_jax.parity import Ours, Sample
from cosup_jax.towers import Towers
from cosup_jax.transformer import Transformer, merge_adapters
from cosup_jax.workdir import Workdir

ROWS = 8  # examples, and passages, that are compared


def export(config: Config, workdir: str) -> None:
    """Writes WORKDIR/export, or nothing if what was written does not compute what was trained.

    Raises UserError without a checkpoint of this config, or without room on the disk.
    """
    if jax.process_count() > 1:
        raise UserError("--mode=export runs in one process; start it on one host")
    mesh = assemble.mesh_for(config)
    with Workdir(workdir) as directory:
        data = assemble.read_sources(config, directory.path / "data")
        config = assemble.resolve(config)
        tokenizers = assemble.read_tokenizers(config, directory.path, data)
        towers = assemble.make_towers(config, tokenizers)
        abstract = assemble.abstract_state(config, towers, optim.make(config, 1, 1), mesh)
        restored = restore_params(directory.path / "checkpoints", abstract.params)
        contract = assemble.check_contract(config, tokenizers, restored.meta)
        print(f"step {restored.step}: writing the towers", flush=True)
        trained = Ours(towers, restored.state, mesh, config)
        merged = Ours(_without_adapters(towers), _merged(restored.state, config), mesh, config)
        target, new = directory.path / "export", directory.path / ".export.new"
        shutil.rmtree(new, ignore_errors=True)
        try:
            _write(new, merged, tokenizers, contract, config)
            checkpointer = Checkpointer(new / "params", keep=1)
            checkpointer.save(restored.step, {"params": restored.state}, restored.meta)
            checkpointer.close()
            checks = _compare(new, trained, merged, _sample(data, tokenizers, config), config)
            (new / "parity.json").write_text(json.dumps(checks, indent=2) + "\n")
        except BaseException as error:
            shutil.rmtree(new, ignore_errors=True)
            if isinstance(error, (OSError, safetensors.SafetensorError)):
                raise UserError(f"cannot write {new}: {error}; check the free space") from error
            raise
        _put(new, target)
        print(f"done: {target}/gen, {target}/ctx, {target}/params", flush=True)


def _merged(params: dict, config: Config) -> dict:
    """Adapters in the kernels, and all as the files' dtype will have it."""
    arches = {"gen": config.gen.arch, "ctx": config.ctx.arch}

    def merge(params):
        merged = {
            tower: merge_adapters(tree, arches[tower]) if tower in arches else tree
            for tower, tree in params.items()
        }
        round_off = lambda x: x.astype(config.export.dtype).astype(np.float32)
        return jax.tree.map(round_off, merged)

    return jax.jit(merge)(params)


def _without_adapters(towers: Towers) -> Towers:
    def plain(model: Transformer) -> Transformer:
        return dataclasses.replace(model, arch=dataclasses.replace(model.arch, lora=LoraConfig()))

    return Towers(plain(towers.gen), plain(towers.ctx), towers.tied)


def _write(
    new: Path, ours: Ours, tokenizers: Tokenizers, contract: EmbeddingContract, config: Config
) -> None:
    data, towers, gen = config.data, ours.towers, tokenizers.gen
    ctx_params = dict(towers.ctx_params(ours.params))
    projection = ctx_params.pop("projection", None)
    ctx_params.pop("head", None)
    for name, model, params, tokens in (
        ("gen", towers.gen, ours.params["gen"], gen),
        ("ctx", towers.ctx, ctx_params, tokenizers.ctx),
    ):
        (new / name).mkdir(parents=True)
        longest = {"gen": model.arch.max_positions, "ctx": data.max_ctx_tokens}[name]
        tail = markup.ctx_tail(tokens, config.ctx.pooling) if name == "ctx" else tokens.suffix
        tokens.save_framed(new / name, tail, longest)
        ids = {"eos_token_id": tokens.eos, "pad_token_id": tokens.pad}
        ids |= {"bos_token_id": tokens.prefix[0] if tokens.prefix else None}
        size, has_head = model.vocab_size, name == "gen"
        saving.save(
            new / name, params, model.arch, size, has_head, config.export.dtype, settings=ids
        )
        text = json.dumps(contract.to_dict(), indent=2) + "\n"
        (new / name / "contract.json").write_text(text)
    (new / "gen" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": gen.eos, "pad_token_id": gen.pad}, indent=2) + "\n"
    )
    sentence.save_modules(
        *(new / "ctx", config.ctx.pooling, config.ctx.prompt, data.max_ctx_tokens),
        *(config.loss.normalize, (towers.ctx.width, towers.gen.width)),
        projection_DxW=None if projection is None else np.asarray(projection),
    )


def _sample(data: Sources, tokenizers: Tokenizers, config: Config) -> Sample:
    """The first examples and passages of the training data that spell out no control token."""
    literal = ("[Ret]", "[Cs]", "[Ce]", "[Emb]", "<")
    plain = lambda text: not any(token in text for token in literal)
    datasets = [dataset for dataset, _ in data.train]
    passages = chain.from_iterable(dataset.passages.values() for dataset in datasets)
    chosen = list(islice((p for p in passages if plain(markup.passage_text(p))), ROWS))
    longest, pooling, prompt = config.data.max_ctx_tokens, config.ctx.pooling, config.ctx.prompt
    read = markup.ctx_tokens(chosen, tokenizers.ctx, pooling, longest, prompt)
    examples = ((d, example) for d in datasets for example in d.rows("train"))
    pieces = [markup.pieces(example, d.passages) for d, example in islice(examples, ROWS)]
    marked = markup.encode(pieces, tokenizers.gen, longest)
    return Sample(
        [one.tokens[: config.data.max_gen_tokens] for one in marked],
        [tokens for tokens, _ in read],
        [markup.passage_text(passage) for passage in chosen],
    )


def _compare(new: Path, trained: Ours, merged: Ours, sample: Sample, config: Config) -> dict:
    """The report of parity. Raises UserError if a check fails."""
    checks = []
    adapted = config.gen.arch.lora.rank or config.ctx.arch.lora.rank
    if adapted and config.export.dtype == "float32":
        checks += parity.compare("adapters merged", trained, merged, sample)
    again = parity.read_back(new, merged, merged.mesh, config)
    checks += parity.compare("read back", merged, again, sample)
    not_asked = {}
    for whose, ask, needed in (
        ("transformers", parity.compare_transformers, ("torch",)),
        ("sentence-transformers", parity.compare_sentences, ("torch", "sentence_transformers")),
    ):
        if missing := parity.missing(*needed):
            not_asked[whose] = f"{' and '.join(missing)} not installed"
        else:
            checks += ask(new, merged, sample)
    for check in checks:
        print(f"{check.what}: largest difference {check.difference:.1e}", flush=True)
        if not check.passed:
            raise UserError(
                f"export: {check.what} differ by {check.difference:.3g} of {check.largest:.3g}; "
                "nothing is exported. This is a fault of cosup_jax: please report it"
            )
    for what, why in not_asked.items():
        print(f"{what}: not asked, {why}", flush=True)
    return {
        "tolerance": parity.TOLERANCE,
        "checks": [check._asdict() for check in checks],
        "not_asked": not_asked,
    }


def _put(new: Path, target: Path) -> None:
    """Replaces an older export in two renames."""
    old = target.with_name(".export.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
