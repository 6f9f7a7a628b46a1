"""One batch of those that a Trainer accumulates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tezo_ds.errors import DataError
from tezo_ds.losses.targets import IGNORE
from tezo_ds.models.flash_rows import OF_ONE_ROW


def joined(batches: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, Any]:
    """Returns the rows of all batches as one, shorter ones padded at their end, where nothing counts.

    Args:
        batches: as a collator makes them; at least one.
        pad_id: token id to pad `input_ids` with, masked out.

    Raises:
        DataError: batches of different fields, or of neither mask nor positions where one is padded.
    """
    if len(batches) == 1:
        return dict(batches[0])
    names = batches[0].keys()
    if any(batch.keys() != names for batch in batches):
        raise DataError("gradient accumulation: batches have different fields; give all the same")
    rows: dict[str, Any] = {}
    for name in (name for name in names if name not in OF_ONE_ROW):
        parts = [batch[name] for batch in batches]
        if not all(isinstance(part, Tensor) and part.dim() for part in parts):
            raise DataError(f"gradient accumulation: {name} is no tensor of examples")
        width = max(part.shape[-1] for part in parts) if parts[0].dim() > 1 else 0
        if any(part.dim() > 1 and part.shape[-1] < width for part in parts):
            if not {"attention_mask", "position_ids"} & names:
                raise DataError(
                    "gradient accumulation: batches of different lengths have no attention_mask; let the "
                    "collator make one"
                )
            value = {"labels": IGNORE, "input_ids": pad_id}.get(name, 0)
            parts = [F.pad(part, (0, width - part.shape[-1]), value=value) for part in parts]
        rows[name] = torch.cat(parts)
    return rows
