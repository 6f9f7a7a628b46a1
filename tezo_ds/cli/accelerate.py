"""Choices of `accelerate launch`, from the environment that it gives to each rank.

accelerate's own wrapper of FSDP2 is for training with gradients: it casts weights to float32, leaves the last
layers gathered after a forward, and has rank 0 load the whole model. So we take the choices and shard by
ourselves, and refuse what we do not do.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tezo_ds.errors import ConfigError
from tezo_ds.launched import env_rank, env_world_size

log = logging.getLogger(__name__)

PRECISIONS = {"no": None, "bf16": "bfloat16", "fp16": "float16"}

# The one value of each that a forward-only run can serve.
SERVED = {
    "ACCELERATE_DYNAMO_BACKEND": "no",
    "ACCELERATE_USE_MEGATRON_LM": "false",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_AUTO_WRAP_POLICY": "transformer_based_wrap",
    "FSDP_IGNORED_MODULES": "none",
    "PARALLELISM_CONFIG_TP_SIZE": "1",
    "PARALLELISM_CONFIG_CP_SIZE": "1",
    "PARALLELISM_CONFIG_SP_SIZE": "1",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
}
# What only backward passes and FSDP's own checkpoints would use, where a config sets it.
IDLE = ("FSDP_ACTIVATION_CHECKPOINTING", "FSDP_BACKWARD_PREFETCH", "FSDP_STATE_DICT_TYPE")


@dataclass(frozen=True)
class Launched:
    """A launcher's choices; empty where it makes none.

    Attributes:
        deepspeed: the DeepSpeed JSON to use.
        settings: fields of `settings.Settings`.
    """

    deepspeed: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def launched() -> Launched:
    """Returns the choices of `accelerate launch`, if it started this process.

    Raises:
        ConfigError: a choice that we do not serve; names it and what to set instead.
    """
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:  # which it always sets
        return Launched()
    for variable, served in SERVED.items():
        value = os.environ.get(variable, served)
        if value.lower() != served:
            raise ConfigError(f"accelerate's {_field(variable)} is {value}; set it to {served}")
    if _true("ACCELERATE_USE_CPU") and torch.accelerator.is_available():
        raise ConfigError("accelerate's use_cpu: start with CUDA_VISIBLE_DEVICES= (empty) instead")
    precision = os.environ["ACCELERATE_MIXED_PRECISION"]
    if precision not in PRECISIONS:
        raise ConfigError(
            f"accelerate's mixed_precision is {precision}; use {', '.join(PRECISIONS)}"
        )
    if _true("ACCELERATE_USE_FSDP"):
        return Launched(settings=_fsdp(PRECISIONS[precision]))
    if precision != "no":
        raise ConfigError(
            f"accelerate's mixed_precision is {precision}, which only FSDP has here; use --dtype "
            "instead, or the DeepSpeed JSON"
        )
    return Launched(_deepspeed()) if _true("ACCELERATE_USE_DEEPSPEED") else Launched()


def _fsdp(compute_dtype: str | None) -> dict[str, Any]:
    idle = [name for name in IDLE if os.environ.get(name, "false") != "false"]
    if idle and env_rank() == 0:
        log.warning(
            "accelerate's %s: not used, as there is no backward pass and no FSDP checkpoint",
            ", ".join(map(_field, idle)),
        )
    settings: dict[str, Any] = {
        "fsdp": True,
        "fsdp_offload_params": _true("FSDP_OFFLOAD_PARAMS"),
        "fsdp_replicas": _replicas(),
    }
    if compute_dtype is not None:
        settings["compute_dtype"] = compute_dtype
    if layers := os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP"):
        settings["fsdp_layers"] = tuple(name.strip() for name in layers.split(","))
    return settings


def _replicas() -> int:
    replicas = int(os.environ.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1"))
    shards = os.environ.get("PARALLELISM_CONFIG_DP_SHARD_SIZE")
    ranks = env_world_size()
    if shards is not None and replicas * int(shards) != ranks:
        raise ConfigError(
            f"accelerate's dp_replicate_size {replicas} times dp_shard_size {shards} is not the number "
            f"of ranks, {ranks}"
        )
    return replicas


def _deepspeed() -> Path:
    prefix, file = "ACCELERATE_DEEPSPEED_", "ACCELERATE_DEEPSPEED_CONFIG_FILE"
    others = {v for v in os.environ if v.startswith((prefix, "ACCELERATE_GRADIENT_"))}
    unused = others - {file, *SERVED}
    if unused:
        raise ConfigError(
            f"accelerate's {_field(min(unused)).removeprefix('deepspeed_')} is not used; set what you "
            "need of it in the DeepSpeed JSON"
        )
    if file not in os.environ:
        raise ConfigError(
            "accelerate's deepspeed_config has no deepspeed_config_file; name one that has a tezo "
            "block, e.g. ds_configs/zero3_bf16.json"
        )
    return Path(os.environ[file])


def _true(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def _field(variable: str) -> str:
    """Returns a variable's name in accelerate's config file."""
    return variable.removeprefix("ACCELERATE_").lower()
