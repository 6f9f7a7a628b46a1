"""DeepSpeed configs: what of them a forward-only run can do, checked and completed."""

from __future__ import annotations

from typing import Any

import deepspeed
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from packaging.version import Version
from pydantic import ValidationError

from tezo_ds.errors import ConfigError

# Up to 0.19.7 a CPU gather may wait for the last of its handles only and return wrong weights.
OLDEST = Version("0.19.8")


def check_version(version: str = deepspeed.__version__) -> None:
    """Raises ConfigError on a DeepSpeed whose gathers cannot be trusted."""
    if Version(version) < OLDEST:
        raise ConfigError(f"deepspeed {version} is too old; install deepspeed>={OLDEST}")


def check_stage(stage: int) -> None:
    """Raises ConfigError unless `stage` is 3."""
    if stage != 3:
        raise ConfigError(
            f"zero_optimization.stage is {stage}; forward-only training shards weights: set it to 3"
        )


def check_offload(zero: dict[str, Any]) -> None:
    """Checks the offload of a zero_optimization block on this machine. The first offload to NVMe
    compiles DeepSpeed's async_io op, which takes minutes.

    Raises:
        ConfigError: offload to NVMe without a path, with hpZ, or where the op cannot be built.
    """
    offload = zero.get("offload_param") or {}
    if offload.get("device") != OffloadDeviceEnum.nvme:
        return
    if not offload.get("nvme_path"):
        raise ConfigError("offload_param has no nvme_path; name a folder on the drive to use")
    if zero.get("zero_hpz_partition_size", 1) > 1:
        raise ConfigError(
            "zero_hpz_partition_size does not go with offload_param to nvme, as DeepSpeed keeps hpZ's "
            "copies in memory only; leave one of them out"
        )
    try:
        AsyncIOBuilder().load(verbose=False)
    except (RuntimeError, ImportError, OSError) as error:
        raise ConfigError(
            "offload_param to nvme needs DeepSpeed's async_io op, which cannot be built here; install "
            "libaio-dev, gcc, g++ and ninja (`ds_report` says what it misses), or offload to cpu"
        ) from error


def prepare(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a DeepSpeed config fit for a forward-only run.

    Drops "auto" (DeepSpeed's own default then holds), gives the batch size that DeepSpeed insists
    on and we never use, and keeps DeepSpeed from replacing torch's linear for the whole process.

    Raises:
        ConfigError: the stage is not 3, parameters cannot be offloaded as asked, or a field is not what
            DeepSpeed takes.
    """
    config = without_auto(config)
    zero = config.setdefault("zero_optimization", {})
    for name in ("zero_optimization", "bf16", "fp16"):
        if not isinstance(config.get(name, {}), dict):
            raise ConfigError(f"{name}: must be an object (got {config[name]!r})")
    check_stage(zero.get("stage", 0))
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise ConfigError(f"{field}: {first['msg']} (got {first['input']!r})") from None
    check_offload(zero)
    zero.setdefault("memory_efficient_linear", False)
    if not {"train_batch_size", "train_micro_batch_size_per_gpu"} & set(config):
        config["train_micro_batch_size_per_gpu"] = 1
    return config


def without_auto(node: Any) -> Any:
    """Returns a config without the fields that are "auto"."""
    if isinstance(node, dict):
        return {key: without_auto(value) for key, value in node.items() if value != "auto"}
    return node
