"""--mode=export: the newest checkpoint as models that others serve.

WORKDIR/export/gen       a transformers directory: AutoModelForCausalLM, AutoTokenizer, vLLM
WORKDIR/export/ctx       a transformers and a sentence-transformers directory
WORKDIR/export/params    the parameters alone, adapters and all, as Orbax stores them
WORKDIR/export/parity.json   how far the written models are from the trained ones
"""

import dataclasses
import functools
import json
import shutil
from itertools import chain, islice
from pathlib import Path

import jax
import numpy as np
import safetensors

from cosup_jax import assemble, parity
from cosup_jax.assemble import Sources, Tokenizers
from cosup_jax.checkpoint import Checkpointer
from cosup_jax.config import Config, LoraConfig
from cosup_jax.contract import EmbeddingContract
from cosup_jax.data import markup
from cosup_jax.errors import UserError
from cosup_jax.hf import saving, sentence
from cosup_jax.model.adapters import merge_adapters
from cosup_jax.model.transformer import Transformer
from cosup_jax.parity import Ours, Sample
from cosup_jax.runtime.workdir import Workdir
from cosup_jax.towers import Towers

ROWS = 8  # examples, and passages, that are compared
NEW, OLD = ".export.new", ".export.old"  # while an export is written, and replaced
SENTENCES = ("torch", "sentence_transformers")  # packages that read Ctx


def export(config: Config, workdir: str) -> None:
    """Writes WORKDIR/export, or nothing if what was written does not compute what was trained.

    Raises UserError without a checkpoint of this config, or without room on the disk or for the
    directory.
    """
    if jax.process_count() > 1:
        raise UserError("--mode=export runs in one process; start it on one host")
    with Workdir(workdir, begun=True) as directory:
        target, new, old = (directory.path / name for name in ("export", NEW, OLD))
        if old.exists() and not target.exists():
            old.rename(target)  # killed between the two renames of `_put`
        if target.exists() and not target.is_dir():
            raise UserError(f"{target} is no directory; move it away")
        found = assemble.trained(config, directory.path)
        config, tokenizers = found.config, found.tokenizers
        print(f"step {found.step}: writing the towers", flush=True)
        trained = Ours(found.towers, found.params, found.mesh, config)
        plain = _without_adapters(found.towers)
        merged = Ours(plain, _merged(found.params, config), found.mesh, config)
        shutil.rmtree(new, ignore_errors=True)
        try:
            _write(new, merged, tokenizers, found.contract, config)
            checkpointer = Checkpointer(new / "params", keep=1)
            checkpointer.save(found.step, {"params": found.params}, found.meta)
            checkpointer.close()
            checks = _compare(new, trained, merged, _sample(found.data, tokenizers, config), config)
            _write_json(new / "parity.json", checks)
            _put(new, target, old)
        except BaseException as error:
            shutil.rmtree(new, ignore_errors=True)
            if isinstance(error, (OSError, safetensors.SafetensorError)):
                raise UserError(
                    f"cannot write {new}: {error}; check the permissions and the free space"
                ) from error
            raise
        directory.withdraw("export")
    place = f"{directory.url}/export"
    print(f"done: {place}/gen, {place}/ctx, {place}/params", flush=True)


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
    towers, pooling = ours.towers, config.ctx.pooling
    ctx_params = {k: v for k, v in towers.ctx_params(ours.params).items() if k != "head"}
    projection = ctx_params.pop("projection", None)
    gen, ctx, most = tokenizers.gen, tokenizers.ctx, config.data.max_ctx_tokens
    for name in ("gen", "ctx"):
        (new / name).mkdir(parents=True)
        _write_json(new / name / "contract.json", contract.to_dict())
    gen.save_framed(new / "gen", [], towers.gen.arch.max_positions, text_only=False)
    ctx.save_framed(new / "ctx", markup.ctx_tail(ctx, pooling), most, text_only=True)
    save = functools.partial(_save_tower, dtype=config.export.dtype)
    save(new / "gen", ours.params["gen"], towers.gen, gen, has_head=True)
    save(new / "ctx", ctx_params, towers.ctx, ctx, has_head=False)
    ids = {"eos_token_id": gen.eos, "pad_token_id": gen.pad}
    _write_json(new / "gen" / "generation_config.json", ids)
    sentence.save_modules(
        *(new / "ctx", pooling, config.ctx.prompt, most, config.loss.normalize),
        widths=(towers.ctx.width, towers.gen.width),
        projection_DxW=None if projection is None else np.asarray(projection),
    )


def _save_tower(directory: Path, params: dict, model: Transformer, tokens, has_head, dtype):
    ids = {"eos_token_id": tokens.eos, "pad_token_id": tokens.pad}
    ids |= {"bos_token_id": tokens.prefix[0] if tokens.prefix else None}
    saving.save(directory, params, model.arch, model.vocab_size, has_head, dtype, settings=ids)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _sample(data: Sources, tokenizers: Tokenizers, config: Config) -> Sample:
    """The first examples and passages of the training data."""
    datasets = [dataset for dataset, _ in data.train]
    passages = list(islice(chain.from_iterable(d.passages.values() for d in datasets), ROWS))
    longest, pooling, prompt = config.data.max_ctx_tokens, config.ctx.pooling, config.ctx.prompt
    read = markup.ctx_tokens(passages, tokenizers.ctx, pooling, longest, prompt)
    examples = ((d, example) for d in datasets for example in d.rows("train"))
    pieces = [markup.pieces(example, d.passages) for d, example in islice(examples, ROWS)]
    marked = markup.encode(pieces, tokenizers.gen, longest)
    return Sample(
        [one.tokens[: config.data.max_gen_tokens] for one in marked],
        [tokens for tokens, _ in read],
        [markup.passage_text(passage) for passage in passages],
    )


def _compare(new: Path, trained: Ours, merged: Ours, sample: Sample, config: Config) -> dict:
    """The report of parity. Raises UserError if a check fails."""
    ours, checks, not_asked = merged.outputs(sample), [], {}
    adapted = config.gen.arch.lora.rank or config.ctx.arch.lora.rank
    if adapted and config.export.dtype == "float32":
        checks += parity.compare("adapters merged", ours, *trained.outputs(sample))
    again = parity.read_back(new, merged, merged.mesh, config)
    checks += parity.compare("read back", ours, *again.outputs(sample))
    for whose, what, ask, needed in (
        ("transformers", "logits", parity.transformers_logits, ("torch",)),
        ("sentence-transformers", "vectors", parity.sentence_vectors, SENTENCES),
    ):
        if missing := parity.missing(*needed):
            not_asked[whose] = f"{' and '.join(missing)} not installed"
        else:
            checks += parity.compare(whose, ours, **{what: ask(new, sample)})
    for check in checks:
        print(
            f"{check.what}: largest difference {check.difference:.1e} of {check.largest:.3g}",
            flush=True,
        )
        if not check.passed:
            raise UserError(
                f"export: {check.what} differ by {check.difference:.3g} of {check.largest:.3g}; "
                "nothing is exported. This is a fault of cosup_jax: please report it"
            )
    for whose, why in not_asked.items():
        print(f"{whose}: not asked, {why}", flush=True)
    return {
        "tolerance": parity.TOLERANCE,
        "gen_tokens": sum(map(len, sample.gen_tokens)),
        "ctx_tokens": sum(map(len, sample.ctx_tokens)),
        "checks": [check._asdict() for check in checks],
        "not_asked": not_asked,
    }


def _put(new: Path, target: Path, old: Path) -> None:
    """Replaces an older export in two renames."""
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
