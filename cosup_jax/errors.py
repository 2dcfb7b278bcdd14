"""The two exceptions that are no fault of ours, which `main` prints as one line; exit codes."""

import errno
import os

# Of an OSError: what the place is at fault for, and not we.
REFUSED = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
}


class UserError(Exception):
    """The user's input is wrong. The message says what is wrong, where, and how to mend it."""

    code = 2  # of the program's exit


class LostProcess(Exception):
    """Another process of the run is gone or stuck: started again, the run goes on."""

    code = 75  # EX_TEMPFAIL


def stopped_code(usual: int) -> int:
    """Of what was told to stop and goes on when started again: as a scheduler wants it, or
    `usual`."""
    return int(os.environ.get("COSUP_STOPPED_CODE", usual))
