"""The Gen and Ctx of another run, which retrieve while this run's Gen writes.

That is the separate retriever that co-supervision is compared with: at [Ret] the other Gen reads
the text so far, and its vector there is searched among those that the other Ctx makes of the same
passages. The other workdir is only read, whatever goes on there; these vectors are kept here, in
WORKDIR/retriever, for the next time.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cosup_jax import assemble, config_files, encode, sharding
from cosup_jax.answer.decode import TOGETHER
from cosup_jax.answer.library import Library, searched
from cosup_jax.assemble import Trained
from cosup_jax.checkpoint import check_readable
from cosup_jax.config import BY_QUERY, Config, to_dict
from cosup_jax.data.schema import Dataset
from cosup_jax.errors import UserError
from cosup_jax.runtime.bucket import is_url
from cosup_jax.runtime.paths import expanded
from cosup_jax.runtime.workdir import checkpoints
from cosup_jax.search import index
from cosup_jax.search.corpus import Corpus
from cosup_jax.search.encoder import to_mesh
from cosup_jax.search.vectors import Vectors
from cosup_jax.towers import Towers, similarity_space

PLACE = "retriever"  # in the workdir: vectors by the other Ctx


class Reader:
    """Queries of texts, each read as a whole. Compiled once a shape; parameters are arguments."""

    def __init__(self, mesh: Mesh, towers: Towers, config: Config, most: int = 0):
        """`most` texts are asked for at once, as a rule; 0: generate.batch_size."""
        parts, slots = sharding.row_parts(mesh), config.generate.context_tokens
        together = -(-(most or config.generate.batch_size) // TOGETHER)
        self._rows, self._mesh = -(-together // parts) * parts, mesh
        self._lengths = sorted({-(-slots // part) for part in (4, 2, 1)})
        self.compiled: list[str] = []  # shapes, as they are traced

        def read(params, texts):
            tokens_BxT, segments_BxT, positions_BxT, last_B = texts
            self.compiled.append(f"read {' x '.join(map(str, tokens_BxT.shape))}")
            hidden_BxTxD = towers.gen.hidden(params["gen"], tokens_BxT, segments_BxT, positions_BxT)
            at_BxD = jnp.take_along_axis(hidden_BxTxD, last_B[:, None, None], axis=1)[:, 0]
            return similarity_space(at_BxD, config)

        self._read = jax.jit(read, out_shardings=sharding.replicated(mesh))

    def __call__(self, params: dict, texts: Sequence[np.ndarray]) -> np.ndarray:
        """[Q, D]: Gen's vector at the last token of each text, of one token or more.

        Texts of about the same length are read together.
        """
        order = np.argsort([len(text) for text in texts], kind="stable")
        found = {}
        for first in range(0, len(order), self._rows):
            group = order[first : first + self._rows]
            batch = to_mesh(self._padded([texts[i] for i in group]), self._mesh)
            with jax.set_mesh(self._mesh):
                query_BxD = np.asarray(self._read(params, batch))
            found |= dict(zip(group.tolist(), query_BxD, strict=False))
        return np.stack([found[number] for number in range(len(texts))])

    def _padded(self, texts: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        """Tokens, segments and positions [B, T], and where the last tokens stand, [B]."""
        length = next(n for n in self._lengths if n >= max(map(len, texts)))
        tokens_BxT = np.zeros((self._rows, length), np.int32)
        last_B = np.zeros(self._rows, np.int32)
        for row, text in enumerate(texts):
            tokens_BxT[row, : len(text)] = text
            last_B[row] = len(text) - 1
        position_BxT = np.broadcast_to(np.arange(length, dtype=np.int32), tokens_BxT.shape)
        return tokens_BxT, (position_BxT <= last_B[:, None]).astype(np.int32), position_BxT, last_B


class Pair:
    """Another run's Gen and Ctx, for the passages of this run's data sets."""

    def __init__(self, other: Trained, ours: Trained, workdir: Path, most: int = 0):
        """`workdir` is ours; `most` as that of `Reader`."""
        self._other, self._ours, self._workdir = other, ours, workdir
        self._reader = Reader(ours.mesh, other.towers, other.config, most)
        self._vectors: dict[str, np.ndarray | index.Corpus] = {}  # by the version of the data set
        config = to_dict(other.config)
        self.contract = other.contract
        self.decides: dict[str, Any] = {  # all that its rankings depend on, the passages aside
            "contract": other.contract.to_dict(),
            **{tower: config[tower] for tower in ("gen", "ctx")},
        }

    @classmethod
    def of(cls, trained: Trained, workdir: Path, most: int = 0) -> "Pair | None":
        """That of generate.retriever; None where it names none.

        Raises UserError if there is no sound checkpoint, or texts would be other tokens to it.
        """
        name = trained.config.generate.retriever
        if not name:
            return None
        path = expanded(name)
        ours = {group: getattr(trained.config, group) for group in ("mesh", "generate", "index")}
        try:
            config = config_files.frozen(str(path / "config.json"), {})
            config = dataclasses.replace(config, **ours)
            other = assemble.trained(config, path, kept=workdir / "data")
            assemble.check_same_tokens(trained.tokenizers, other.tokenizers)
        except UserError as error:
            raise UserError(f"config.generate.retriever={name}: {error}") from error
        return cls(other, trained, workdir, most)

    def queries(self, texts: Sequence[np.ndarray]) -> np.ndarray:
        """[Q, D] of texts up to and including [Ret], as Gen's token ids.

        Raises UserError for a model whose vectors are no numbers.
        """
        query_QxD = self._reader(self._other.params, texts)
        if not np.isfinite(query_QxD).all():
            raise UserError("the retriever's vectors at [Ret] are no numbers: it has diverged")
        return query_QxD

    def vectors(
        self, dataset: Dataset, corpus: Corpus, shelf: str = ""
    ) -> np.ndarray | index.Corpus:
        """Of a corpus of this run, row by row; encoded where they are not yet, in that directory
        of those that are kept here."""
        if dataset.version not in self._vectors:
            own, found = self._index(dataset, shelf)
            rows = corpus.rows_in(own)
            same = np.array_equal(rows, np.arange(len(own)))
            self._vectors[dataset.version] = searched(found) if same else found.take(rows)
        return self._vectors[dataset.version]

    def library(self) -> Library:
        """All passages of this run's data sets."""
        datasets = encode.datasets(self._ours, self._workdir)
        return Library([(dataset, *self._index(dataset)) for dataset in datasets])

    def _index(self, dataset: Dataset, shelf: str = "") -> tuple[Corpus, Vectors]:
        return encode.index(dataset, self._other, self._workdir, Path(PLACE, shelf))


def check(config: Config, arms: Sequence[str]) -> None:
    """Raises UserError, in no time, for a generate.retriever that is none, or that no arm asks."""
    name = config.generate.retriever
    if not name:
        return
    if not set(arms) & set(BY_QUERY):
        raise UserError(
            f"config.generate.retriever={name} means nothing without retrieval by Gen's queries; "
            f"take {' or '.join(BY_QUERY)}, or drop it"
        )
    path = expanded(name)
    begun = not is_url(name) and (path / "config.json").is_file()
    if not begun or check_readable(checkpoints(path)) is None:
        raise UserError(
            f"config.generate.retriever={name} holds no checkpoint; give the workdir of a trained "
            "run, a local directory"
        )
