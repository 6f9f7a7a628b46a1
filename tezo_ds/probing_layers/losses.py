"""Loss of each example in each branch of a forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tezo_ds.losses.objective import Objective
from tezo_ds.losses.targets import IGNORE, targets


class _Kept:
    """Cross-entropies of the labelled positions of one forward, in place of what a step solves with."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Keeps the losses of some positions, in float64 from the logits on, as branches differ by little.

        Args:
            logits: of all branches, (branches, k, words).
            labels: index of each position's label among the words, int64 (k,).
        """
        wide = logits.double() if logits.device.type != "mps" else logits.float()
        flat = F.cross_entropy(wide.flatten(0, 1), labels.repeat(len(logits)), reduction="none")
        self.losses.append(flat.view(len(logits), -1).double().cpu())


def losses_of(objective: Objective, batch: Mapping[str, Any], branches: int) -> Tensor:
    """Returns the loss sum of each of a batch's examples in each branch, by one forward: float64 (branches,
    examples) on the CPU, 0 for an example without labels.

    Args:
        objective: of cross-entropies, whose forwards have found out how the model takes its logits.
        batch: B examples, `micro_batch` at the most.
        branches: number of branches that the forward is perturbed in.
    """
    kept = _Kept()
    with objective.responding(kept):
        objective(batch, branches)
    found = torch.cat(kept.losses, dim=1)  # (branches, k)
    rows = labelled_rows(objective, batch)
    assert found.shape == (branches, len(rows)), "a forward that was tried in another mode"
    sums = torch.zeros(branches, len(batch["labels"]), dtype=torch.float64)
    return sums.index_add_(1, rows, found)


def labelled_rows(objective: Objective, batch: Mapping[str, Any]) -> Tensor:
    """Returns the example that each labelled position belongs to, int64 (k,)."""
    wanted = targets(objective.sharding.module, batch["labels"])  # (B, T)
    return (wanted != IGNORE).nonzero()[:, 0].cpu()
