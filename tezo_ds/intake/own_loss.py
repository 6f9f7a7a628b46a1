"""Comparison of the default loss with the model's own, at the first batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tezo_ds.errors import ConfigError
from tezo_ds.losses.objective import IGNORE, Objective, micro_batches, targets


@torch.no_grad()
def check_own_loss(objective: Objective, batch: Mapping[str, Any]) -> None:
    """Raises ConfigError, on all ranks, if the default loss of a first batch is not the model's own."""
    if "labels" not in batch:
        return
    problem = _unlike_own(objective, _few_tokens(batch))
    if objective.sharding.maxima([bool(problem)])[0]:
        name = type(objective.sharding.module).__name__
        raise ConfigError(f"{name}: {problem or 'see another rank'}; pass a loss_fn")


def _unlike_own(objective: Objective, batch: Mapping[str, Any]) -> str:
    """Returns how the default loss is not the model's own; "" if it is, or the model has none."""
    inputs, labels = objective.inputs(batch), batch["labels"].to(objective.sharding.device)
    module = objective.sharding.module.eval()
    try:
        outputs = objective.sharding.forward(**inputs, labels=labels)
    except (TypeError, ValueError):  # takes no labels, or not these
        outputs = objective.sharding.forward(**inputs)
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", labels)
    if isinstance(outputs, tuple) or hasattr(logits, "to_local"):
        return ""
    if logits.dim() != 3 or logits.shape[:2] != labels.shape:
        return f"logits {(*logits.shape,)} are not at the places of labels {(*labels.shape,)}"
    own = getattr(outputs, "loss", None)
    if own is None or getattr(outputs, "aux_loss", None) is not None:  # which no branch has
        return ""
    ours = F.cross_entropy(logits.flatten(0, 1).float(), targets(module, labels).flatten())
    differs = (own - ours).abs() > max(1e-5, 4 * torch.finfo(own.dtype).eps) * (1 + ours)
    return f"its own loss is {own:.6g}, the default one {ours:.6g}" if differs else ""


def _few_tokens(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the example of most labels; of tensors (B, T, …) alone, 32 tokens about its first label."""
    few = max(micro_batches(batch, 1), key=lambda one: int((one["labels"] != IGNORE).sum()))
    shape, first = few["labels"].shape, int((few["labels"].flatten() != IGNORE).int().argmax())
    if any(isinstance(value, Tensor) and value.shape[:2] != shape for value in few.values()):
        return few
    part = slice(max(first - 8, 0), first + 24)
    return {k: value[:, part] if isinstance(value, Tensor) else value for k, value in few.items()}
