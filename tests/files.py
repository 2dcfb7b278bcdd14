"""What goes wrong with files, for tests."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def full_disk(free: int = 1024) -> Iterator[None]:
    """No file may grow beyond `free` bytes; the system refuses the rest as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
