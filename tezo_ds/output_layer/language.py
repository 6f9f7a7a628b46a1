"""The convex problem of a language-model loss: a term of rank r on the logits of all words that are labels.

With the hidden state h of a position the logit of a word w that is a label somewhere becomes
z_w + B_w·A h + b_w; A, (r, d), are the leading principal directions of the states, and fixed. What is
least is the mean cross-entropy among the whole vocabulary + λ(‖B‖² + ‖b‖² / s), with s the states' mean
square along A.

All other words' logits stay, so one number a position, their log-sum-exp, says all of them; their rows
would get nothing but pushes down, which the normaliser of the others gives as well. Nobody holds positions x
words: what is kept are hidden states, and logits are made again a few positions at a time.
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
from tezo_ds.output_layer.columns import CHUNK
from tezo_ds.output_layer.fit import Fitted
from tezo_ds.output_layer.lbfgs import minimise
from tezo_ds.output_layer.newton import by_halves
from tezo_ds.output_layer.principal import principal
from tezo_ds.output_layer.totals import AllReduce, Totals

CHUNK_NUMEL = 1 << 22  # logits at a time, in float64
# Ridge over the curvature of a word that is always half likely, strongest first; written out, as powers
# differ by library
GRID = (
    1.0, 1e-1, 0.03162277660168379, 1e-2, 0.0031622776601683794, 1e-3, 0.00031622776601683794, 1e-4,
    3.1622776601683795e-05, 1e-5, 3.1622776601683795e-06, 1e-6,
)  # fmt: skip
# Length of the gradient, in variables that curve by one at the start; to choose λ, and then
ROUGHLY, EXACTLY = 1e-3, 1e-6


@dataclass(frozen=True)
class TokenStates:
    """Hidden states before the output layer, one a labelled position of this rank, in the order of the data.

    Attributes:
        hidden: (n, d), in the dtype of the forward.
        others: log-sum-exp of the logits of all tokens that are no words, and the largest of them, (n, 2).
        truth: index of the right word, int64 (n,).
        held: whether the example is held out, bool (n,).
        rows: the words' rows of the output layer, (words, d), as hidden, times the multiplier.
        offset: their biases there, (words,), times the multiplier.
        multiplier: what the model multiplies its output layer's result by.
    """

    hidden: Tensor
    others: Tensor
    truth: Tensor
    held: Tensor
    rows: Tensor
    offset: Tensor
    multiplier: float = 1.0

    @property
    def nbytes(self) -> int:
        """Bytes that the states take on this rank."""
        parts = (self.hidden, self.others, self.truth, self.held, self.rows, self.offset)
        return sum(part.nbytes for part in parts)


def fit_tokens(states: TokenStates, rank: int, all_reduce: AllReduce) -> Fitted:
    """Fits the term. Every rank calls this with the states of its own examples.

    Args:
        states: this rank's.
        rank: r, at most; 0: biases alone.
        all_reduce: adds a float64 tensor up over the ranks, in place, and returns it.

    Raises:
        ProbeError: a hidden state or a logit is not finite.
    """
    problem = _Problem(states, rank, all_reduce)
    x = problem.zero()
    before = problem.quality(x)
    share, after, x = choose(problem, x, GRID, ROUGHLY)
    weight, basis, bias = problem.term(problem.least(x, share, None, EXACTLY))
    totals, strength = problem.totals, share * (problem.scale if len(basis) else 1.0)
    return Fitted(
        weight, bias, strength, problem.counts[0], before, after, totals.messages, totals.message_bytes,
        basis, multiplier=states.multiplier,
    )  # fmt: skip


class _Problem:
    """The gradient of the loss over all ranks, in float64 as a function of x = (B | b), r + 1 numbers a word.

    Attributes:
        counts: positions, those to fit by, those held out.
        scale: mean square of the centred states along A.
    """

    def __init__(self, states: TokenStates, rank: int, all_reduce: AllReduce) -> None:
        self._states = states
        self.totals = self._total = Totals(all_reduce)
        self._words, width = states.rows.shape
        held = states.held
        self._places = {
            None: torch.arange(len(held), device=held.device),
            True: held.nonzero()[:, 0],
            False: (~held).nonzero()[:, 0],
        }
        seen = [torch.bincount(states.truth[rows], minlength=self._words) for rows in self._parts]
        found = self._total(torch.cat(seen).double())
        right = found.view(2, -1)  # labels of each word: to fit by, held out
        n, out = int(right.sum()), int(right[1].sum())
        self.counts = (n, n - out, out)
        # The other words have no example to be fitted by, as most of a test's have none.
        self._fitted = right[0] > 0
        self._mean = torch.zeros(width, dtype=torch.float64, device=held.device)
        # log-sum-exps of no tokens at all are -inf
        odd = (states.others.isnan() | (states.others == math.inf)).sum().double()[None]
        sums = self._total(torch.cat([odd, self._over(lambda h: h.sum(dim=0), self._mean)]))
        if not math.isfinite(float(by_halves(sums))) or sums[0]:  # on all ranks alike
            raise ProbeError(
                "output_layer: a hidden state or logit of the training examples is not finite; try "
                "--dtype float32, or leave it frozen"
            )
        self._mean = (sums[1:] / n).to(held.device)
        basis = principal(self._moments, width, rank) if rank else torch.zeros(0, width)
        self._basis = basis.float()  # as the term has it
        self._onto = self._basis.double().to(held.device)
        squares = self._over(
            lambda h: (h @ self._onto.t()).square().sum(dim=0), self._onto.new_zeros(len(basis))
        )
        self._variance = self._total(squares) / n  # (r,)
        self.scale = float(by_halves(self._variance))
        likely = self._slopes(self.zero(), None, likely=True).view(self._words, -1)[:, -1]
        self._often = torch.maximum(likely, right.sum(dim=0) / n)

    @property
    def _parts(self) -> tuple[Tensor, Tensor]:
        return self._places[False], self._places[True]

    def zero(self) -> Tensor:
        """Returns x of no term."""
        return torch.zeros(self._words * (len(self._basis) + 1), dtype=torch.float64)

    def least(self, x: Tensor, strength: float, held: bool | None, tolerance: float) -> Tensor:
        """Returns the x that is best, begun at another; words without an example that counts have no term.

        Args:
            x: where to begin.
            strength: λ / s.
            held: which positions count: those held out or not; None: all.
            tolerance: length of the gradient at which to end.
        """
        ridge = strength * torch.cat(
            [torch.full_like(self._variance, self.scale), torch.ones(1, dtype=torch.float64)]
        )
        curves = torch.cat([self._variance, torch.ones(1, dtype=torch.float64)])
        # A logistic loss curves by the share p(1 - p) of how often a word is likely.
        units = 1 / (self._often[:, None] * curves + 2 * ridge).sqrt()  # (words, r + 1)
        if held is False:
            units[~self._fitted] = 0
        twice, units = 2 * ridge.expand_as(units).flatten(), units.flatten()

        def gradient_at(u: Tensor) -> Tensor:
            point = u * units
            return (self._slopes(point, held) + twice * point) * units

        start = torch.where(units > 0, x / units, torch.zeros_like(x))
        return minimise(gradient_at, start, tolerance) * units

    def quality(self, x: Tensor) -> Quality:
        """Returns how well x does on the examples that are held out."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._mean.device)
        for rows in self._chunks(True):
            logits, _, whole = self._logits(rows, x)
            truth = self._states.truth[rows]
            own = logits.gather(1, truth[:, None])[:, 0]
            most = self._states.others[rows, 1]
            right = (logits.argmax(dim=1) == truth) & (own >= most)
            sums += torch.stack([(whole - own).sum(), right.sum().double()])
        loss, accuracy = (self._total(sums) / max(1, self.counts[2])).tolist()
        return Quality(loss, accuracy)

    def term(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns B, A and b of x for states as they are: float32 (words, r), (r, d), (words,)."""
        matrix = x.view(self._words, -1)
        weight, mean = matrix[:, :-1].float().contiguous(), self._mean.cpu()
        along = by_halves(self._basis.double() * mean)  # (r,)
        bias = matrix[:, -1] - by_halves(weight.double() * along)  # by the weight as it was rounded
        return weight, self._basis, bias.float()

    def _slopes(self, x: Tensor, held: bool | None, likely: bool = False) -> Tensor:
        """Returns the gradient of the mean cross-entropy over all ranks' positions, Σ (p - y) (A h)ᵀ / n,
        flat; with `likely` that of the normaliser alone, Σ p (A h)ᵀ / n."""
        matrix = torch.zeros(
            self._words, len(self._basis) + 1, dtype=torch.float64, device=self._mean.device
        )
        for rows in self._chunks(held):
            logits, inner, whole = self._logits(rows, x)
            slopes = logits.sub_(whole[:, None]).exp_()  # p, of this chunk's positions
            if not likely:
                slopes[torch.arange(len(rows), device=rows.device), self._states.truth[rows]] -= 1
            matrix[:, :-1] += slopes.t() @ inner
            matrix[:, -1] += slopes.sum(dim=0)
        count = self.counts[{None: 0, False: 1, True: 2}[held]]
        return self._total(matrix.flatten()) / max(1, count)

    def _chunks(self, held: bool | None) -> tuple[Tensor, ...]:
        """Returns places of this rank's positions that count, a chunk of them at a time."""
        return self._places[held].split(max(1, CHUNK_NUMEL // self._words))

    def _logits(self, rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the words' logits with the term of x, (k, words), A h of centred states, (k, r), and the
        log-sum-exp of all logits, (k,)."""
        states = self._states
        hidden = states.hidden[rows]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logits = F.linear(hidden.to(wide), states.rows.to(wide), states.offset.to(wide)).double()
        inner = (hidden.double() - self._mean) @ self._onto.t()
        matrix = x.to(hidden.device).view(self._words, -1)
        logits += F.linear(inner, matrix[:, :-1], matrix[:, -1])
        whole = torch.logaddexp(logits.logsumexp(dim=1), states.others[rows, 0].double())
        return logits, inner, whole

    def _moments(self, directions: Tensor) -> Tensor:
        """Returns directions (k, d) times the sum of the centred states' outer products, over all ranks."""
        rows = directions.to(self._mean.device)
        return self._total(self._over(lambda h: (rows @ h.t()) @ h, torch.zeros_like(rows)))

    def _over(self, of: Callable[[Tensor], Tensor], zero: Tensor) -> Tensor:
        """Returns the sum of `of` (centred states in float64) over chunks of this rank's states."""
        total = zero.clone()
        for hidden in self._states.hidden.split(CHUNK):
            total += of(hidden.double() - self._mean)
        return total
