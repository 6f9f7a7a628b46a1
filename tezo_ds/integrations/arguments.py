"""TrainingArguments as a forward-only run takes them: what they set of the tezo block, and what has no sense.

An argument counts as set where it differs from the default of its own class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import SchedulerType, TrainingArguments

from tezo_ds.config import TezoConfig
from tezo_ds.errors import ConfigError

# For optimizers, gradients and what reduces them; a run is the same without.
IDLE = (
    "optim", "optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers", "ddp_static_graph", "torch_empty_cache_steps",
)  # fmt: skip

# What would change the loss or the weights in a way that no step here has, and what to set instead.
REFUSED = {
    "label_smoothing_factor": "give a loss_fn that smooths",
    "neftune_noise_alpha": "leave it out, as κ would measure the noise",
    "auto_find_batch_size": 'set tezo={"memory_budget": GiB}',
    "torch_compile": 'set tezo={"compile": True}',
    "use_liger_kernel": "leave it out, as the loss here takes logits at labelled positions alone",
    "fp16_full_eval": "load the model in float16",
    "bf16_full_eval": "load the model in bfloat16",
    "loss_type": "leave it out, as the loss is the cross-entropy; or give a loss_fn",
}
SCHEDULES = {
    "constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine",
}  # fmt: skip
GIVEN = {
    "optimizers": "leave it out, as steps are the method's",
    "optimizer_cls_and_kwargs": "leave it out, as steps are the method's",
    "compute_loss_func": "give loss_fn: (outputs, batch) -> (loss sums, counts), each (examples,)",
    "model_init": "give the model itself",
}


def is_set(args: TrainingArguments, name: str) -> bool:
    """Returns whether an argument differs from its default; False for one that its class does not have."""
    fields = {field.name: field for field in dataclasses.fields(args)}
    if name not in fields:
        return False
    if name == "activation_checkpointing":  # which takes its older name's
        return is_set(args, "gradient_checkpointing")
    default, factory = fields[name].default, fields[name].default_factory
    if callable(factory):
        default = factory()
    return bool((getattr(args, name) or None) != (default or None))  # some become False from None


def _schedule(args: TrainingArguments) -> str:
    return str(SchedulerType(args.lr_scheduler_type).value)


def refuse_unfit(args: TrainingArguments, given: Mapping[str, Any]) -> str:
    """Returns a line that names the arguments that were set and are not looked at; "" where none were.

    Args:
        args: the arguments.
        given: what the Trainer was given besides, by the names of its own parameters.

    Raises:
        ConfigError: something was set that changes what is learnt, and that no forward-only step has.
    """
    for name, instead in GIVEN.items():
        if given.get(name) not in (None, (None, None)):
            raise ConfigError(f"TezoTrainer: {name} is not taken; {instead}")
    for name, instead in REFUSED.items():
        if is_set(args, name):
            raise ConfigError(f"TrainingArguments: {name} is not taken; {instead}")
    if is_set(args, "lr_scheduler_type") and _schedule(args) not in SCHEDULES:
        raise ConfigError(
            f"TrainingArguments: lr_scheduler_type {_schedule(args)} is not taken; use "
            f"{', '.join(SCHEDULES)}"
        )
    if is_set(args, "lr_scheduler_kwargs"):
        raise ConfigError("TrainingArguments: lr_scheduler_kwargs is not taken; leave it out")
    named = [name for name in IDLE if is_set(args, name)]
    if not named:
        return ""
    return f"TrainingArguments: set, but not used by forward passes: {', '.join(named)}"


def block_of(
    args: TrainingArguments, tezo: Mapping[str, Any] | TezoConfig | None, max_steps: int | None
) -> dict[str, Any]:
    """Returns the tezo block of a run: the one given, over what the arguments set.

    Args:
        args: give lr, schedule, warmup_steps where they were set; always seed, and micro_batch where batches
            are accumulated.
        tezo: the block as a dict, or a config, of which what was set counts.
        max_steps: total_steps, as far as they are known.

    Raises:
        ConfigError: both say the learning rate, or the block is no dict.
    """
    if isinstance(tezo, TezoConfig):
        tezo = tezo.model_dump(exclude_unset=True)
    if tezo is not None and not isinstance(tezo, Mapping):
        raise ConfigError(
            f'TezoTrainer: tezo must be a dict such as {{"rank": 16}}, got {type(tezo).__name__}'
        )
    block = dict(tezo or {})
    found: dict[str, Any] = {"seed": args.seed}
    if is_set(args, "learning_rate"):
        if block.get("lr", args.learning_rate) != args.learning_rate:
            raise ConfigError(
                f"TezoTrainer: learning_rate is {args.learning_rate} and tezo's lr {block['lr']}; set one of "
                "them"
            )
        found["lr"] = args.learning_rate
    if is_set(args, "lr_scheduler_type"):
        found["schedule"] = SCHEDULES[_schedule(args)]
    if max_steps is not None:
        found["total_steps"] = max_steps
        if is_set(args, "warmup_steps"):
            found["warmup_steps"] = args.get_warmup_steps(max_steps)
    if args.gradient_accumulation_steps > 1:
        found["micro_batch"] = 1 if _flattens(args) else args.per_device_train_batch_size
    return {**found, **block}


def _flattens(args: TrainingArguments) -> bool:
    """Returns whether trl's collator makes one row of a batch."""
    packs = getattr(args, "packing", False) and "bfd" in getattr(args, "packing_strategy", "")
    return bool(packs or getattr(args, "padding_free", False))


def unscheduled(block: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a block without what depends on the number of steps, for an engine that makes none."""
    depends = ("schedule", "warmup_steps", "total_steps", "query_schedule", "steps_per_epoch")
    return {name: value for name, value in block.items() if name not in depends}
