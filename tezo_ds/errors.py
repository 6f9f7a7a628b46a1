"""Errors a user can cause: each carries one line that says what was wrong, where, and what to do."""


class TezoError(ValueError):
    """Base of every error that the command line prints as one line.

    Attributes:
        speaks: whether this rank prints it; None: as the first of its node, as others meet it as well.
    """

    speaks: bool | None = None

    def __str__(self) -> str:
        """One line, whatever names and values are in it: what cannot be printed is escaped."""
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())


class ConfigError(TezoError):
    """The configuration is missing, malformed, or asks for something impossible."""


class DataError(TezoError):
    """A task, data file or label is missing or malformed."""


class ProbeError(TezoError):
    """A probe measured nothing, or cannot measure this model."""


class ShardingError(TezoError):
    """The weights are sharded in a way that the request cannot be served, or replicas differ."""


class StorageError(TezoError):
    """What a run keeps on disk is damaged, is another run's, or cannot be written."""
