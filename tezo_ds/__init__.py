"""Forward-only (zeroth-order) fine-tuning of large language models whose weights are sharded."""

from tezo_ds.config import TezoConfig
from tezo_ds.engine import Engine, initialize
from tezo_ds.errors import (
    ConfigError,
    DataError,
    ProbeError,
    ShardingError,
    StorageError,
    TezoError,
)
from tezo_ds.factors import factors, tau
from tezo_ds.report import StepReport

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "DataError",
    "Engine",
    "ProbeError",
    "ShardingError",
    "StepReport",
    "StorageError",
    "TezoConfig",
    "TezoError",
    "factors",
    "initialize",
    "tau",
]
