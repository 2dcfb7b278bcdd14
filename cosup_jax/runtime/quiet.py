"""What libraries print about errors that we report ourselves, in one line."""

import functools
import logging
import sys

# Orbax tells its own developers of every save through absl; what goes wrong also comes as an error.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


@functools.cache
def drop_echoes() -> None:
    """Keeps off the screen what follows on an error of Orbax that has been caught.

    At the first array that cannot be read or written Orbax closes its event loop and forgets its
    coroutines for the others; TensorStore's threads then call that loop in vain, each with a
    traceback.
    """
    uncaught, unraisable = sys.excepthook, sys.unraisablehook

    def show_uncaught(kind, error, trace):
        if not _is_echo(error):
            uncaught(kind, error, trace)

    def show_unraisable(found):
        if not _is_echo(found.exc_value, found.object):
            unraisable(found)

    sys.excepthook, sys.unraisablehook = show_uncaught, show_unraisable
    logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())


def _is_echo(error: BaseException | None, raised_in: object = None) -> bool:
    code = getattr(raised_in, "cr_code", None)  # of a coroutine
    return str(error) == "Event loop is closed" or "orbax" in getattr(code, "co_filename", "")
