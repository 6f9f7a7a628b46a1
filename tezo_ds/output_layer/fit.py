"""The convex problem of the output layer: label words' rows and biases fitted to hidden states.

With the hidden state h of an example and the logits z of its C words the term is z'_c = z_c + ΔW_c·h + b_c,
and what is least is the mean cross-entropy of z' among the words + λ‖ΔW‖² (+ a trifle of ‖b‖², without
which the bias of a word that no example has would have no least loss). States are centred, which moves
ΔW times their mean into b and leaves the problem as it is.

Ranks keep the states of their own examples, and add up the loss and its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tezo_ds.errors import ProbeError
from tezo_ds.output_layer.choosing import Quality, choose
from tezo_ds.output_layer.newton import Product, dot, minimise
from tezo_ds.output_layer.totals import AllReduce, Totals

# λ over the states' mean square, the strongest first; written out, as powers differ by library
GRID = (
    1.0, 0.31622776601683794, 1e-1, 0.03162277660168379, 1e-2, 0.0031622776601683794, 1e-3,
    0.00031622776601683794, 1e-4, 3.1622776601683795e-05, 1e-5,
)  # fmt: skip
TRIFLE = 1e-5  # of ‖b‖²
ROUGHLY, EXACTLY = (
    1e-6,
    1e-9,
)  # length of the gradient, in variables that curve alike; to choose λ, and then
CHUNK = 4096  # states at a time in float64


@dataclass(frozen=True)
class States:
    """Hidden states before the output layer, one an example of this rank, in the order of the data.

    Attributes:
        hidden: (n, d), in the dtype of the forward.
        logits: the words' logits without the term, (n, C).
        truth: index of the right word, int64 (n,).
        held: whether the example is held out, bool (n,).
    """

    hidden: Tensor
    logits: Tensor
    truth: Tensor
    held: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that the states take on this rank."""
        return sum(part.nbytes for part in (self.hidden, self.logits, self.truth, self.held))


@dataclass(frozen=True)
class Fitted:
    """A fitted term, the same bits on every rank.

    Attributes:
        weight: ΔW, float32 (C, d); zero where the bias alone was fitted. With a basis B, (C, r).
        bias: b, float32 (C,).
        strength: λ; None where the bias alone was fitted.
        examples: states over all ranks.
        before, after: of the examples that are held out, without the term and with one fitted to the others.
        messages: all-reduces.
        message_bytes: bytes of the largest.
        basis: A, float32 (r, d), for which ΔW is B A; None: ΔW is the weight.
    """

    weight: Tensor
    bias: Tensor
    strength: float | None
    examples: int
    before: Quality
    after: Quality
    messages: int
    message_bytes: int
    basis: Tensor | None = None


def fit(states: States, bias_alone: bool, all_reduce: AllReduce) -> Fitted:
    """Fits the term. Every rank calls this with the states of its own examples.

    Args:
        states: this rank's.
        bias_alone: whether ΔW stays zero.
        all_reduce: adds a float64 tensor up over the ranks, in place, and returns it.

    Raises:
        ProbeError: a hidden state or a logit is not finite.
    """
    problem = _Problem(states, bias_alone, all_reduce)
    x = problem.zero()
    before = problem.quality(x)
    if not math.isfinite(problem.scale + problem.size):  # on all ranks alike
        raise ProbeError(
            "output_layer: a hidden state or logit of the training examples is not finite; try "
            "--dtype float32, or leave it frozen"
        )
    strengths = [0.0] if bias_alone else [share * problem.scale for share in GRID]
    strength, after = choose(problem, x, strengths, ROUGHLY)
    x = problem.least(x, strength, None, EXACTLY)
    weight, bias = problem.term(x)
    return Fitted(
        weight, bias, None if bias_alone else strength, problem.counts[0], before, after,
        problem.totals.messages, problem.totals.message_bytes,
    )  # fmt: skip


class _Problem:
    """The loss and its gradient, over all ranks, in float64 as a function of x = (ΔW | b), C rows of d + 1.

    Attributes:
        counts: examples, those to fit by, those held out.
        scale: mean square of the centred states.
        size: sum of the squares of the logits.
    """

    def __init__(self, states: States, bias_alone: bool, all_reduce: AllReduce) -> None:
        self._states, self._alone = states, bias_alone
        self.totals = self._total = Totals(all_reduce)
        self._words, self._width = states.logits.shape[1], states.hidden.shape[1]
        device = states.hidden.device
        held = states.held.sum().double()
        everyone = torch.tensor(float(len(states.held)), device=device, dtype=torch.float64)
        sums = self._sums(lambda h, _: h.sum(dim=0), torch.zeros(self._width, device=device))
        found = self._total(torch.cat([torch.stack([everyone, held]), sums]))
        n, out = int(found[0]), int(found[1])
        self.counts = (n, n - out, out)
        self._mean = (found[2:] / n).to(device)
        squares = self._sums(
            lambda h, _: (h - self._mean).square().sum(dim=0), torch.zeros_like(self._mean)
        )
        self._variance = self._total(squares) / n  # (d,)
        logits = states.logits.double().square().sum()[None]
        self.size = float(self._total(logits)[0])
        self.scale = dot(self._variance, torch.ones_like(self._variance))

    def zero(self) -> Tensor:
        """Returns x of no term."""
        return torch.zeros(self._words, self._width + 1, dtype=torch.float64).flatten()

    def least(self, x: Tensor, strength: float, held: bool | None, tolerance: float) -> Tensor:
        """Returns the x that is best for λ = strength, begun at another.

        Args:
            x: where to begin.
            strength: λ.
            held: which examples count: those held out or not; None: all.
            tolerance: length of the gradient at which to end.
        """
        ridge = torch.full((self._words, self._width + 1), strength, dtype=torch.float64)
        ridge[:, -1] = TRIFLE
        # Variables in which a logistic loss, which curves by a quarter at most, curves alike all over.
        curves = torch.cat([self._variance, torch.ones(1, dtype=torch.float64)]) / 4
        units = 1 / (curves + 2 * ridge).sqrt()
        if self._alone:
            units[:, :-1] = 0
        ridge, units = ridge.flatten(), units.flatten()

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
        total = self._total(self._sums(self._judge(x, True), torch.zeros(2)))
        loss, right = (total / max(1, self.counts[2])).tolist()
        return Quality(loss, right)

    def term(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ΔW and b of x for states as they are, not centred: float32 (C, d) and (C,)."""
        matrix = x.view(self._words, -1)
        weight, mean = matrix[:, :-1].float().contiguous(), self._mean.cpu()
        moved = [dot(row.double(), mean) for row in weight]  # by the weight as it was rounded
        bias = matrix[:, -1] - torch.tensor(moved, dtype=torch.float64)
        return weight, bias.float()

    def _slopes(self, x: Tensor, held: bool | None) -> tuple[Tensor, Tensor]:
        """Returns the words' probabilities p, of this rank's examples that count, (k, C), and the gradient of
        the mean cross-entropy over all ranks' examples, Σ (p - y) hᵀ / n, flat."""
        parts: list[Tensor] = []

        def sums(hidden: Tensor, part: slice) -> Tensor:
            hidden, logits, truth = self._chosen(hidden, part, held, x)
            parts.append(logits.softmax(dim=1))
            return self._by_row(parts[-1] - F.one_hot(truth, self._words), hidden)

        gradient = self._mean_of(sums, held)
        return torch.cat([x.new_empty(0, self._words).to(self._mean.device), *parts]), gradient

    def _product(self, likely: Tensor, x: Tensor, held: bool | None) -> Tensor:
        """Returns the Hessian at probabilities p times x: Σ (p ∘ (s - p·s)) hᵀ / n with s = X h."""
        done = 0

        def sums(hidden: Tensor, part: slice) -> Tensor:
            nonlocal done
            hidden, _, _ = self._chosen(hidden, part, held, None)
            p = likely[done : done + len(hidden)]
            done += len(hidden)
            s = self._term(hidden, x)
            return self._by_row(p * (s - (p * s).sum(dim=1, keepdim=True)), hidden)

        return self._mean_of(sums, held)

    def _mean_of(self, sums: Callable[[Tensor, slice], Tensor], held: bool | None) -> Tensor:
        size = self._words * (self._width + 1)
        count = self.counts[{None: 0, False: 1, True: 2}[held]]
        return self._total(self._sums(sums, torch.zeros(size))) / max(1, count)

    @staticmethod
    def _by_row(slopes: Tensor, hidden: Tensor) -> Tensor:
        """Returns gradients by x, flat, of logits' slopes (k, C)."""
        return torch.cat([slopes.t() @ hidden, slopes.sum(dim=0)[:, None]], dim=1).flatten()

    def _term(self, hidden: Tensor, x: Tensor) -> Tensor:
        matrix = x.to(hidden.device).view(self._words, -1)
        return hidden @ matrix[:, :-1].t() + matrix[:, -1]

    def _judge(self, x: Tensor, held: bool) -> Callable[[Tensor, slice], Tensor]:
        def sums(hidden: Tensor, part: slice) -> Tensor:
            _, logits, truth = self._chosen(hidden, part, held, x)
            loss = F.cross_entropy(logits, truth, reduction="sum")
            return torch.stack([loss, (logits.argmax(dim=1) == truth).sum().double()])

        return sums

    def _chosen(
        self, hidden: Tensor, part: slice, held: bool | None, x: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns centred states, logits with the term of x, and truth of the examples that count."""
        states, hidden = self._states, hidden - self._mean
        logits, truth = states.logits[part].double(), states.truth[part]
        if held is not None:
            rows = (states.held[part] == held).nonzero()[:, 0]
            logits, truth, hidden = logits[rows], truth[rows], hidden[rows]
        return hidden, logits if x is None else logits + self._term(hidden, x), truth

    def _sums(self, of: Callable[[Tensor, slice], Tensor], zero: Tensor) -> Tensor:
        """Returns the sum over chunks of this rank's states: `of` (states in float64, which they are)."""
        hidden = self._states.hidden
        total = zero.to(hidden.device, torch.float64)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            total += of(hidden[part].double(), part)
        return total
