"""Checkpoints: asynchronous, atomic, restored onto any mesh. Every call to Orbax is in this file.

`DIRECTORY/<step>/` holds `state`, an Orbax tree {path of a leaf: array}, and `meta`, JSON with the
run's own part (config, embedding contract, fingerprint of the data plan), per leaf its dtype, shape
and checksum, and a digest of itself. A directory with a plain number for a name is complete: Orbax
writes beside it and renames.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from cosup_jax.dotted import differing
from cosup_jax.errors import UserError
from cosup_jax.runtime import quiet

_log = logging.getLogger(__name__)


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Orbax would ask about steps long past, and processes then miss the one to stop at."""
        return False


class Restored(NamedTuple):
    """What a checkpoint holds."""

    step: int
    state: Any  # of the given abstract tree, on its shardings
    meta: dict[str, Any]  # as given to `save`


class Checkpointer:
    """The checkpoints of one run. In a run of several processes all must make the same calls."""

    def __init__(self, directory: str | Path, keep: int):
        """Opens or creates the directory and clears what a killed save left behind.

        Args:
          directory: WORKDIR/checkpoints.
          keep: newest checkpoints kept.

        Raises:
          UserError: the directory cannot be written.
        """
        quiet.drop_echoes()  # of a save in the background they come before its error does
        self._directory = _located(directory)
        policy = ocp.checkpoint_managers.LatestN(keep)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy, cleanup_tmp_directories=True
        )
        with self._writing("open"):
            self._manager = _Manager(self._directory, options=options)

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Starts saving and returns once the state is copied, so that it may be donated.

        Nothing happens if this step is there already.

        Args:
          step: steps taken.
          state: tree of jax.Array; typed keys, None and empty nodes are welcome.
          meta: JSON; `meta["fingerprint"]` maps names to JSON values that a resume must match.

        Raises:
          UserError: this save, or the one before it, could not be written.
        """
        if step in self.steps():
            self.wait()
            return
        arrays = {name: _raw(leaf) for name, leaf in _named(state).items()}
        sums = jax.device_get(_checksums(arrays))
        leaves = {
            name: [str(leaf.dtype), list(leaf.shape), int(sums[name])]
            for name, leaf in _named(state).items()
        }
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(arrays),
            meta=ocp.args.JsonSave(_sealed({"run": dict(meta), "leaves": leaves})),
        )
        with self._writing(f"save step {step}"):
            self._manager.save(step, args=items, force=True)

    def check(self) -> None:
        """Raises UserError if the save in the background has failed; waits for nothing."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is complete. Raises UserError if it failed."""
        with self._writing("save"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """`wait`, then frees Orbax's threads."""
        with self._writing("save"):
            self._manager.close()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return complete_steps(self._directory)

    def restore(
        self, abstract_state: Any, fingerprint: Mapping[str, Any], config: Mapping | None = None
    ) -> Restored | None:
        """The newest sound checkpoint, bit-equal, or None if there is none at all.

        Where the newest is damaged, an older one is restored instead, with a warning that names
        both; the damaged one is renamed to `<step>.damaged`, out of the way of later saves.

        Args:
          abstract_state: jax.ShapeDtypeStruct leaves with shardings, of any mesh.
          fingerprint: must equal the saved `meta["fingerprint"]`.
          config: as `meta["config"]`; what differs is named where the fingerprint does.

        Raises:
          UserError: another fingerprint, a leaf that does not fit, or all checkpoints damaged.
        """
        damaged = []
        steps = complete_steps(self._directory)
        for step in reversed(steps):
            try:
                run = {"config": config or {}, "fingerprint": fingerprint}
                state, meta = _load(self._directory / str(step), abstract_state, "", run)
            except _DamagedError as error:
                damaged.append(step)
                _log.warning("checkpoint %s is damaged: %s", self._directory / str(step), error)
                continue
            if damaged:
                self._set_aside(damaged, step)
            return Restored(step, state, meta)
        if steps:
            raise _all_damaged(self._directory, steps)
        return None

    def _set_aside(self, damaged: list[int], step: int) -> None:
        _log.warning(
            "going back to checkpoint %s; damaged and renamed: %s",
            self._directory / str(step),
            ", ".join(f"{self._directory / str(bad)}.damaged" for bad in damaged),
        )
        with self._writing("rename a damaged one"):
            for bad in damaged if jax.process_index() == 0 else ():
                target = self._directory / f"{bad}.damaged"
                target.rmtree(missing_ok=True)
                (self._directory / str(bad)).rename(target)
        _agreed(True)  # no process may list the directory before it is renamed
        self._manager.reload()

    @contextmanager
    def _writing(self, what: str):
        try:
            yield
        except (OSError, ValueError) as error:
            raise UserError(
                f"checkpoints in {self._directory}: cannot {what} ({_first_line(error)}); check "
                "permissions and free space, then start again: the run resumes from the last one"
            ) from error


def check_readable(directory: str | Path) -> int | None:
    """The newest checkpoint with readable metadata, or None if there are no checkpoints.

    Cheap, and needs no devices: for before anything is loaded or compiled. Raises UserError if
    there are checkpoints and none of them can be read.
    """
    directory, steps = _located(directory), complete_steps(directory)
    for step in reversed(steps):
        try:
            _read_meta(directory / str(step))
        except _DamagedError:
            continue
        return step
    if steps:
        raise _all_damaged(directory, steps)
    return None


def restore_params(directory: str | Path, abstract_params: Any, step: int = -1) -> Restored:
    """Only the parameters, of one checkpoint; the others' bytes are not read.

    Args:
      directory: a run's checkpoints.
      abstract_params: `params` of the train state or part of it, as in `Checkpointer.restore`.
      step: of the checkpoint; -1 is the newest.

    Raises:
      UserError: no checkpoint, a damaged one (only a resume may step back), or one of another
        shape.
    """
    directory, steps = _located(directory), complete_steps(directory)
    if not steps:
        raise UserError(f"{directory} holds no checkpoint; give the checkpoints/ of a trained run")
    step = steps[-1] if step < 0 else step
    path = directory / str(step)
    try:
        params, meta = _load(path, abstract_params, "params/", None)
    except _DamagedError as error:
        raise UserError(
            f"checkpoint {path} is damaged ({error}); move it away to use the one before it"
        ) from error
    return Restored(step, params, meta)


class _DamagedError(Exception):
    """A checkpoint that cannot be read back as it was written."""


def _load(path: Path, abstract: Any, prefix: str, run: Mapping | None) -> tuple[Any, dict]:
    """One checkpoint onto the shardings of `abstract`, whose leaves are stored under `prefix`."""
    meta = _agree_on(lambda: _read_meta(path))
    if run is not None:
        _check_run(path, json.loads(json.dumps(run)), meta["run"])
    wanted = {prefix + name: leaf for name, leaf in _named(abstract).items()}
    _check_leaves(path, wanted, meta["leaves"], partial=bool(prefix))
    arrays = _agree_on(lambda: _read_arrays(path, wanted))
    for name, found in jax.device_get(_checksums(arrays)).items():
        if int(found) != meta["leaves"][name][2]:
            raise _DamagedError(f"the bytes of {name} are not those that were saved")
    leaves = [_typed(arrays[name], leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves), meta["run"]


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        json.loads((path / "state" / "_METADATA").read_text())
        meta = json.loads((path / "meta" / "metadata").read_text())
        body = {"run": meta["run"], "leaves": meta["leaves"]}
        if meta not in (body, _sealed(body)):  # the first checkpoints had no digest
            raise ValueError("its metadata is not what was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _DamagedError(_first_line(error)) from error
    return meta


def _read_arrays(path: Path, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    quiet.drop_echoes()
    abstract = {name: _raw_abstract(leaf) for name, leaf in wanted.items()}
    arguments = ocp.args.PyTreeRestore(
        abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=True,
    )
    try:
        # The handler itself, for CheckpointManager.restore ends in a barrier, at which the other
        # processes would wait for ever for the one that hit the damaged file.
        found = ocp.PyTreeCheckpointHandler().restore(epath.Path(path / "state"), args=arguments)
    except jax.errors.JaxRuntimeError:
        raise  # out of memory and the like: no fault of the file
    except Exception as error:  # TensorStore raises that very class, among many
        raise _DamagedError(_first_line(error)) from error
    for name, array in found.items():
        if not isinstance(array, jax.Array):  # what its index lacks comes back as it was asked for
            raise _DamagedError(f"{name} is not there")
    return found


def _sealed(meta: dict[str, Any]) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    return meta | {"sha256": digest}


def _check_run(path: Path, now: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    wanted, found = now["fingerprint"], saved.get("fingerprint", {})
    if unlike := [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]:
        changes = differing(saved.get("config", {}), now["config"])  # or else the data themselves
        changes = changes or {name: (found.get(name), wanted.get(name)) for name in unlike}
        made = ", ".join(f"{name}={was!r} (now {new!r})" for name, (was, new) in changes.items())
        raise UserError(
            f"checkpoint {path} belongs to other data: made with {made}; restore that or give a "
            "new --workdir"
        )


def _check_leaves(path: Path, wanted: Mapping, found: Mapping, partial: bool) -> None:
    mend = f"use the config it was made with, {path.parent.parent}/config.json, or a new --workdir"
    for name, leaf in wanted.items():
        expected, saved = [str(leaf.dtype), list(leaf.shape)], found.get(name, [None])[:2]
        if saved != expected:
            had = f"{saved[0]}{saved[1]}" if name in found else "nothing"
            raise UserError(
                f"checkpoint {path} does not fit this config: {name} is {expected[0]}{expected[1]}"
                f" here, {had} there; {mend}"
            )
    extra = sorted(set(found) - set(wanted))
    if extra and not partial:
        raise UserError(
            f"checkpoint {path} does not fit this config: it also holds {extra[0]}; {mend}"
        )


def _located(directory: str | Path) -> epath.Path:
    """A local directory, absolute, or one in a bucket."""
    path = epath.Path(directory)
    return path if "://" in str(path) else epath.Path(path.expanduser().absolute())


def _is_complete(entry: epath.Path) -> bool:
    # A bucket cannot rename a directory: there Orbax writes this object last.
    return "://" not in str(entry) or (entry / "commit_success.txt").exists()


def complete_steps(directory: str | Path) -> list[int]:
    """Steps of complete checkpoints, oldest first. Raises UserError if it cannot be read."""
    try:
        entries = [e for e in _located(directory).iterdir() if e.name.isdecimal() and e.is_dir()]
        names = [entry.name for entry in entries if _is_complete(entry)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror}") from error
    return sorted(map(int, names))


def _all_damaged(directory: Path, steps: list[int]) -> UserError:
    return UserError(
        f"none of the checkpoints in {directory} can be read (steps "
        f"{', '.join(map(str, steps))}); restore them from a copy, or delete the directory to "
        "start from step 0"
    )


def _agree_on(read):
    """`read()`, or the error of the first process that failed, so that all take the same turn."""
    try:
        result, error = read(), None
    except _DamagedError as caught:
        result, error = None, caught
    if not _agreed(error is None):
        raise error or _DamagedError("another process cannot read its part")
    return result


def _agreed(sound: bool) -> bool:
    return (
        sound
        if jax.process_count() == 1
        else bool(np.all(multihost_utils.process_allgather(np.asarray(sound))))
    )


def _named(tree: Any) -> dict[str, Any]:
    """{"params/gen/embed/table": leaf, ...}, in the tree's own order."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _raw_abstract(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    if not _is_key(leaf):
        return leaf
    raw = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=leaf.sharding)


def _typed(array: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if not _is_key(leaf):
        return array
    impl = []  # known while tracing only: an abstract key does not tell it
    jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), leaf)
    return jax.random.wrap_key_data(array, impl=impl[0])


@jax.jit
def _checksums(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Sum of each array's words modulo 2^32: the same on every mesh.

    Orbax's own files do not notice a flipped bit inside an array.
    """

    def add_up(x):
        x = x.astype(jnp.uint8) if x.dtype == bool else x
        words = jax.lax.bitcast_convert_type(x, f"uint{min(8 * x.dtype.itemsize, 32)}")
        return jnp.sum(words.astype(jnp.uint32), dtype=jnp.uint32)

    return {name: add_up(x) for name, x in arrays.items()}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
