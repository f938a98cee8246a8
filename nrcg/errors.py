"""The errors that a command prints as one line, without a traceback."""


class NrcgError(Exception):
    """A user's mistake or a damaged file: the CLI prints it as one line."""


class ConfigError(NrcgError, ValueError):
    """A setting that is unknown, of the wrong type or out of range; the message names it."""


class DataError(NrcgError):
    """A file that is missing, cut off or does not hold what it should; the message names it and its remedy."""
