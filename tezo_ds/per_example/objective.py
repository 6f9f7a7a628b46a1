"""Loss sums and counts of each example of a batch, beside those of whole batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tezo_ds.errors import DataError
from tezo_ds.losses.objective import Objective
from tezo_ds.losses.targets import IGNORE, width_of


class ExampleObjective(Objective):
    """An objective that can give its sums by example.

    Attributes:
        owners: example of each labelled position of the present forward, int64 (k,) on the CPU; one number
            where there is none, as the last block is left with one row.
    """

    _each = False
    _size = (1, 1)  # (B, T) of the labels in the present forward
    _positions = torch.zeros(0, dtype=torch.int64)  # of labels, in the present forward
    owners = torch.zeros(1, dtype=torch.int64)

    def parts(self, batch: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Returns the parts of a batch that have a forward each, as many on every rank; examples of parts
        that fill up carry no label."""
        return self._parts(batch)

    def carries(self, batch: Mapping[str, Any]) -> Tensor:
        """Returns which examples carry a label: bool (B,) on the CPU. With a `loss_fn` and no labels in the
        batch all do. Raises DataError: no "labels" and no loss_fn."""
        if self.has_logits:
            positions, _ = self._labelled(batch)
            found = torch.zeros(self._size[0], dtype=torch.bool)
            found[positions.cpu() // self._size[1]] = True
            return found
        rows = max(len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim())
        labels = batch.get("labels")
        if not isinstance(labels, Tensor) or len(labels) != rows:
            return torch.ones(rows, dtype=torch.bool)
        return (labels != IGNORE).view(rows, -1).any(dim=1).cpu()

    @torch.no_grad()
    def each(self, batch: Mapping[str, Any], branches: int, part: int = 0) -> Tensor:
        """Returns loss sums and counts of each of B examples in each of `branches` copies: float64
        (2, branches, B) on the model's device, by one forward. Raises DataError as the objective itself does.

        Args:
            batch: one of `parts`.
            branches: number of copies.
            part: its place among them.
        """
        self._each = True
        try:
            return self._sums(batch, branches, part)
        finally:
            self._each = False

    def _labelled(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        positions, tokens = super()._labelled(batch)
        labels = batch["labels"]
        self._size, self._positions = (len(labels), width_of(labels)), positions
        owners = positions.cpu() // self._size[1]
        self.owners = owners if len(owners) else owners.new_zeros(1)
        return positions, tokens

    def _added(self, losses: Tensor, counts: Tensor) -> Tensor:
        if not self._each:
            return super()._added(losses, counts)
        both = torch.stack([losses, counts])
        if not self.has_logits:
            return both
        # Placed and added row by row, and not by index_add, whose order differs on an accelerator.
        B, T = self._size
        placed = both.new_zeros(2, len(losses), B * T)
        placed[:, :, self._positions.to(both.device)] = both
        return placed.view(2, len(losses), B, T).sum(dim=3)


def refuse_counted(counts: Tensor, carries: Tensor) -> None:
    """Raises DataError where a `loss_fn` counts examples whose labels are all -100: these have no direction.

    Args:
        counts: (branches, B).
        carries: bool (B,), see `ExampleObjective.carries`.
    """
    if bool(counts.cpu()[:, ~carries].any()):
        raise DataError(
            "placement per_example: loss_fn counts an example whose labels are all -100, which has no "
            "direction; return 0 for it, or leave labels out of the batch"
        )
