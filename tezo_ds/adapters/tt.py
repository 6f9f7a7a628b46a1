"""Tensor-train adapter of TT-ZO (AdaZeta, arXiv 2406.18060): h + up(act(down(h))), whose two layers are
tensor trains with a bias each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tezo_ds.adapters.base import Adapter, Shape, Weights
from tezo_ds.adapters.contraction import halves, one_by_one
from tezo_ds.adapters.modes import Modes, balanced, divided
from tezo_ds.config import TezoConfig
from tezo_ds.errors import ConfigError

ACTS: dict[str, Callable[[Tensor], Tensor]] = {"relu": Tensor.relu_, "tanh": Tensor.tanh_}


@dataclass(frozen=True)
class TensorTrainAdapter(Adapter):
    """Two trains, whose chains of cores are each other's mirror image: down has the modes of the layer's
    size and then those of the bottleneck, up the same from the last to the first.

    Attributes:
        size: the layer's size, twice.
        bottleneck: size between the two layers.
        rank: largest rank of a core.
        modes: of the layer's size, and of the bottleneck.
        zero: whether up's last core begins at zero, so that the adapted model is the base.
        parallel: whether `prepare` contracts the cores; otherwise `term` does, one after the other.
        act: nonlinearity between the two, a key of ACTS.
    """

    size: tuple[int, int]
    bottleneck: int
    rank: int
    modes: tuple[Modes, Modes]
    zero: bool = True
    parallel: bool = True
    act: str = "relu"

    kind: ClassVar[str] = "tt"
    no_merge: ClassVar[str] = (
        "tensor trains with a nonlinearity between them cannot be merged into the weights, nor does peft "
        "know them; load the adapter by tezo_ds.adapters.load(model, folder)"
    )

    @classmethod
    def of(cls, config: TezoConfig, size: int) -> TensorTrainAdapter:
        """Returns the adapter of a layer's size that a config asks for.

        Raises:
            ConfigError: the bottleneck is above the size, or given modes do not fit.
        """
        if config.bottleneck > size:
            raise ConfigError(
                f"bottleneck: {config.bottleneck} is above the size {size} of the layers that get an "
                f"adapter; use at most {size}"
            )
        modes = balanced(size), balanced(config.bottleneck)
        if config.tt_modes:
            modes = divided(config.tt_modes, size, config.bottleneck)
        return cls(
            (size, size), config.bottleneck, config.tt_rank, modes, config.tt_init == "zero",
            config.contraction == "parallel", config.tt_act,
        )  # fmt: skip

    @property
    def shapes(self) -> dict[str, Shape]:
        chain = [*self.modes[0], *self.modes[1]]
        found: dict[str, Shape] = {}
        for layer, modes in (("down", chain), ("up", chain[::-1])):
            ranks = [1, *[self.rank] * (len(modes) - 1), 1]
            for k, mode in enumerate(modes):
                found[f"{layer}.{k}"] = (ranks[k], mode, ranks[k + 1])
        return {**found, "down.bias": (self.bottleneck,), "up.bias": (self.size[1],)}

    @property
    def prepared_numel(self) -> int:
        biases = self.bottleneck + self.size[1]
        return biases + 2 * self.rank * biases if self.parallel else self.numel

    def deviations(self) -> dict[str, float]:
        """Returns deviations by which W's entries, sums of rank^(cores - 1) products, have √(1 / (N + M))."""
        cores = len(self.modes[0]) + len(self.modes[1])
        variance = 1 / (self.size[0] + self.bottleneck) / self.rank ** (cores - 1)
        found = {
            name: 0.0 if name.endswith("bias") else variance ** (1 / (2 * cores))
            for name in self.shapes
        }
        if self.zero:
            found[f"up.{cores - 1}"] = 0.0
        return found

    def _cores(self, parameters: Mapping[str, Tensor], layer: str) -> list[Tensor]:
        cores = len(self.modes[0]) + len(self.modes[1])
        return [parameters[f"{layer}.{k}"] for k in range(cores)]

    def prepare(self, parameters: Mapping[str, Tensor]) -> Weights:
        """Returns biases, and left and right of down and up; or biases and all cores."""
        down, up = self._cores(parameters, "down"), self._cores(parameters, "up")
        biases = parameters["down.bias"], parameters["up.bias"]
        if not self.parallel:
            return *biases, *down, *up
        inputs, outputs = map(len, self.modes)
        large, small = self.size[0], self.bottleneck
        return *biases, *halves(down, inputs, (large, small)), *halves(up, outputs, (small, large))

    def term(self, weights: Weights, h: Tensor) -> Tensor:
        down_bias, up_bias, *rest = weights
        h = h.to(up_bias.dtype)
        if not self.parallel:
            return self._one_by_one(h, down_bias, up_bias, rest)
        down_left, down_right, up_left, up_right = rest
        z = torch.baddbmm(
            down_bias[:, None], h @ down_left, down_right
        )  # (branches, rows, bottleneck)
        return torch.baddbmm(up_bias[:, None], ACTS[self.act](z) @ up_left, up_right)

    def _one_by_one(
        self, h: Tensor, down_bias: Tensor, up_bias: Tensor, cores: list[Tensor]
    ) -> Tensor:
        inputs, outputs = map(len, self.modes)
        down, up = cores[: inputs + outputs], cores[inputs + outputs :]
        z = one_by_one(h, down, inputs, self.bottleneck) + down_bias[:, None]
        return one_by_one(ACTS[self.act](z), up, outputs, self.size[1]) + up_bias[:, None]

    def described(self) -> dict[str, Any]:
        return {
            "size": self.size[0], "bottleneck": self.bottleneck, "rank": self.rank,
            "modes": [list(modes) for modes in self.modes], "act": self.act,
        }  # fmt: skip

    @classmethod
    def from_described(
        cls, size: int, bottleneck: int, rank: int, modes: list[list[int]], act: str = "relu"
    ) -> TensorTrainAdapter:
        """Inverse of `described`; files without an act are of relu.

        Raises:
            ValueError: the modes' products are below the sizes.
        """
        large, small = map(tuple, modes)
        if math.prod(large) < size or math.prod(small) < bottleneck:
            raise ValueError(f"modes {modes} are too few for {size} and {bottleneck}")
        return cls((size, size), bottleneck, rank, (large, small), act=act)
