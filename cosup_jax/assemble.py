"""From config and workdir to what every program works with: mesh, data, tokenizers, towers."""

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from cosup_jax import optim, sharding
from cosup_jax import step as step_lib
from cosup_jax.checkpoint import check_readable, restore_params
from cosup_jax.config import SHAPE, Config, DataConfig, sources, to_dict
from cosup_jax.contract import EmbeddingContract, check_match
from cosup_jax.data import markup, prepared, tokenizer
from cosup_jax.data.batch import batch_shape
from cosup_jax.data.problems import Problems
from cosup_jax.data.schema import Dataset
from cosup_jax.data.sources import (
    carve,
    expand,
    identity,
    load,
    load_corpus,
    prepared_directory,
)
from cosup_jax.data.tokenizer import Tokenizer
from cosup_jax.errors import UserError
from cosup_jax.hf import weights
from cosup_jax.model.transformer import Transformer
from cosup_jax.pretrained import resolve
from cosup_jax.runtime import processes
from cosup_jax.runtime.bucket import localise
from cosup_jax.runtime.workdir import checkpoints
from cosup_jax.step import TrainState
from cosup_jax.towers import Towers
from cosup_jax.wording import counted


class Sources(NamedTuple):
    """The data sets that the config names."""

    train: list[tuple[Dataset, float]]  # with how often an epoch draws them
    held_out: list[Dataset]
    problems: dict[str, Problems]  # of each source
    empty: tuple[str, ...] = ()  # sources without an example that is good


class Tokenizers(NamedTuple):
    """Gen's and Ctx's; the same object where they share one."""

    gen: Tokenizer
    ctx: Tokenizer


class Trained(NamedTuple):
    """The newest checkpoint of a workdir, and all that inference needs beside it."""

    config: Config  # with the shapes that pretrained weights bring
    data: Sources
    tokenizers: Tokenizers
    towers: Towers
    mesh: Mesh
    params: dict  # on the mesh
    step: int
    contract: EmbeddingContract  # of its vectors
    meta: dict[str, Any]  # as saved with it


def trained(config: Config, workdir: Path, kept: Path | None = None) -> Trained:
    """A run's models as they were trained; of a locked workdir, for it may read data anew.

    Args:
      kept: where its data sets are kept, if the workdir is another run's, which is only read.

    Raises:
      UserError: no sound checkpoint of this config.
    """
    mesh, saved = mesh_for(config), checkpoints(workdir)
    if check_readable(saved) is None:  # before data is read, which can take minutes
        raise UserError(f"{saved} holds no checkpoint; train first, or give another --workdir")
    data = read_sources(config, kept or workdir / "data")
    config = resolve(config)
    tokenizers = read_tokenizers(config, workdir, data, only_read=kept is not None)
    towers = make_towers(config, tokenizers)
    abstract = abstract_state(config, towers, optim.make(config, 1, 1), mesh)
    step, params, meta = restore_params(saved, abstract.params)
    contract = check_contract(config, tokenizers, meta)
    return Trained(config, data, tokenizers, towers, mesh, params, step, contract, meta)


def mesh_for(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices. Raises UserError if the batch does not split over it."""
    mesh, shape = sharding.make_mesh(config.mesh, devices), batch_shape(config)
    sharding.check_rows(mesh, "config.batch_size", shape.B, config.micro_batches)
    sharding.check_rows(mesh, "config.data.ctx_rows", shape.U, config.micro_batches)
    return mesh


def read_sources(config: Config, directory: Path) -> Sources:
    """Loads every source once; files first, as they fail fastest.

    Args:
      directory: where data sets are kept.

    Raises:
      UserError: a source that cannot be used.
    """
    spelling: dict[tuple, str] = {}  # a source that is named in two ways is one
    train, held_out = (
        [
            (spelling.setdefault(identity(name), name), weight)
            for source, weight in sources(text)
            for name in expand(localise(source, directory / "buckets"))
        ]
        for text in (config.data.train, config.data.eval)
    )
    plain = collections.Counter(name for name, weight in train if weight == 1)
    for name, count in plain.items():
        if count > 1:
            raise UserError(
                f"config.data.train names {name} {count} times; name it once, or write "
                f"{name}@{count} to draw its examples {count} times an epoch"
            )
    trained, evaluated = ({name for name, _ in pairs} for pairs in (train, held_out))
    found, problems = {}, {}
    for name in sorted(trained | evaluated, key=lambda name: (name.startswith("tfds:"), name)):
        dataset, problems[name] = load(name, config.data, directory)
        if name in evaluated and set(dataset.splits) == {"train"}:
            dataset = _hold_out(name, dataset, name in trained, config.data)
        found[name] = dataset
    versions = {f"{name} (version)": dataset.version for name, dataset in found.items()}
    processes.agree("the data it reads", versions, processes.BARRIER_SECONDS)
    return Sources(
        [(found[name], weight) for name, weight in train],
        [found[name] for name, _ in held_out],
        problems,
        tuple(name for name, dataset in found.items() if not len(dataset.examples)),
    )


def read_corpus(where: str, config: Config, directory: Path) -> tuple[Dataset, Problems]:
    """As `load_corpus`, from a bucket too."""
    return load_corpus(localise(where, directory / "buckets"), config.data, directory)


def _hold_out(name: str, dataset: Dataset, trained: bool, data: DataConfig) -> Dataset:
    """A part of a source that is trained on; all of one that is not."""
    directory = prepared_directory(name)
    if directory and prepared.manifest(directory)["settings"].get("data.no_evidence_fraction"):
        raise UserError(
            f"data source {name!r} holds nothing out, and its training rows were prepared with "
            "data.no_evidence_fraction; leave it out of config.data.eval, or prepare it with this "
            "source in data.eval"
        )
    if not trained:
        return dataclasses.replace(dataset, splits={"all": dataset.splits["train"]})
    if not data.dev_fraction:
        return dataset
    return carve(dataset, data.dev_fraction)


def refuse_bad_rows(data: Sources, config: Config) -> list[str]:
    """Lines on what was dropped.

    Raises UserError for bad rows under data.bad_rows=refuse, or where they are all there is.
    """
    bad = {name: found for name, found in data.problems.items() if found.errors}
    if bad and config.data.bad_rows == "refuse":
        first = next(iter(bad.values()))
        count = sum(found.errors for found in bad.values())
        raise UserError(
            f"{first.first_error} (first of {counted(count, 'bad row')} in "
            f"{counted(len(bad), 'source')}); see all by --mode=validate, or train "
            "without them by --config.data.bad_rows=drop"
        )
    refuse_all_bad(data)
    return [f"{name}: {counted(found.errors, 'bad row')} dropped" for name, found in bad.items()]


def refuse_all_bad(data: Sources) -> None:
    """Raises UserError for a source that has bad rows and no good example."""
    for name in data.empty:
        if found := data.problems[name].errors:
            first = data.problems[name].first_error
            raise UserError(
                f"data source {name}: all its examples are bad, "
                f"{counted(found, 'bad row')}; {first}"
            )


def refuse_untrained(data: Sources) -> None:
    """Raises UserError for a source of data.train without a row to train on, such as a dev file.

    Prepared ones may have none: `prepared:DIR` stands for what is only evaluated as well.
    """
    for dataset, _ in data.train:
        if not len(dataset.splits.get("train", ())) and not prepared.is_prepared(dataset):
            others = f", only {', '.join(dataset.splits):.100}" if dataset.splits else ""
            raise UserError(
                f"data source {dataset.name}: no example has split 'train'{others}; take it out of "
                "config.data.train, or call what it is to train on 'train'"
            )


def read_tokenizers(
    config: Config, workdir: Path, data: Sources, only_read: bool = False
) -> Tokenizers:
    """Pretrained ones as they come; for scratch one BPE, trained once and kept in the workdir, or
    that of prepared data.

    Raises UserError if prepared data was tokenised otherwise, or the workdir is `only_read` and
    lacks one.
    """
    find = lambda tower: _tokenizer(tower, config, workdir, data, only_read)
    gen = find("gen")
    shared = config.ctx.init in ("gen", config.gen.init) or config.tie_ctx_to_gen
    tokenizers = Tokenizers(gen, gen if shared else find("ctx"))
    for directory in dict.fromkeys(filter(None, map(prepared_directory, data.problems))):
        prepared.check_settings(directory, token_settings(config, tokenizers))
    return tokenizers


def token_settings(config: Config, tokenizers: Tokenizers) -> dict[str, Any]:
    """All that decides the tokens of a row, for the manifest of prepared data."""
    return {
        "gen tokenizer": tokenizers.gen.fingerprint,
        "ctx tokenizer": tokenizers.ctx.fingerprint,
        "template": markup.VERSION,
        "ctx.pooling": config.ctx.pooling,
        "ctx.prompt": config.ctx.prompt,
        "data.max_ctx_tokens": config.data.max_ctx_tokens,
        "data.no_evidence_fraction": config.data.no_evidence_fraction,
    }


def make_towers(config: Config, tokenizers: Tokenizers) -> Towers:
    """The two models, without weights."""
    return Towers(
        Transformer(config.gen.arch, tokenizers.gen.vocab_size),
        Transformer(config.ctx.arch, tokenizers.ctx.vocab_size, has_head=False),
        config.tie_ctx_to_gen,
    )


def abstract_state(
    config: Config, towers: Towers, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the whole train state."""
    fresh = jax.eval_shape(lambda: step_lib.fresh_state(config, towers, tx))
    shardings = step_lib.state_shardings(fresh, mesh, towers, config)
    describe = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    return jax.tree.map(describe, fresh, shardings)


def initial_state(
    config: Config,
    towers: Towers,
    tokenizers: Tokenizers,
    tx: optax.GradientTransformation,
    abstract: TrainState,
) -> TrainState:
    """Step 0 on the mesh: random, or from pretrained weights read straight onto their shards."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    inits = {"gen": config.gen.init, "ctx": config.ctx.init}
    inits |= {"ctx": config.gen.init} if config.ctx.init == "gen" else {}
    load = {"gen": weights.load_gen, "ctx": weights.load_ctx}
    pretrained = {}
    for tower, tree in abstract.params.items():
        if tower in inits and inits[tower] != "scratch":
            # What their own tokenizer lacks starts anew, as our added tokens do.
            known = getattr(tokenizers, tower).pretrained_size
            path = weights.resolve(inits[tower])
            pretrained[tower] = load[tower](path, tree, known, config.seed)
    return jax.jit(
        lambda loaded: step_lib.fresh_state(config, towers, tx, loaded),
        out_shardings=shardings,
        donate_argnums=0,
    )(pretrained)


def embedding_contract(
    config: Config, tokenizers: Tokenizers, digest: str, temperature: float | None = None
) -> EmbeddingContract:
    """What vectors depend on.

    Args:
      digest: of both towers' weights.
      temperature: where it is learned, as it is now.
    """
    gen = tokenizers.gen
    return EmbeddingContract(
        pooling=config.ctx.pooling,
        prompt=config.ctx.prompt,
        normalize=config.loss.normalize,
        temperature=config.loss.temperature if temperature is None else temperature,
        template=str(markup.VERSION),
        ret=gen.ret,
        cs=gen.cs,
        ce=gen.ce,
        emb=tokenizers.ctx.emb,
        pad=gen.pad,
        eos=gen.eos,
        max_ctx_tokens=config.data.max_ctx_tokens,
        width=config.gen.arch.width,
        tokenizer=tokenizers.ctx.fingerprint,
        weights=digest,
    )


def check_contract(config: Config, tokenizers: Tokenizers, meta: dict) -> EmbeddingContract:
    """The contract of a checkpoint's vectors, from its metadata.

    Raises UserError if they live in another space than this config's, or Gen reads other tokens.
    """
    what = "the workdir's checkpoint"
    saved = EmbeddingContract.from_dict(meta["contract"], what)
    learned = saved.temperature if config.loss.learn_temperature else None
    check_match(embedding_contract(config, tokenizers, saved.weights, learned), saved, what)
    gen = tokenizers.gen.fingerprint
    if meta.get("gen_tokenizer", gen) != gen:  # the first checkpoints do not say
        raise UserError(
            f"{what}: its Gen was trained with another tokenizer and would misread this one's ids; "
            "restore the data of config.data.train, or the files of config.gen.init, as they were"
        )
    now, made = to_dict(config), meta["config"]
    for key, was, wanted in (  # the first checkpoints do not say
        ("ctx.rotate", made["ctx"].get("rotate", False), config.ctx.rotate),
        ("tie_ctx_to_gen", made.get("tie_ctx_to_gen", False), config.tie_ctx_to_gen),
    ):
        if was != wanted:
            raise UserError(
                f"{what} was made with config.{key}={was}, this config has {wanted}; "
                "use the config that it was made with"
            )
    for tower, name in itertools.product(("gen", "ctx"), (*SHAPE, "lora")):
        was, wanted = (found[tower]["arch"][name] for found in (made, now))
        if was != wanted:
            raise UserError(
                f"{what} was made with config.{tower}.arch.{name}={was!r}, this config has "
                f"{wanted!r}; use the config that it was made with"
            )
    return saved


def check_same_tokens(ours: Tokenizers, theirs: Tokenizers) -> None:
    """Raises UserError if a text of our Gen's is another one to theirs."""
    if theirs.gen.fingerprint != ours.gen.fingerprint:
        raise UserError(
            "its Gen has another tokenizer, so that it cannot read what this one writes; give a "
            "run of the same config.gen.init and, from scratch, config.data.train and vocab_size"
        )


def _tokenizer(
    tower: str, config: Config, workdir: Path, data: Sources, only_read: bool
) -> Tokenizer:
    init = getattr(config, tower).init
    if init != "scratch":
        rows = weights.arch_from_hf(weights.resolve(init))["vocab_size"]
        return tokenizer.load(init, rows)
    for source in data.problems:
        if directory := prepared_directory(source):
            return tokenizer.load(Path(directory) / "tokenizer" / tower)
    given = [config.data.vocab_size, markup.VERSION, *(d.version for d, _ in data.train)]
    key = hashlib.sha256(repr(given).encode()).hexdigest()[:16]
    directory = workdir / "tokenizer" / key  # other settings or data never meet an old one
    if only_read and not directory.is_dir():
        raise UserError(
            f"{directory} is not there: the data have changed since it was trained; restore them"
        )
    make = lambda: tokenizer.train(_texts(data), config.data.vocab_size).save(directory)
    if jax.process_index() == 0 and not directory.is_dir():
        make()
    processes.barrier("tokenizer")
    if not directory.is_dir():  # another host, with its own mirror of a bucket: the same again
        make()
    return tokenizer.load(directory)


def _texts(data: Sources) -> Iterator[str]:
    """What training reads, as text."""
    for dataset, _ in data.train:
        yield from map(markup.passage_text, dataset.passages.values())
        yield from map(markup.prompt_text, dataset.rows("train"))
