"""Forward-only (zeroth-order) fine-tuning of large language models whose weights are sharded."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tezo_ds.config import TezoConfig
    from tezo_ds.directions.draws import factors, tau
    from tezo_ds.engine.engine import Engine
    from tezo_ds.engine.report import StepReport
    from tezo_ds.errors import (
        ConfigError,
        DataError,
        ProbeError,
        RewardFailed,
        ShardingError,
        StorageError,
        TezoError,
    )
    from tezo_ds.intake.initialize import initialize

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "DataError",
    "Engine",
    "ProbeError",
    "RewardFailed",
    "ShardingError",
    "StepReport",
    "StorageError",
    "TezoConfig",
    "TezoError",
    "factors",
    "initialize",
    "tau",
]

_WHERE = {
    "Engine": "engine.engine", "StepReport": "engine.report", "TezoConfig": "config",
    "factors": "directions.draws", "initialize": "intake.initialize", "tau": "directions.draws",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports a public name, or a module of the package, when it is asked for: torch takes a second, and
    `--help` needs none."""
    if name in __all__:
        module = importlib.import_module(f"{__name__}.{_WHERE.get(name, 'errors')}")
        globals()[name] = getattr(module, name)
        return globals()[name]
    if name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
