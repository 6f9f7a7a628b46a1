"""DeepSpeed JSON as users of transformers' Trainer have it: what has no use in it, and what is wrong."""

from __future__ import annotations

import logging
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from pydantic import ValidationError

from tezo_ds.errors import ConfigError
from tezo_ds.launched import env_rank
from tezo_ds.sharding.zero3_config import check_stage, prepare, without_auto

log = logging.getLogger(__name__)

MICRO = "train_micro_batch_size_per_gpu"
# For optimizers, backward passes, DeepSpeed's own loop over data, and monitors: nothing here looks at them.
IDLE = {
    "activation_checkpointing", "autotuning", "bf16_optimizer_states", "checkpoint", "comet", "compile",
    "compression_training", "csv_monitor", "curriculum_learning", "data_efficiency", "data_types",
    "eigenvalue", "elasticity", "gradient_accumulation_steps", "gradient_allreduce_op",
    "gradient_clipping", "gradient_predivide_factor", "graph_harvesting", "nebula", "optimizer",
    "pipeline", "prescale_gradients", "progressive_layer_drop", "quantize_training", "scheduler",
    "sparse_attention", "sparse_gradients", "tensorboard", "train_batch_size", "wandb",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
}  # fmt: skip
BLOCKS = ("zero_optimization", "bf16", "fp16", "aio", "torch_autocast", "flops_profiler")


def fit(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a user's DeepSpeed config as `zero3_config.prepare` completes it, without what has no use in a
    forward-only run, which rank 0 names. Words that DeepSpeed takes for numbers and bools become those.

    Raises:
        ConfigError: a block is not what DeepSpeed takes, or asks for something that no forward does.
    """
    config = _without_idle(without_auto(config))
    zero = config.setdefault("zero_optimization", {})
    for name in BLOCKS:
        if not isinstance(config.get(name, {}), dict):
            raise ConfigError(f"{name}: must be an object (got {config[name]!r})")
    parsed = _as_deepspeed_reads(config)
    check_stage(parsed.zero_optimization_stage)
    zero["stage"] = 3
    for name, read in (("bf16", parsed.bfloat16_config), ("fp16", parsed.float16_config)):
        if name in config:
            config[name]["enabled"] = read.enabled
    return prepare(config)


def _without_idle(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy without what a forward-only run does not look at, which rank 0 names."""
    if "bfloat16" in config:  # DeepSpeed's older name
        config = {"bf16": config["bfloat16"], **config}
    kept = {key: value for key, value in config.items() if key not in {*IDLE, "bfloat16", MICRO}}
    for name, size in (("amp", "enabled"), ("tensor_parallel", "autotp_size")):
        block = config.get(name)
        if isinstance(block, dict) and block.get(size, 0) in (0, 1) and block.get(size) is not True:
            del kept[name]
    if "tensor_parallel" in kept:
        raise ConfigError("tensor_parallel: leave it out, as zero_optimization shards the weights")
    idle = config.keys() - kept.keys() - {"bfloat16", *([MICRO] if config.get(MICRO) == 1 else [])}
    if idle and env_rank() == 0:
        log.warning("DeepSpeed config: not used by forward passes: %s", ", ".join(sorted(idle)))
    return {MICRO: 1, **kept}


def _as_deepspeed_reads(config: dict[str, Any]) -> DeepSpeedConfig:
    """Returns the parsed config; raises ConfigError with DeepSpeed's reason where it refuses one."""
    try:
        return DeepSpeedConfig(config)
    except ValidationError as error:
        first = error.errors()[0]
        block = error.title.removeprefix("DeepSpeed").removesuffix("Config").lower()
        block = "zero_optimization" if block == "zero" else block
        field = ".".join(map(str, (block, *first["loc"])))
        raise ConfigError(f"{field}: {first['msg']} (got {first['input']!r})") from None
    except (DeepSpeedConfigError, AssertionError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).split("\n")[0].split(" See http")[0]
        raise ConfigError(f"DeepSpeed config: {reason}; change or remove that field") from None
