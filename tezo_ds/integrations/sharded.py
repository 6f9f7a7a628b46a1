"""Engine of a model as accelerate's launchers and TrainingArguments say to shard it.

accelerate's own wrappers are for training with gradients: they want an optimizer, cast weights to float32 and
leave the last layers gathered. So its choices are taken, and the weights sharded here.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from transformers import TrainingArguments

from tezo_ds.config import BLOCK
from tezo_ds.engine.engine import Engine
from tezo_ds.errors import ConfigError
from tezo_ds.intake.initialize import initialize
from tezo_ds.losses.objective import LossFn
from tezo_ds.models.fsdp import FsdpPlan, shard_whole
from tezo_ds.sharding.world import local_device


def engine_of(
    model: nn.Module, accelerator: Accelerator, args: TrainingArguments, block: dict[str, Any],
    loss_fn: LossFn | None,
) -> Engine:  # fmt: skip
    """Returns an engine of a model: under ZeRO-3, under FSDP2, or with whole weights on every rank.

    Raises:
        TezoError: the launcher's choice is not served, or see `initialize`.
    """
    if config := deepspeed_config_of(accelerator):
        return initialize(model, {**config, BLOCK: block}, loss_fn)
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ConfigError(
            "accelerate's FSDP is for accelerators, and there is none; start by torchrun, with a model to "
            "which fully_shard was applied"
        )
    if plugin is not None and not is_fsdp2(model):
        model = shard_whole(model, local_device(), _plan(plugin, accelerator, args))
    return initialize(model, block, loss_fn)


def is_fsdp2(model: nn.Module) -> bool:
    """Returns whether FSDP2 shards a model."""
    return any(hasattr(parameter, "device_mesh") for parameter in model.parameters())


def deepspeed_config_of(accelerator: Accelerator) -> dict[str, Any] | None:
    """Returns the DeepSpeed config that the launcher or the arguments name, if any, without a tezo block."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        return None
    config = copy.deepcopy(dict(plugin.deepspeed_config))
    if BLOCK in config:
        raise ConfigError(
            f'the DeepSpeed JSON has a "{BLOCK}" block; give it as TezoTrainer(tezo=…)'
        )
    return config


def _plan(plugin: Any, accelerator: Accelerator, args: TrainingArguments) -> FsdpPlan:
    """Returns how to shard by FSDP2. Raises ConfigError, which names accelerate's field: it is not served."""
    wrong = {
        "fsdp_version": plugin.fsdp_version != 2 and "set it to 2",
        "fsdp_reshard_after_forward": plugin.reshard_after_forward is not True and "set it to true",
        "fsdp_cpu_ram_efficient_loading": plugin.cpu_ram_efficient_loading
        and dist.get_world_size() > 1
        and "set it to false, as other ranks than the first would hold no weights",
    }
    for name, instead in wrong.items():
        if instead:
            raise ConfigError(f"accelerate's {name}: {instead}")
    parallel = accelerator.parallelism_config
    replicas = 1 if parallel is None else parallel.dp_replicate_size
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return FsdpPlan(
        replicas, dtypes.get(accelerator.mixed_precision), bool(plugin.cpu_offload),
        tuple(plugin.transformer_cls_names_to_wrap or ()) or None,
    )  # fmt: skip
