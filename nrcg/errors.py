"""The errors that a command prints as one line, without a traceback."""

from __future__ import annotations

import operator
import os


class NrcgError(Exception):
    """A user's mistake or a damaged file: the CLI prints it as one line."""


class ConfigError(NrcgError, ValueError):
    """A setting that is unknown, of the wrong type or out of range; the message names it."""


class DataError(NrcgError):
    """A file or a device that is missing, damaged or does not hold what it should.

    Args:
        reason: What is wrong; with a `path`, of that file.
        path: The file, where it is one that this package has written and can write anew. The message begins with it;
            the command line adds what to do about it.
    """

    def __init__(self, reason: str, path: str | os.PathLike | None = None):
        super().__init__(reason if path is None else f"{os.fspath(path)}: {reason}")
        self.path = path


def whole_number(name: str, value: object, least: int = 0) -> int:
    """A whole number of any integer type, numpy's too. Raises ValueError: another value, or one below `least`."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise ValueError(f"{name}: {value!r} is no whole number >= {least}")
    return number
