"""What each part of the convex problem's variables adds to the words' logits, and what a ridge makes it cost.

Of the output layer that is z' = z + ΔW h + b, of an inner layer z' = z + J A x: x is what enters the linear
map, U A its change, and J = ∂z/∂(its output) · U how an example's logits answer to the columns of U.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tezo_ds.output_layer.newton import dot
from tezo_ds.output_layer.principal import principal
from tezo_ds.output_layer.totals import Totals

TRIFLE = 1e-5  # of ‖b‖²
FLOOR = 1e-2  # of the mean rms of an inner layer's inputs, below which none is taken to be
SILENT, SHARE = 64, 8  # directions of inputs to be silent along: so many, or one of so many inputs
CHUNK = 4096  # states or inputs at a time in float64


@dataclass(frozen=True)
class Answers:
    """What is known of an inner layer for each example of a rank.

    Attributes:
        inputs: x at the labelled position, (n, width), in the dtype of the forward.
        responses: J, (n, C, K).
        others: x at some positions before the labelled ones, (m, width).
    """

    inputs: Tensor
    responses: Tensor
    others: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that they take on this rank."""
        return self.inputs.nbytes + self.responses.nbytes + self.others.nbytes

    @staticmethod
    def joined(parts: Sequence[Answers]) -> Answers:
        """Returns what is known of the examples of several batches."""
        return Answers(
            torch.cat([part.inputs for part in parts]),
            torch.cat([part.responses for part in parts]),
            torch.cat([part.others for part in parts]),
        )

    def columns(self, left: Tensor, count: int, states: float, total: Totals) -> Inner:
        """Returns the layer's columns, in units of all ranks' examples.

        Args:
            left: U, float32 (m, K).
            count: number of examples over all ranks.
            states: variance of a number of the output layer's states, on average.
            total: sums over ranks.
        """
        squares = self.inputs.double().square().sum(dim=0)
        length = self.responses.double().square().sum()
        found = total(torch.cat([squares, length[None]])) / count
        return Inner(self, left, found[:-1].sqrt(), float(found[-1].sqrt()), states, total)


class Columns(Protocol):
    """A part of the variables, a matrix of `shape`, of which logits are a linear function.

    Attributes:
        curves: by how much the mean loss curves along each variable at most, roughly: float64 of `shape`.
    """

    curves: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""

    def ridge(self, strength: float) -> Tensor:
        """Returns what the square of each variable costs, float64 of `shape`."""

    def term(self, rows: Tensor, x: Tensor) -> Tensor:
        """Returns what is added to the logits of some examples, (k, C), computed in the dtype of x."""

    def gradient(self, rows: Tensor, slopes: Tensor) -> Tensor:
        """Returns the gradient of `shape` for slopes (k, C) of the examples' logits, in their dtype."""


class Made:
    """What is made of some examples; in single precision the last is at hand, as a solver asks for the same
    again and again."""

    def __init__(self, make: Callable[[Tensor, torch.dtype], tuple[Tensor, ...]]) -> None:
        self._make, self._rows = make, torch.empty(0)
        self._last: tuple[Tensor, ...] = ()

    def __call__(self, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        if dtype == torch.float64:
            return self._make(rows, dtype)
        if self._rows is not rows:
            self._rows, self._last = rows, self._make(rows, dtype)
        return self._last


class Head:
    """ΔW and b of the output layer, C rows of d + 1. States are centred, which moves ΔW times their mean
    into b and leaves the problem as it is.

    Attributes:
        scale: mean square of the centred states.

    Args:
        hidden: states of this rank's examples, (n, d).
        words: C.
        mean, variance: of each number of the states over all ranks' examples, float64 (d,).
    """

    def __init__(self, hidden: Tensor, words: int, mean: Tensor, variance: Tensor) -> None:
        self._hidden, self._mean = hidden, mean.to(hidden.device)
        self._known = Made(self._centred)
        self.shape = (words, hidden.shape[1] + 1)
        self.scale = dot(variance, torch.ones_like(variance))
        # Variables in which a logistic loss, which curves by a quarter at most, curves alike all over.
        self.curves = torch.cat([variance, torch.ones(1).double()]).expand(self.shape) / 4

    def ridge(self, strength: float) -> Tensor:
        """Returns λ, and a trifle for the biases."""
        ridge = torch.full(self.shape, strength, dtype=torch.float64)
        ridge[:, -1] = TRIFLE
        return ridge

    def _centred(self, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor]:
        return ((self._hidden[rows].double() - self._mean).to(dtype),)

    def term(self, rows: Tensor, x: Tensor) -> Tensor:
        """Returns ΔW h + b, (k, C)."""
        (states,) = self._known(rows, x.dtype)
        return states @ x[:, :-1].t() + x[:, -1]

    def gradient(self, rows: Tensor, slopes: Tensor) -> Tensor:
        """Returns the gradients by ΔW and by b."""
        (states,) = self._known(rows, slopes.dtype)
        return torch.cat([slopes.t() @ states, slopes.sum(dim=0)[:, None]], dim=1)

    def solution(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ΔW and b for states as they are, not centred: float32 (C, d) and (C,)."""
        weight, mean = x[:, :-1].float().contiguous(), self._mean.cpu()
        moved = [dot(row.double(), mean) for row in weight]  # by the weight as it was rounded
        return weight, (x[:, -1] - torch.tensor(moved, dtype=torch.float64)).float()


class Added:
    """A of what is added within the model, in units in which inputs and responses are alike: x over its root
    mean squares, J over its own. The ridge bears on these units as that of the output layer bears on states
    whose numbers have a variance of one, so that one λ serves all.

    The term acts at the positions before the labelled one as well, and J knows nothing of what follows from
    that. So A is silent, A p = 0, along the directions p that most of the inputs there lie along.

    Attributes:
        shape: of A, (K, width).
        units: what each input is divided by, float64 (width,).

    Args:
        left: U, float32 (m, K).
        rms: of each input over all ranks' examples, float64 (width,).
        size: root mean square of J, as a matrix's length, over all ranks' examples.
        states: variance of a number of the output layer's states, on average.
        others: inputs at other positions, of this rank, (m, width).
        silent: along how many directions to be silent at most.
        total: sums over ranks.
    """

    def __init__(
        self, left: Tensor, rms: Tensor, size: float, states: float, others: Tensor, silent: int,
        total: Totals,
    ) -> None:  # fmt: skip
        floor = FLOOR * dot(rms, torch.ones_like(rms)) / len(rms)
        self.units = (rms + floor) * size
        self.units[self.units == 0] = 1  # nothing enters, or nothing answers
        self.shape = (left.shape[1], len(rms))
        self._left, self._states, self._others = left, states, others
        self.curves = torch.full(self.shape, 0.25 / self.shape[0], dtype=torch.float64)
        self._silent = principal(lambda rows: total(self._moments(rows)), len(rms), silent)

    def _moments(self, rows: Tensor) -> Tensor:
        """Returns directions (k, width) times Σ x xᵀ of this rank's inputs at other positions, in units."""
        others = self._others
        rows = rows.to(others.device)
        found = torch.zeros_like(rows)
        for part in others.split(CHUNK):
            x = part.double() / self.units.to(rows.device)
            found += (rows @ x.t()) @ x
        return found

    def _quiet(self, x: Tensor) -> Tensor:
        """Returns x without what it has along the directions to be silent along: (K, width)."""
        silent = self._silent.to(x)
        return x - (x @ silent.t()) @ silent

    def ridge(self, strength: float) -> Tensor:
        """Returns λ in this part's units."""
        return torch.full(self.shape, strength / (self._states or 1.0), dtype=torch.float64)

    def solution(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns U (m, K) and A (K, width) for inputs as they are, float32."""
        return self._left, (self._quiet(x) / self.units).float()


class Inner(Added):
    """A of the last linear map of a block: of its output layer z' = z + J A x, with J of each example.

    Args:
        answers: this rank's.
        left, rms, size, states, total: as of `Added`.
    """

    def __init__(
        self, answers: Answers, left: Tensor, rms: Tensor, size: float, states: float, total: Totals
    ) -> None:
        self._answers = answers
        self._known = Made(self._scaled)
        super().__init__(left, rms, size, states, answers.others, silent_count(len(rms)), total)

    def _scaled(self, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns inputs in their units, (k, width), and J, (k, C, K), of some examples."""
        inputs = self._answers.inputs[rows].double() / self.units.to(rows.device)
        return inputs.to(dtype), self._answers.responses[rows].to(dtype)

    def term(self, rows: Tensor, x: Tensor) -> Tensor:
        """Returns J A x, (k, C)."""
        inputs, J = self._known(rows, x.dtype)
        return torch.einsum("nck,nk->nc", J, inputs @ self._quiet(x).t())

    def gradient(self, rows: Tensor, slopes: Tensor) -> Tensor:
        """Returns Σ (Jᵀ slopes) xᵀ."""
        inputs, J = self._known(rows, slopes.dtype)
        return self._quiet(torch.einsum("nck,nc->nk", J, slopes).t() @ inputs)


def silent_count(width: int, most: int = SILENT) -> int:
    """Returns along how many directions an inner layer of so many inputs is silent at most."""
    return min(most, width // SHARE)
