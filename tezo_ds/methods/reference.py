"""Every method as its paper's algorithm box has it: one process, dense, direction by direction, float64.

The definition that a sharded engine is tested against. It writes whole perturbations into copies of
whole weights, so it is for small models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tezo_ds.directions.draws import dense, factors, fresh_left, tau
from tezo_ds.sharding.view import matrix_shape

METHODS = (
    *("tezo", "tezo-m", "tezo-adam", "tezo-adam-coef"),
    *("lozo", "lozo-m"),
    *("mezo", "mezo-m", "mezo-adam"),
)

Weights = dict[str, Tensor]
Loss = Callable[[int, Weights], Any]


@dataclass(frozen=True)
class Fields:
    """Options of a method besides lr and rho.

    Attributes:
        seed: the run's seed.
        rank: r of every matrix, or of each by name; None: 2 for LOZO, else 16.
        queries: Q, directions a step.
        per_example: whether each example of a step measures Q directions of its own, by its own loss.
        momentum: β of the methods -m.
        betas: β₁, β₂ of the methods -adam and -adam-coef.
        eps: added to Adam's √V.
        bias_correction: whether Adam divides its moments by 1 - βᵗ, t counted from 1.
        refresh_every: steps between new U and V (TeZO); 0: never.
        nu: steps between new V (LOZO).
        rank_scaling: whether LOZO divides its gradient by r.
    """

    seed: int = 0
    rank: int | Mapping[str, int] | None = None
    queries: int = 1
    per_example: bool = False
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    bias_correction: bool = True
    refresh_every: int = 0
    nu: int = 50
    rank_scaling: bool = False


@dataclass(frozen=True)
class Record:
    """One step: its number, κ of each direction, and the weights after it (clones, float64)."""

    step: int
    kappas: list[float]
    weights: Weights


def run(
    method: str,
    weights: Mapping[str, Tensor],
    loss: Loss,
    steps: int,
    lr: float,
    rho: float,
    **fields: Any,
) -> Iterator[Record]:
    """Takes `steps` steps from `weights`, which are left as they are.

    Args:
        method: one of METHODS.
        weights: parameters by name, of any float dtype; two dims or more are seen as a matrix (m, n) =
            (product of leading dims, last), fewer as a vector.
        loss: L(step, weights), called with float64 CPU tensors of the parameters' own shapes; with
            `per_example` a list of each example's loss, whose mean is L.
        steps: number of steps.
        lr: η.
        rho: ρ.
        fields: attributes of `Fields`.

    Yields:
        A `Record` for each step.

    Raises:
        ValueError: `method` is unknown. TypeError: a field is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
    options = Fields(**fields)
    W = {name: w.detach().to("cpu", torch.float64, copy=True) for name, w in weights.items()}
    parameters = {name: _parameter(method, name, w, options) for name, w in W.items()}
    return _steps(W, parameters, loss, range(steps), lr, rho, options)


def _steps(
    W: Weights, parameters: dict[str, _Parameter], loss: Loss, steps: range, lr: float, rho: float,
    options: Fields,
) -> Iterator[Record]:  # fmt: skip
    for step in steps:
        kappas = []
        examples = len(loss(step, W)) if options.per_example else 1
        for q in range(examples * options.queries):
            Z = {name: p.direction(step, q).view_as(W[name]) for name, p in parameters.items()}
            above = loss(step, {name: W[name] + rho * Z[name] for name in W})
            below = loss(step, {name: W[name] - rho * Z[name] for name in W})
            if options.per_example:  # of its own example alone
                above, below = above[q // options.queries], below[q // options.queries]
            kappas.append((float(above) - float(below)) / (2 * rho))
        for name, parameter in parameters.items():
            W[name] -= lr * parameter.descent(step, kappas).view_as(W[name])
        yield Record(step, kappas, {name: w.clone() for name, w in W.items()})


class _Sgd:
    """Plain rule: g itself. Any rule takes gradients of one shape, step after step."""

    def __init__(self, options: Fields) -> None:
        self.options = options
        self.restart()

    def restart(self) -> None:
        """Forgets all gradients."""

    def __call__(self, g: Tensor) -> Tensor:
        """Returns the change to subtract for g, of g's shape."""
        return g


class _Momentum(_Sgd):
    """Momentum rule: m ← βm + (1-β)g."""

    def restart(self) -> None:
        self.m = torch.zeros((), dtype=torch.float64)

    def __call__(self, g: Tensor) -> Tensor:
        b = self.options.momentum
        self.m = b * self.m + (1 - b) * g
        return self.m


class _Adam(_Sgd):
    """Adam rule: M/(√V + ε), M and V the means of g and g²."""

    def restart(self) -> None:
        self.t, self.M, self.V = 0, *torch.zeros(2, dtype=torch.float64)

    def moments(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Returns M and V, corrected for their start at zero under `bias_correction`."""
        b1, b2 = self.options.betas
        self.t += 1
        self.M = b1 * self.M + (1 - b1) * g
        self.V = b2 * self.V + (1 - b2) * g**2
        if not self.options.bias_correction:
            return self.M, self.V
        return self.M / (1 - b1**self.t), self.V / (1 - b2**self.t)

    def __call__(self, g: Tensor) -> Tensor:
        M, V = self.moments(g)
        return M / (V.sqrt() + self.options.eps)


_RULES = {"": _Sgd, "m": _Momentum, "adam": _Adam, "adam-coef": _Adam}


@dataclass
class _Parameter(ABC):
    """One parameter, and the rule that holds its state. In this base the rule sees the whole gradient."""

    name: str
    m: int
    n: int  # of a vector all its numbers, with m = 1
    rank: int
    rule: _Sgd
    options: Fields

    @abstractmethod
    def direction(self, step: int, q: int) -> Tensor:
        """Returns Z of one direction, (m, n)."""

    def descent(self, step: int, kappas: list[float]) -> Tensor:
        """Returns the change that a step subtracts, ÷ lr: (m, n). Called once a step, in order."""
        return self.rule(_mean(k * self.direction(step, q) for q, k in enumerate(kappas)))


class _Vector(_Parameter):
    """A bias or a norm's weight: dense under every method, and never refreshed."""

    def direction(self, step: int, q: int) -> Tensor:
        return tau(self.name, self.n, self.options.seed, step, q).double()[None]  # (1, n)


class _Mezo(_Parameter):
    """MeZO (arXiv 2305.17333): Z of independent numbers."""

    def direction(self, step: int, q: int) -> Tensor:
        rows, columns = torch.arange(self.m), range(self.n)
        return dense(self.name, self.options.seed, step, q, rows, columns).double()  # (m, n)


class _Tezo(_Parameter):
    """TeZO (arXiv 2501.19057): Z = U diag(τ) Vᵀ, only τ fresh; the rule works on the r coefficients.

    Rules are plain, -m, and our own -adam-coef.
    """

    def basis(self, step: int) -> tuple[Tensor, Tensor]:
        """Returns U (m, r) and V (n, r) of a step."""
        every = self.options.refresh_every
        seed = self.options.seed + (step // every if every else 0)
        U, V = factors(self.name, (self.m, self.n), self.rank, seed)
        return U.double(), V.double()

    def tau(self, step: int, q: int) -> Tensor:
        return tau(self.name, self.rank, self.options.seed, step, q).double()  # (r)

    def direction(self, step: int, q: int) -> Tensor:
        U, V = self.basis(step)
        return U @ torch.diag(self.tau(step, q)) @ V.T  # (m, n)

    def descent(self, step: int, kappas: list[float]) -> Tensor:
        every = self.options.refresh_every
        if every and step > 0 and step % every == 0:
            self.rule.restart()  # what it remembers are coefficients of the old basis
        g = _mean(k * self.tau(step, q) for q, k in enumerate(kappas))  # (r)
        return self.expand(g, *self.basis(step))

    def expand(self, g: Tensor, U: Tensor, V: Tensor) -> Tensor:
        return U @ torch.diag(self.rule(g)) @ V.T  # (m, n)


class _TezoAdam(_Tezo):
    """TeZO-Adam: Adam's quotient element by element, of moments that are kept by coefficients.

    The second one is separable, (U∘U) diag(τ_V) (V∘V)ᵀ: the square of U diag(g) Vᵀ without its cross terms.
    """

    rule: _Adam

    def expand(self, g: Tensor, U: Tensor, V: Tensor) -> Tensor:
        tau_M, tau_V = self.rule.moments(g)  # (r), (r)
        first = U @ torch.diag(tau_M) @ V.T  # (m, n)
        second = (U * U) @ torch.diag(tau_V) @ (V * V).T  # (m, n)
        return first / (second.sqrt() + self.options.eps)


class _Lozo(_Parameter):
    """LOZO (arXiv 2410.07698): Z = UVᵀ, U fresh for each direction, V for every ν-th step."""

    def left(self, step: int, q: int) -> Tensor:
        rows = torch.arange(self.m)
        return fresh_left(self.name, self.rank, self.options.seed, step, q, rows).double()  # (m, r)

    def right(self, step: int) -> Tensor:
        seed = self.options.seed + step // self.options.nu
        return factors(self.name, (self.m, self.n), self.rank, seed)[1].double()  # (n, r)

    def direction(self, step: int, q: int) -> Tensor:
        return self.left(step, q) @ self.right(step).T  # (m, n)

    def descent(self, step: int, kappas: list[float]) -> Tensor:
        V = self.right(step)
        if isinstance(self.rule, _Momentum) and step > 0 and step % self.options.nu == 0:
            # N Vᵀ as near as the new V can say it: VᵀV ≈ nI.
            self.rule.m = self.rule.m @ self.right(step - 1).T @ V / self.n
        scale = 1 / self.rank if self.options.rank_scaling else 1.0
        g = scale * _mean(k * self.left(step, q) for q, k in enumerate(kappas))  # (m, r)
        return self.rule(g) @ V.T  # (m, n)


def _mean(gradients: Iterator[Tensor]) -> Tensor:
    return torch.stack(list(gradients)).mean(dim=0)


_FAMILIES: dict[str, Callable[..., _Parameter]] = {"tezo": _Tezo, "lozo": _Lozo, "mezo": _Mezo}


def _parameter(method: str, name: str, weight: Tensor, options: Fields) -> _Parameter:
    """Returns the parameter `name` at the start of a run."""
    family, _, kind = method.partition("-")
    rule = _RULES[kind](options)
    if weight.dim() < 2:
        return _Vector(name, 1, weight.numel(), 1, rule, options)
    rank = options.rank if options.rank is not None else 2 if family == "lozo" else 16
    r = rank[name] if isinstance(rank, Mapping) else rank
    made = _TezoAdam if method == "tezo-adam" else _FAMILIES[family]
    return made(name, *matrix_shape(weight.shape), r, rule, options)
