"""The one exception that speaks to a person instead of a programmer."""

__all__ = ["InputError"]


class InputError(ValueError):
    """What the user gave cannot be used: the message says what, where and what to do, in one line.

    The command line prints it without a traceback and exits with status 2.
    """
