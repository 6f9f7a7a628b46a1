"""Descent from a gradient estimate to a step: plain, with momentum, or Adam; of any numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from tezo_ds.config import TezoConfig

Count = Tensor | float


class Descent(ABC):
    """Rule x ← x - η · step(g), elementwise.

    Attributes:
        state: the rule's tensors by name, of the shape of g.
    """

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    @abstractmethod
    def step(self, gradient: Tensor, count: Count) -> Tensor:
        """Takes in g and returns step(g), of the shape of g.

        Args:
            gradient: g.
            count: steps since the state was empty, this one included; of each number, or of all.
        """


class Sgd(Descent):
    """Plain descent: step(g) = g."""

    def step(self, gradient: Tensor, count: Count) -> Tensor:
        return gradient


class Momentum(Descent):
    """Descent with momentum: step(g) = m ← β₁m + (1-β₁)g."""

    def __init__(self, like: Tensor, beta1: float) -> None:
        super().__init__()
        self._beta1 = beta1
        self.state = {"momentum": torch.zeros_like(like)}

    def step(self, gradient: Tensor, count: Count) -> Tensor:
        return self.state["momentum"].mul_(self._beta1).add_(gradient, alpha=1 - self._beta1)


class Adam(Descent):
    """Adam: m ← β₁m + (1-β₁)g, v ← β₂v + (1-β₂)g², step(g) = m̂ / (√v̂ + ε).

    Args:
        like: a tensor of the shape, dtype and device of g.
        betas: β₁ and β₂.
        eps: ε.
        bias_correction: m̂ = m / (1-β₁ᵗ), v̂ = v / (1-β₂ᵗ); otherwise m and v themselves.
    """

    def __init__(
        self, like: Tensor, betas: tuple[float, float], eps: float, bias_correction: bool
    ) -> None:
        super().__init__()
        self._betas, self.eps, self._corrects = betas, eps, bias_correction
        self.state = {"moment1": torch.zeros_like(like), "moment2": torch.zeros_like(like)}

    def note(self, gradient: Tensor) -> None:
        """Updates m and v by g."""
        beta1, beta2 = self._betas
        self.state["moment1"].mul_(beta1).add_(gradient, alpha=1 - beta1)
        self.state["moment2"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)

    def corrections(self, count: Count) -> tuple[Count, Count]:
        """Returns the factors of m and v that correct their bias, 1 where none is asked for."""
        if not self._corrects:
            return 1.0, 1.0
        beta1, beta2 = self._betas
        return 1 / (1 - beta1**count), 1 / (1 - beta2**count)

    def step(self, gradient: Tensor, count: Count) -> Tensor:
        self.note(gradient)
        first, second = self.corrections(count)
        root = (self.state["moment2"] * second).sqrt_().add_(self.eps)
        return (self.state["moment1"] * first).div_(root)


def descent_of(config: TezoConfig, like: Tensor) -> Descent:
    """Makes the descent that a method's facts name, at its start, of numbers shaped and typed as `like`."""
    if config.facts.descent == "momentum":
        return Momentum(like, config.momentum)
    if config.facts.descent == "adam":
        return Adam(like, config.betas, config.eps, config.bias_correction)
    return Sgd()
