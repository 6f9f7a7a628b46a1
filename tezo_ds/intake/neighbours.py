"""Refusal of models in which examples that lie one after another in a row see each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tezo_ds.errors import ConfigError
from tezo_ds.intake.causality import finite, rounding
from tezo_ds.losses.objective import Objective
from tezo_ds.models.flash_rows import lie_in_rows, tell_lengths
from tezo_ds.models.structure import is_classifier, is_encoder_decoder

TOKENS = 8  # few, so that each has much weight for the others


@torch.no_grad()
def refuse_seen_neighbours(objective: Objective, batch: Mapping[str, Any]) -> None:
    """Refuses a model in which examples of one row see each other, or count their positions together, by one
    forward, where any rank's batch has such rows. All ranks must call this.

    Raises:
        ConfigError: the model is refused.
    """
    sharding = objective.sharding
    module = sharding.module
    if is_classifier(module) or is_encoder_decoder(module):
        return
    several = "input_ids" in batch and lie_in_rows(
        batch.get("position_ids"), batch.get("attention_mask")
    )
    if not sharding.maxima([several])[0]:
        return
    tell_lengths(module)
    ids = batch["input_ids"][0].repeat(TOKENS)[:TOKENS]
    other = (ids - 1).abs()  # tokens that are other ones, and exist
    rows = torch.stack([torch.cat([other, ids]), torch.cat([ids, ids])])  # (2, 2T)
    positions = torch.arange(TOKENS, device=ids.device).repeat(2, 2)
    module.eval()
    inputs = objective.inputs({"input_ids": rows, "position_ids": positions})
    logits = _logits(sharding.forward(**inputs))
    behind, before = finite(logits[0, TOKENS:]), finite(logits[1, :TOKENS])  # of the same example
    differs = bool((behind - before).abs().max() > rounding(sharding) * before.abs().max())
    if sharding.maxima([differs])[0]:
        raise ConfigError(
            f"{type(module).__name__}: examples of one row see each other, or count their positions "
            "together; leave padding_free off (--group-by-length saves most padding, too), or try another "
            "attn_implementation"
        )


def _logits(outputs: Any) -> Tensor:
    logits: Any = getattr(outputs, "logits", outputs)
    whole: Tensor = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    return whole
