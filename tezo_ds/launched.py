"""Place of this process among those that a launcher started, by the variables that all launchers set."""

from __future__ import annotations

import os

from tezo_ds.errors import ConfigError


def env_rank() -> int:
    """RANK; 0 where no launcher set it."""
    return _number("RANK", 0)


def env_local_rank() -> int:
    """LOCAL_RANK, the rank within the host; 0 where no launcher set it."""
    return _number("LOCAL_RANK", 0)


def env_world_size() -> int:
    """WORLD_SIZE; 1 where no launcher set it."""
    return _number("WORLD_SIZE", 1)


def _number(variable: str, unset: int) -> int:
    text = os.environ.get(variable, "").strip()  # some schedulers leave it empty
    try:
        return int(text or unset)
    except ValueError:
        message = f"{variable} is {text!r} and no number; unset it, or start by a launcher"
        raise ConfigError(message) from None
