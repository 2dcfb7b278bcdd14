"""The two exceptions that are no fault of ours: `main` prints either as one line."""


class UserError(Exception):
    """The user's input is wrong. The message says what is wrong, where, and how to mend it."""

    code = 2  # of the program's exit


class LostProcess(Exception):
    """Another process of the run is gone or stuck: started again, the run goes on."""

    code = 75  # EX_TEMPFAIL
