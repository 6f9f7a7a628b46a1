"""Place of this process among those that a launcher started, by the variables that all launchers set."""

from __future__ import annotations

import os


def env_rank() -> int:
    """RANK; 0 where no launcher set it."""
    return int(os.environ.get("RANK", "0"))


def env_local_rank() -> int:
    """LOCAL_RANK, the rank within the host; 0 where no launcher set it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def env_world_size() -> int:
    """WORLD_SIZE; 1 where no launcher set it."""
    return int(os.environ.get("WORLD_SIZE", "1"))
