"""The plan: any step of a run, looked up in blocks that are built once and cached on disk."""

import bisect
import collections
import concurrent.futures
import functools
import hashlib
import io
import os
import threading
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cosup_jax.config import Config
from cosup_jax.data.batch import batch_shape
from cosup_jax.data.blocks import Block, Builder, Lengths, PlanSettings, count_blocks, utilization
from cosup_jax.data.storage import replacing
from cosup_jax.data.tokens import TokenStore
from cosup_jax.errors import UserError

VERSION = 2  # raise it whenever the same lengths give another plan
COUNTED = 64  # blocks after which their steps are written down together
KEPT = 4  # blocks in memory: readers straddle two, one is built ahead, the loop may lag in one


def lengths_of(store: TokenStore) -> Lengths:
    """What the plan reads of a store."""
    return Lengths(
        np.diff(store.gen_offsets).astype(np.int32),
        *(store.weights, store.ret_offsets, store.ret_passages),
        *(store.negative_offsets, store.negative_passages),
        np.diff(store.ctx_offsets).astype(np.int32),
        store.identities,
        store.sources,
    )


def settings_of(config: Config) -> PlanSettings:
    """What the config says about packing."""
    data, aligned = config.data, config.compat == "official"
    return PlanSettings(
        packing=data.packing,
        aligned=aligned,
        pure=data.pure_steps,
        buckets=1 if data.packing or aligned else data.row_lengths,
        window=data.window,
        misses=-(-data.window // 8),
    )


def left_out(store: TokenStore, config: Config) -> np.ndarray:
    """int32: rows in the store of the examples that fit no row and that no epoch has."""
    builder = Builder(lengths_of(store), batch_shape(config), settings_of(config), config.seed)
    return builder.left_out


class Plan:
    """The steps of a run, in blocks numbered through all epochs and cached beside the tokens.

    Threads may share it. The first use of a block starts a thread that builds the next one; a copy
    that was pickled, as for a worker process, leaves that to the original. Methods that may have
    to build raise UserError if no example fits a row.
    """

    def __init__(self, store: TokenStore, config: Config, builds_ahead: bool = True):
        self.store, self.config = store, config
        self.shape, self.settings = batch_shape(config), settings_of(config)
        self.blocks_per_epoch = count_blocks(lengths_of(store), self.shape, self.settings)
        decides = (VERSION, store.fingerprint, config.seed, self.shape, self.settings)
        if self.blocks_per_epoch > 1:  # one block is the plan of before there were blocks
            decides += (self.blocks_per_epoch,)
        self.fingerprint = hashlib.sha256(repr(decides).encode()).hexdigest()
        self._builds_ahead = builds_ahead
        # First step of each block, as far as counted, and of the next.
        counted = _read(self._path("starts"), ["starts"])
        self._starts: list[int] = counted[0].tolist() if counted else [0]
        self._recent: collections.OrderedDict[int, concurrent.futures.Future[Block]] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()  # of the two above; never held while a block is built
        self._building = threading.Lock()

    def __reduce__(self):
        return Plan, (self.store, self.config, False)

    def locate(self, step: int) -> tuple[int, int]:
        """(number of the block, index within it) of a step of the run."""
        while self._starts[-1] <= step:
            self._count_next()
        number = bisect.bisect_right(self._starts, step) - 1
        return number, step - self._starts[number]

    def block(self, number: int) -> Block:
        """A block of the run; waits if it has yet to be built."""
        block = self._request(number).result()
        if self._builds_ahead:
            self._request(number + 1)
        return block

    def volume(self, step: int) -> tuple[int, int]:
        """Tokens that both towers read in a step, padding aside, and its examples."""
        number, index = self.locate(step)
        block = self.block(number)
        examples = block.examples[slice(*block.example_offsets[index : index + 2])]
        passages = block.passages[slice(*block.passage_offsets[index : index + 2])]
        length = lambda offsets, items: int(np.sum(offsets[items + 1] - offsets[items]))
        gen = length(self.store.gen_offsets, examples)
        return gen + length(self.store.ctx_offsets, passages), len(examples)

    def steps_per_epoch(self, epoch: int) -> int:
        return self.total_steps(epoch + 1) - self.total_steps(epoch)

    def total_steps(self, num_epochs: int) -> int:
        """Steps of the first `num_epochs` epochs; builds those of their blocks not yet cached."""
        while len(self._starts) <= num_epochs * self.blocks_per_epoch:
            self._count_next()
        return self._starts[num_epochs * self.blocks_per_epoch]

    def utilization(self) -> dict[str, float]:
        """blocks.utilization of the first block."""
        return utilization(self.block(0), lengths_of(self.store), self.shape)

    @property
    def left_out(self) -> np.ndarray:
        """int32: rows in the store of the examples that fit no row and that no epoch has."""
        return self._builder.left_out

    @functools.cached_property
    def _builder(self) -> Builder:
        lengths = lengths_of(self.store)
        builder = Builder(lengths, self.shape, self.settings, self.config.seed)
        if len(builder.left_out) == len(lengths.examples):
            raise UserError(
                f"none of {len(lengths.examples)} training examples fits a row (longest: "
                f"{lengths.examples.max()} tokens); raise config.data.max_gen_tokens, ret_slots, "
                "max_positives or ctx_rows"
            )
        drawn = float(np.delete(lengths.weights, builder.left_out).astype(np.float64).sum())
        if drawn < 1 - 1e-6:
            raise UserError(
                f"an epoch draws {drawn:.2g} examples, so that most epochs have no step; raise the "
                "weights (source@weight) in config.data.train"
            )
        return builder

    def _count_next(self) -> None:
        number = len(self._starts) - 1
        if found := _read(self._path(number), ["example_offsets"]):
            steps = len(found[0]) - 1
        else:
            steps = self._request(number).result().steps
        with self._lock:
            if len(self._starts) == number + 1:  # else another thread was faster
                self._starts.append(self._starts[-1] + steps)
                if len(self._starts) % COUNTED == 1:  # a resumed run opens this file, not all
                    _write(self._path("starts"), {"starts": np.array(self._starts)})

    def _request(self, number: int) -> concurrent.futures.Future[Block]:
        with self._lock:
            if number not in self._recent:
                future = self._recent[number] = concurrent.futures.Future()
                # A daemon: a run that ends does not wait for a block that it will not read.
                threading.Thread(target=self._fulfil, args=(future, number), daemon=True).start()
            self._recent.move_to_end(number)
            while len(self._recent) > KEPT:
                self._recent.popitem(last=False)
            return self._recent[number]

    def _fulfil(self, future: concurrent.futures.Future[Block], number: int) -> None:
        try:
            future.set_result(self._load(number))
        except BaseException as error:  # for whoever waits for the block
            future.set_exception(error)

    def _load(self, number: int) -> Block:
        path = self._path(number)
        if found := _read(path, Block._fields):
            return Block(*found)
        with self._building:
            if found := _read(path, Block._fields):
                return Block(*found)
            block = self._builder.block(*divmod(number, self.blocks_per_epoch))
            _write(path, block._asdict())
            return block

    def _path(self, part: int | str) -> Path:
        return self.store.directory / f"plan-{self.fingerprint[:16]}-{part}.npz"


def _read(path: Path, names: Sequence[str]) -> list[np.ndarray] | None:
    """Some arrays of a file; None where it is not there, or damaged, and has to be made anew."""
    try:
        with np.load(path) as saved:
            return [saved[name] for name in names]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(buffer.getvalue())
        file.flush()
        os.fsync(file.fileno())
