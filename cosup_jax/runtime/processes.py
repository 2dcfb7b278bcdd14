"""The processes of one run: how they join, find out that they agree, and wait for each other.

All of it goes through the key-value store of JAX's coordinator and none of it through the devices:
a process that differs or is missing is named before a collective can hang. What is called by one
process must be called by all, in the same order; in a run of one process it does nothing.
"""

import collections
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from cosup_jax.errors import LostProcess, UserError
from cosup_jax.runtime import liveness
from cosup_jax.runtime.liveness import joined, milliseconds, names

AGREE_SECONDS = 60  # within which all must have come to a comparison
BARRIER_SECONDS = 3600  # of honest work, as tokenising; whoever dies is noticed long before
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")
_rounds: collections.Counter = collections.Counter()  # how often each name was used


def join(environ: Mapping[str, str]) -> None:
    """`jax.distributed.initialize`, where the environment says that this process is one of several.

    It does so by JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID, by a SLURM step
    of more than one task, a TPU host list, or COSUP_CLUSTER=auto (then JAX asks the TPU's
    metadata). From then on a process that dies, or is not heard of for COSUP_LOST_SECONDS (60),
    ends the others with exit code 75.

    Raises UserError for values that make no sense; exits with 2 if the others do not come within
    COSUP_JOIN_SECONDS (300).
    """
    where = _where(environ)
    if where is None:
        return
    seconds = _whole(environ, "COSUP_JOIN_SECONDS", "300")
    lost_s = _whole(environ, "COSUP_LOST_SECONDS", "60")
    # Left alone, JAX would abort with a C++ stack trace for want of a process.
    alarm = threading.Timer(seconds, _give_up, (f"{seconds} s, {where or 'found by JAX'}",))
    alarm.daemon = True
    alarm.start()
    on_term = signal.getsignal(signal.SIGTERM)
    try:
        jax.distributed.initialize(
            **where,
            initialization_timeout=seconds + 60,
            heartbeat_timeout_seconds=2 * lost_s + 60,  # only where our own threads are stuck
            shutdown_timeout_seconds=BARRIER_SECONDS,
        )
    except (ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"cannot join the other processes ({where}): {error}") from error
    finally:
        alarm.cancel()
    signal.signal(signal.SIGTERM, on_term)  # JAX's preemption service has taken it
    liveness.start(lost_s)


def _where(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of `initialize`; empty where JAX finds them, None for a run of one process."""
    if address := environ.get("JAX_COORDINATOR_ADDRESS"):
        where = {
            "coordinator_address": address,
            "num_processes": _whole(environ, "JAX_NUM_PROCESSES"),
            "process_id": _whole(environ, "JAX_PROCESS_ID"),
        }
        if not address.rpartition(":")[2].isdecimal():
            raise UserError(f"JAX_COORDINATOR_ADDRESS, or --coordinator, {address}: no HOST:PORT")
        if where["process_id"] >= where["num_processes"]:
            raise UserError(
                f"JAX_PROCESS_ID={where['process_id']} must be below JAX_NUM_PROCESSES="
                f"{where['num_processes']}; it counts from 0"
            )
        return where
    if "SLURM_STEP_NODELIST" in environ and environ.get("SLURM_NTASKS", "1") != "1":
        gpus = environ.get("SLURM_GPUS_ON_NODE", "0")
        if environ.get("SLURM_NTASKS_PER_NODE") == "1" and gpus.isdecimal() and int(gpus) > 1:
            # JAX gives each task the GPU of its local number, which would leave the others idle.
            return {"local_device_ids": list(range(int(gpus)))}
        return {}
    tpu_hosts = environ.get("TPU_WORKER_HOSTNAMES", "")
    slices = environ.get("MEGASCALE_NUM_SLICES", "1")
    if environ.get("COSUP_CLUSTER") == "auto" or "," in tpu_hosts or slices != "1":
        return {}
    if environ.get("JAX_NUM_PROCESSES", "1") != "1" or environ.get("JAX_PROCESS_ID", "0") != "0":
        raise UserError(
            "one process of several needs the address of process 0: --coordinator=HOST:PORT, or "
            "JAX_COORDINATOR_ADDRESS"
        )
    return None


def facts(mode: str, workdir: str, config: Mapping[str, Any]) -> dict[str, str]:
    """What must be the same in every process before any of them starts: for `agree`.

    Args:
      config: {"a.b": value}, every setting.
    """
    given = {"number of processes": joined().num_processes, "--mode": mode, "--workdir": workdir}
    given |= {f"config.{name}": value for name, value in config.items()}
    given |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    given["Python"] = platform.python_version()
    given["the code of cosup_jax"] = code_digest()
    return given


def code_digest() -> str:
    """Of every source file of this package."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def agree(what: str, mine: Mapping[str, Any], seconds: float = AGREE_SECONDS) -> None:
    """Returns where every process calls with equal facts.

    Args:
      what: what is compared, in the words of a message.
      mine: this process' facts, JSON.
      seconds: how long process 0 waits for the last.

    Raises:
      UserError: in all processes, naming one that differs from process 0, and the difference.
      LostProcess: naming those that did not come.
    """
    if not jax.distributed.is_initialized():
        return
    store, me, key = joined().client, joined().process_id, _key(what)
    store.key_value_set(f"{key}/{me}", json.dumps([socket.gethostname(), dict(mine)]))
    if me == 0:
        differs, missing = _compare(what, key, seconds)
        store.key_value_set(f"{key}.verdict", json.dumps([differs, missing]))
    else:
        try:
            # Longer than process 0 waits, which may itself have come later by as much.
            answer = store.blocking_key_value_get(f"{key}.verdict", milliseconds(2 * seconds + 5))
        except jax.errors.JaxRuntimeError:
            raise LostProcess(f"process 0 did not come to compare {what}") from None
        differs, missing = json.loads(answer)
    if missing:
        raise LostProcess(f"{missing} did not come to compare {what} within {seconds:.0f} s")
    if differs:
        liveness.part()  # all of them know, and say so each on their way out
        raise UserError(differs)


def _compare(what: str, key: str, seconds: float) -> tuple[str, str]:
    """What differs, and who is missing; both empty where all is well."""
    deadline, found, missing = time.monotonic() + seconds, {}, []
    for process in range(joined().num_processes):
        left = max(deadline - time.monotonic(), 0.1)
        try:
            answer = joined().client.blocking_key_value_get(f"{key}/{process}", milliseconds(left))
            found[process] = json.loads(answer)
        except jax.errors.JaxRuntimeError:
            missing.append(process)
    if missing:
        return "", names(missing)
    host_0, facts_0 = found[0]
    for process, (host, theirs) in found.items():
        for name in {**facts_0, **theirs}:
            mine, other = facts_0.get(name), theirs.get(name)
            if mine != other:
                odd = [i for i, (_, f) in found.items() if f.get(name) != mine and i != process]
                more = f" (so has {names(odd)})" if odd else ""
                return (
                    f"process {process} on {host} differs in {what}: {name} is {other!r} there"
                    f"{more} and {mine!r} in process 0 on {host_0}; give all processes the same "
                    "command, code and files"
                ), ""
    return "", ""


def barrier(name: str, seconds: float = BARRIER_SECONDS) -> None:
    """Returns once every process is at the barrier of this name.

    Raises LostProcess, with the numbers of those that did not come within `seconds`.
    """
    if not jax.distributed.is_initialized():
        return
    store, key = joined().client, _key(name)
    store.key_value_set(f"{key}/{joined().process_id}", "")
    try:
        store.wait_at_barrier(key, milliseconds(seconds))
    except jax.errors.JaxRuntimeError:
        come = {int(path.rsplit("/", 1)[1]) for path, _ in store.key_value_dir_get(f"{key}/")}
        missing = names(sorted(set(range(joined().num_processes)) - come))
        raise LostProcess(f"{missing} did not come to '{name}' within {seconds:.0f} s") from None


def broadcast(name: str, value: str | None = None, seconds: float = AGREE_SECONDS) -> str:
    """The text that process 0 gives, in every process. Raises LostProcess if it gives none."""
    if not jax.distributed.is_initialized():
        return value
    store, key = joined().client, _key(name)
    if joined().process_id == 0:
        store.key_value_set(key, value)
        return value
    try:
        return store.blocking_key_value_get(key, milliseconds(seconds))
    except jax.errors.JaxRuntimeError:
        raise LostProcess(f"process 0 did not come to '{name}' within {seconds:.0f} s") from None


def announce_preemption() -> None:
    """Gives notice that this process will be ended; one process may do so, or several.

    `multihost_utils.reached_preemption_sync_point` then answers True in all processes at one step,
    which they agree on without the devices.
    """
    if jax.distributed.is_initialized():
        # JAX's service knows no other notice than SIGTERM, and would hold that for good; the others
        # learn of it by this key.
        now = datetime.datetime.now(datetime.UTC).isoformat()
        joined().client.key_value_set("RECEIVED_PREEMPTION_NOTICE", now, allow_overwrite=True)


def finish() -> None:
    """Waits until the others are done too, and leaves them."""
    if jax.distributed.is_initialized():
        barrier("end of the run")
        liveness.leave()
        jax.distributed.shutdown()


def _give_up(waited: str) -> None:
    line = f"error: not every process came ({waited}); start them all, with one process count\n"
    os.write(2, line.encode())
    os._exit(2)


def _key(name: str) -> str:
    """All processes use a name equally often, so that its uses are told apart by their number."""
    _rounds[name] += 1
    return f"cosup/{name}.{_rounds[name]}"


def _whole(environ: Mapping[str, str], name: str, default: str = "") -> int:
    text = environ.get(name, default)
    if not text.isdecimal():
        raise UserError(f"{name}={text} in the environment must be a whole number")
    return int(text)
