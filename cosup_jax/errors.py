"""The one exception that stands for a mistake of the user's, not of ours."""


class UserError(Exception):
    """The user's input is wrong: `main` prints the message as one line and exits with code 2.

    The message says what is wrong, where, and how to mend it.
    """
