"""What compiling leaves behind: programs on disk for the next run, and memory to give back."""

import ctypes
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax

_LEAST_FREE = 1 << 30  # bytes on the disk: JAX never mends a program that was written in part


def keep_programs(environ: Mapping[str, str]) -> None:
    """Has JAX keep what took long to compile, in the user's cache directory.

    Where it can be written; a run of one process only, as of several the first alone writes, and
    the others may have homes of their own. JAX_COMPILATION_CACHE_DIR goes before: a directory or
    gs:// path for any number of processes, or, empty, none. To be called before the first array.
    JAX keeps programs of other versions, flags and CPUs apart.
    """
    place = environ.get("JAX_COMPILATION_CACHE_DIR")
    if place is None and not jax.distributed.is_initialized():
        place = _default(environ)
    jax.config.update("jax_compilation_cache_dir", place or None)


def _default(environ: Mapping[str, str]) -> str | None:
    try:
        caches = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        place = caches / "cosup_jax" / "programs"
        place.mkdir(parents=True, exist_ok=True)
        if os.access(place, os.W_OK) and shutil.disk_usage(place).free >= _LEAST_FREE:
            return str(place)
    except (OSError, RuntimeError):  # RuntimeError: no home
        pass
    return None


def release_memory() -> None:
    """Gives freed memory back to the system, where the C library is one that keeps it (glibc).

    The compiler frees some 0.4 GiB that glibc would otherwise hold for the rest of the run.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim:
        trim(0)
