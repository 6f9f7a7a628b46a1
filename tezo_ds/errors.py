"""Errors a user can cause: each carries one line that says what was wrong, where, and what to do."""


class TezoError(ValueError):
    """Base of every error that the command line prints as one line.

    Attributes:
        speaks: whether this rank prints the error; None: only a node's first rank does, as all meet it.
    """

    speaks: bool | None = None

    def __str__(self) -> str:
        """Returns the message as one line, with unprintable characters escaped."""
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())


class ConfigError(TezoError):
    """A configuration that is missing, malformed, or asks for something impossible."""


class DataError(TezoError):
    """A task, data file or label that is missing or malformed."""


class ProbeError(TezoError):
    """A probe that measured nothing, or cannot measure this model."""


class ShardingError(TezoError):
    """Weights sharded in a way that cannot serve the request, or replicas that differ."""


class RewardFailed(TezoError):
    """A user's reward function that raised, never returned, or gave something that is no reward."""


class StorageError(TezoError):
    """Files of a run that are damaged, another run's, or cannot be written."""


def one_line(error: BaseException) -> str:
    """Returns the first line of an error's innermost cause: `datasets` wraps the one that says something."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
