"""Terms of value projections: what attention gathers of a block's inputs, and how logits answer to it.

The term of a value projection, v' = v + U A x, leaves the attention's pattern as it is. So what reaches the
labelled position of it is linear in what each head gathers there, p_h = Σ_t a_ht x_t with the head's weights
a, and the words' logits become

    z' = z + Σ_h J_h A_g(h) p_h

with g(h) the group of heads that share a value, U block-diagonal, K columns a group, and J_h = ∂z/∂o_h U_g,
how the logits answer to what head h gives. J is the mean over examples, of which each is asked little; U_g
are the directions that the logits answer to most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tezo_ds.output_layer.columns import Added, Made, silent_count
from tezo_ds.output_layer.newton import by_halves
from tezo_ds.output_layer.principal import principal
from tezo_ds.output_layer.totals import Totals

SILENT = 16  # directions of inputs to be silent along at most
# Of the term that the linear problem asks for, which knows nothing of effects at other positions nor of what
# is not linear: the whole of it overshoots.
HALF = 0.5


@dataclass(frozen=True)
class Gathered:
    """What is known of a value projection for the examples of a rank.

    Attributes:
        inputs: p of each head at the labelled position, (n, H, width), in the dtype of the forward.
        sums: of the logits' answers to each number that the heads give, over the examples that were asked:
            float64 (C, H * size).
        counts: examples that were asked for each, float64 (H * size,).
        others: x at some positions before the labelled ones, (m, width).
        groups: number of values that heads share.
        rows: which of the numbers that the map gives are values, int64 (groups * size,).
        outputs: how many it gives, m.
    """

    inputs: Tensor
    sums: Tensor
    counts: Tensor
    others: Tensor
    groups: int
    rows: Tensor
    outputs: int

    @property
    def nbytes(self) -> int:
        """Bytes that they take on this rank."""
        parts = (self.inputs, self.sums, self.counts, self.others)
        return sum(part.nbytes for part in parts)

    @staticmethod
    def joined(parts: Sequence[Gathered]) -> Gathered:
        """Returns what is known of the examples of several batches."""
        sums, counts = (
            torch.stack([p.sums for p in parts]),
            torch.stack([p.counts for p in parts]),
        )
        inputs, others = ([p.inputs for p in parts], [p.others for p in parts])
        return Gathered(
            torch.cat(inputs),
            sums.sum(dim=0),
            counts.sum(dim=0),
            torch.cat(others),
            parts[0].groups,
            parts[0].rows,
            parts[0].outputs,
        )

    def columns(self, left: Tensor, count: int, states: float, total: Totals) -> Values:
        """Returns the projection's columns, in units of all ranks' examples.

        Args:
            left: not used: U follows from the answers.
            count: number of examples over all ranks.
            states: variance of a number of the output layer's states, on average.
            total: sums over ranks.
        """
        heads = self.inputs.shape[1]
        squares = self.inputs.double().square().sum(dim=(0, 1))
        found = total(torch.cat([self.sums.flatten(), self.counts, squares]))
        sums, counts, squares = found.split([self.sums.numel(), len(self.counts), len(squares)])
        answers = sums.view(len(self.sums), -1) / counts.clamp(min=1)
        of_values, J = _answered(answers.unflatten(1, (heads, -1)), self.groups)
        U = of_values.new_zeros(self.outputs, of_values.shape[1])
        U[self.rows] = of_values
        # Heads that share a value gather alike, and all of them move by one change of A, so it is held less.
        size = float(J.square().sum(dim=(1, 2)).mean().sqrt()) / math.sqrt(heads)
        return Values(self, U, J, (squares / (count * heads)).sqrt(), size, states, total)


def _answered(answers: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Returns U, float32 (groups * size, groups * K), with the same bits on any processor, and J, (H, C, K).

    Args:
        answers: mean of ∂z/∂o over examples, float64 (C, H, size).
        groups: number of values that heads share.
    """
    words, heads, size = answers.shape
    rank, each = min(words, size), heads // groups
    centred = answers - by_halves(answers.permute(1, 2, 0))[None] / words
    U = torch.zeros(groups, size, groups, rank, dtype=torch.float64)
    for g in range(groups):
        rows = centred[:, g * each : (g + 1) * each].flatten(0, 1)  # (C * each, size)
        gram = by_halves((rows[:, :, None] * rows[:, None]).permute(1, 2, 0))
        found = principal(lambda x, gram=gram: by_halves(x[:, None] * gram[None]), size, rank)  # type: ignore[misc]
        U[g, :, g, : len(found)] = found.t()
    own = torch.stack([U[g, :, g] for g in range(groups)])  # (groups, size, K)
    J = torch.einsum("chs,hsk->hck", answers, own.repeat_interleave(each, dim=0))
    return U.flatten(2).flatten(0, 1).float().contiguous(), J


class Values(Added):
    """A of a value projection, K rows for each group of heads.

    Args:
        gathered: this rank's.
        J: float64 (H, C, K).
        left, rms, size, states, total: as of `Added`.
    """

    def __init__(
        self, gathered: Gathered, left: Tensor, J: Tensor, rms: Tensor, size: float, states: float,
        total: Totals,
    ) -> None:  # fmt: skip
        self._gathered, self._J = gathered, J.to(gathered.inputs.device)
        self._each = len(J) // gathered.groups  # heads of a group
        self._known = Made(self._scaled)
        super().__init__(
            left, rms, size, states, gathered.others, silent_count(len(rms), SILENT), total
        )

    def _scaled(self, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns p in their units, (k, H * width), of some examples, and J. A row has all heads, so that two
        products of matrices make all that follows."""
        inputs = self._gathered.inputs[rows].double() / self.units.to(rows.device)
        return inputs.to(dtype).flatten(1), self._J.to(dtype)

    def term(self, rows: Tensor, x: Tensor) -> Tensor:
        """Returns Σ_h J_h A_g(h) p_h, (k, C)."""
        inputs, J = self._known(rows, x.dtype)
        A = self._quiet(x).view(self._gathered.groups, -1, x.shape[1])  # (groups, K, width)
        each = J @ A.repeat_interleave(self._each, dim=0)  # (H, C, width)
        return inputs @ each.transpose(1, 2).flatten(0, 1)

    def gradient(self, rows: Tensor, slopes: Tensor) -> Tensor:
        """Returns Σ (J_hᵀ slopes) p_hᵀ over examples and the heads of each group."""
        inputs, J = self._known(rows, slopes.dtype)
        each = (slopes.t() @ inputs).unflatten(1, (len(J), -1)).transpose(0, 1)  # (H, C, width)
        each = J.transpose(1, 2) @ each  # (H, K, width)
        return self._quiet(each.unflatten(0, (-1, self._each)).sum(dim=1).flatten(0, 1))

    def solution(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns U (m, groups * K) and A (groups * K, width), float32; of A the half."""
        U, A = super().solution(x)
        return U, HALF * A
