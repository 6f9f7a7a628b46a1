"""The convex problem of the output layer: label words' rows and biases fitted to hidden states.

With the hidden state h of an example and the logits z of its C words the term is z'_c = z_c + ΔW_c·h + b_c,
and what is least is the mean cross-entropy of z' among the words + λ‖ΔW‖² (+ a trifle of ‖b‖², without
which the bias of a word that no example has would have no least loss). Terms of inner layers, of which the
logits are a linear function as long as they are small, may stand beside it, see `columns`.

Ranks keep the states of their own examples, and add up the loss and its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tezo_ds.errors import ProbeError
from tezo_ds.output_layer.choosing import Quality
from tezo_ds.output_layer.columns import CHUNK, Answers, Columns, Head
from tezo_ds.output_layer.newton import Product, minimise
from tezo_ds.output_layer.totals import AllReduce, Totals
from tezo_ds.output_layer.values import Gathered

# λ over the states' mean square, the strongest first; written out, as powers differ by library
GRID = (
    1.0, 0.31622776601683794, 1e-1, 0.03162277660168379, 1e-2, 0.0031622776601683794, 1e-3,
    0.00031622776601683794, 1e-4, 3.1622776601683795e-05, 1e-5,
)  # fmt: skip


@dataclass(frozen=True)
class States:
    """Hidden states before the output layer, one an example of this rank, in the order of the batches.

    Attributes:
        hidden: (n, d), in the dtype of the forward.
        logits: the words' logits without the term, (n, C).
        truth: index of the right word, int64 (n,).
        held: whether the example is held out, bool (n,).
        inner: of each inner layer that is fitted, too.
        directions: U of inner layers that are a block's last map, float32 (d, K); empty without any.
        multiplier: what the model multiplies its output layer's result by; the logits are behind that.
    """

    hidden: Tensor
    logits: Tensor
    truth: Tensor
    held: Tensor
    inner: Sequence[Answers | Gathered] = ()
    directions: Tensor = field(default_factory=lambda: torch.empty(0))
    multiplier: float = 1.0

    @property
    def nbytes(self) -> int:
        """Bytes that the states take on this rank."""
        own = sum(part.nbytes for part in (self.hidden, self.logits, self.truth, self.held))
        return own + sum(answers.nbytes for answers in self.inner)


def problem_of(states: States, bias_alone: bool, all_reduce: AllReduce) -> Problem:
    """Returns the problem, see `fit.choice`, whose arguments and errors it has."""
    problem = Problem(states, bias_alone, all_reduce)
    if not math.isfinite(problem.scale + problem.size):  # on all ranks alike
        raise ProbeError(
            "output_layer: a hidden state or logit of the training examples is not finite; try "
            "--dtype float32, or leave it frozen"
        )
    return problem


class Problem:
    """The loss and its gradient, over all ranks, in float64 as a function of x: the variables of all columns,
    one matrix after the other, flat.

    Attributes:
        alone: whether the biases alone are variables.
        large: whether value projections are among the inner layers.
        counts: examples, those to fit by, those held out.
        scale: mean square of the centred states.
        multiplier: as of `States`.
        size: sum of the squares of the logits, and of what is known of inner layers.
    """

    def __init__(self, states: States, bias_alone: bool, all_reduce: AllReduce) -> None:
        self._states, self.alone, self.multiplier = states, bias_alone, states.multiplier
        self._chunks: dict[bool | None, Sequence[Tensor]] = {}
        self.large = any(isinstance(x, Gathered) for x in states.inner)
        self.totals = self._total = Totals(all_reduce)
        hidden, words = states.hidden, states.logits.shape[1]
        device, width = hidden.device, hidden.shape[1]
        held = states.held.sum().double()
        everyone = torch.tensor(float(len(states.held)), device=device, dtype=torch.float64)
        sums = self._sums(lambda rows: hidden[rows].double().sum(dim=0), width)
        found = self._total(torch.cat([torch.stack([everyone, held]), sums]))
        n, out = int(found[0]), int(found[1])
        self.counts = (n, n - out, out)
        mean = (found[2:] / n).to(device)
        squares = self._sums(lambda rows: (hidden[rows].double() - mean).square().sum(dim=0), width)
        self._head = Head(hidden, words, mean, self._total(squares) / n)
        self.scale = self._head.scale
        self._inner = [
            x.columns(states.directions, n, self.scale / width, self._total) for x in states.inner
        ]
        self._columns: list[Columns] = [self._head, *self._inner]
        logits = states.logits.double().square().sum()[None]
        self.size = float(self._total(logits)[0]) + sum(float(x.units.sum()) for x in self._inner)

    @property
    def strengths(self) -> Sequence[float]:
        """What λ is chosen from, the strongest first; of biases alone there is nothing to choose."""
        return [0.0] if self.alone else [share * self.scale for share in GRID]

    def zero(self) -> Tensor:
        """Returns x of no term."""
        return torch.cat([torch.zeros_like(c.curves).flatten() for c in self._columns])

    def least(self, x: Tensor, strength: float, held: bool | None, tolerance: float) -> Tensor:
        """Returns the x that is best for λ = strength, begun at another.

        Args:
            x: where to begin.
            strength: λ.
            held: which examples count: those held out or not; None: all.
            tolerance: length of the gradient at which to end.
        """
        ridge = torch.cat([columns.ridge(strength).flatten() for columns in self._columns])
        curves = torch.cat([c.curves.flatten() for c in self._columns]) + 2 * ridge
        # Where states are all alike nothing can be told by them, and nothing curves.
        units = torch.where(curves > 0, 1 / curves.sqrt(), 0.0)
        if self.alone:
            of_rows = units[: self._head.curves.numel()].view(self._head.shape)
            of_rows[:, :-1] = 0

        def slopes(u: Tensor) -> tuple[Tensor, Product]:
            point = u * units
            likely, gradient = self._slopes(point, held)

            def product(v: Tensor) -> Tensor:
                w = v * units
                return (self._product(likely, w, held) + 2 * ridge * w) * units

            return (gradient + 2 * ridge * point) * units, product

        start = torch.where(units > 0, x / units, torch.zeros_like(x))
        return minimise(slopes, start, tolerance) * units

    def quality(self, x: Tensor) -> Quality:
        """Returns how well x does on the examples that are held out."""
        total = self._total(self._sums(self._judge(x), 2, True))
        loss, right = (total / max(1, self.counts[2])).tolist()
        return Quality(loss, right)

    def losses(self, x: Tensor) -> Tensor:
        """Returns the cross-entropy of each example of this rank that is held out: float64 (k,)."""
        found = [
            F.cross_entropy(self._logits(rows, x), self._states.truth[rows], reduction="none")
            for rows in self._places(True)
        ]
        return torch.cat([self._states.logits[:0, 0].double(), *found])

    def solution(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], list[tuple[Tensor, Tensor]]]:
        """Returns ΔW (C, d) and b (C,) of x, and U and A of each inner layer: float32, for states as they
        are."""
        ours, *theirs = self._matrices(x)
        pairs = zip(self._inner, theirs, strict=True)
        return self._head.solution(ours), [inner.solution(part) for inner, part in pairs]

    def _slopes(self, x: Tensor, held: bool | None) -> tuple[Tensor, Tensor]:
        """Returns the words' probabilities p, of this rank's examples that count, (k, C), and the gradient of
        the mean cross-entropy over all ranks' examples, Σ (p - y) ∂z' / n, flat."""
        parts: list[Tensor] = [self._states.logits[:0].double()]

        def sums(rows: Tensor) -> Tensor:
            logits, truth = self._logits(rows, x), self._states.truth[rows]
            parts.append(logits.softmax(dim=1))
            return self._gradient(rows, parts[-1] - F.one_hot(truth, logits.shape[1]))

        gradient = self._mean_of(sums, held, len(x))
        return torch.cat(parts), gradient

    def _product(self, likely: Tensor, x: Tensor, held: bool | None) -> Tensor:
        """Returns the Hessian at probabilities p times x: Σ (p ∘ (s - p·s)) ∂z' / n with s the term of x.
        A step of Newton's need not be exact, so this is made in single precision, which is sooner done."""
        likely, x, done = likely.float(), x.float(), 0

        def sums(rows: Tensor) -> Tensor:
            nonlocal done
            p = likely[done : done + len(rows)]
            done += len(rows)
            s = self._term(rows, x)
            return self._gradient(rows, p * (s - (p * s).sum(dim=1, keepdim=True)))

        return self._mean_of(sums, held, len(x))

    def _judge(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        def sums(rows: Tensor) -> Tensor:
            logits, truth = self._logits(rows, x), self._states.truth[rows]
            loss = F.cross_entropy(logits, truth, reduction="sum")
            return torch.stack([loss, (logits.argmax(dim=1) == truth).sum().double()])

        return sums

    def _matrices(self, x: Tensor) -> list[Tensor]:
        parts = x.split([columns.curves.numel() for columns in self._columns])
        return [part.view(c.shape) for c, part in zip(self._columns, parts, strict=True)]

    def _term(self, rows: Tensor, x: Tensor) -> Tensor:
        pairs = zip(self._columns, self._matrices(x.to(rows.device)), strict=True)
        return torch.stack([columns.term(rows, part) for columns, part in pairs]).sum(dim=0)

    def _logits(self, rows: Tensor, x: Tensor) -> Tensor:
        return self._states.logits[rows].double() + self._term(rows, x)

    def _gradient(self, rows: Tensor, slopes: Tensor) -> Tensor:
        return torch.cat([c.gradient(rows, slopes).flatten() for c in self._columns])

    def _mean_of(self, sums: Callable[[Tensor], Tensor], held: bool | None, size: int) -> Tensor:
        count = self.counts[{None: 0, False: 1, True: 2}[held]]
        return self._total(self._sums(sums, size, held)) / max(1, count)

    def _sums(
        self, of: Callable[[Tensor], Tensor], size: int, held: bool | None = None
    ) -> Tensor:  # fmt: skip
        """Returns the sum over chunks of this rank's examples that count: `of` (their places), (size,)."""
        total = torch.zeros(size, device=self._states.hidden.device, dtype=torch.float64)
        for rows in self._places(held):
            total += of(rows)
        return total

    def _places(self, held: bool | None) -> Sequence[Tensor]:
        """Returns the places of the examples that count, a chunk at a time, the same tensors each time."""
        if held not in self._chunks:
            everyone = torch.arange(len(self._states.held), device=self._states.held.device)
            chosen = everyone if held is None else everyone[self._states.held == held]
            self._chunks[held] = chosen.split(CHUNK) if len(chosen) else ()
        return self._chunks[held]
