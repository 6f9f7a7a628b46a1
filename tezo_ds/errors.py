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


class StorageError(TezoError):
    """Files of a run that are damaged, another run's, or cannot be written."""
