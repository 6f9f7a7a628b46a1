"""Comparison of the default loss with the model's own, at the first batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tezo_ds.errors import ConfigError
from tezo_ds.losses.objective import Objective, micro_batches
from tezo_ds.losses.targets import IGNORE, targets
from tezo_ds.models.structure import is_classifier


@torch.no_grad()
def check_own_loss(objective: Objective, batch: Mapping[str, Any]) -> None:
    """Raises ConfigError, on all ranks, if the default loss of a first batch is not the model's own."""
    if "labels" not in batch:
        return
    problem = _no_class(objective.sharding.module, batch["labels"])
    problem = _unlike_own(objective, _few_tokens(batch), problem)
    if objective.sharding.maxima([bool(problem)])[0]:
        name = type(objective.sharding.module).__name__
        raise ConfigError(f"{name}: {problem or 'see another rank'}; pass a loss_fn")


def _unlike_own(objective: Objective, batch: Mapping[str, Any], problem: str) -> str:
    """Returns how the default loss is not the model's own; "" if it is, or the model has none. A `problem`
    that is known takes part in the forwards, as other ranks may have none."""
    inputs, labels = objective.inputs(batch), batch["labels"].to(objective.sharding.device)
    module = objective.sharding.module.eval()
    # What a model's own forward makes of labels must not be made for it.
    shifted = (inputs.keys() - batch.keys()) & {"decoder_input_ids"}
    given = {key: value for key, value in inputs.items() if key not in shifted}
    try:
        given |= {} if problem else {"labels": labels}
        outputs = objective.sharding.forward(**given)
    except (TypeError, ValueError, IndexError):  # takes no labels, or not these
        outputs = objective.sharding.forward(**inputs)
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", labels)
    if isinstance(outputs, tuple) or hasattr(logits, "to_local"):
        return ""
    if shifted:
        logits = objective.sharding.forward(**inputs).logits
    if problem:
        return problem
    places = logits.shape[:-1] if is_classifier(module) else logits.shape[:2]
    if logits.dim() != len(places) + 1 or places != labels.shape:
        return f"logits {(*logits.shape,)} are not at the places of labels {(*labels.shape,)}"
    own = getattr(outputs, "loss", None)
    if own is None or getattr(outputs, "aux_loss", None) is not None:  # which no branch has
        return ""
    wanted = targets(module, labels).flatten()
    ours = F.cross_entropy(logits.reshape(len(wanted), -1).float(), wanted)
    differs = (own - ours).abs() > max(1e-5, 4 * torch.finfo(own.dtype).eps) * (1 + ours)
    return f"its own loss is {own:.6g}, the default one {ours:.6g}" if differs else ""


def _no_class(module: Any, labels: Tensor) -> str:
    """Returns how labels are not the numbers of classes that a model tells apart; "" where they are."""
    if not is_classifier(module):
        return ""
    problem, count = module.config.problem_type, module.config.num_labels
    if problem not in (None, "single_label_classification"):
        return (
            f"its problem_type is {problem}, and the default loss is that of one class an example"
        )
    if labels.is_floating_point() or (labels.dim() == 1 and bool((labels >= count).any())):
        return f"labels have to be numbers of its {count} classes, from 0"
    return ""


def _few_tokens(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the example of most labels; of tensors (B, T, …) alone, 32 tokens about its first label."""
    few = max(micro_batches(batch, 1), key=lambda one: int((one["labels"] != IGNORE).sum()))
    shape, first = few["labels"].shape, int((few["labels"].flatten() != IGNORE).int().argmax())
    if any(isinstance(value, Tensor) and value.shape[:2] != shape for value in few.values()):
        return few
    part = slice(max(first - 8, 0), first + 24)
    return {k: value[:, part] if isinstance(value, Tensor) else value for k, value in few.items()}
