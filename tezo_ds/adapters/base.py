"""Base of all adapters: a small function with parameters of its own, added to what a module takes or gives.

An adapter is a shape: names and sizes of its parameters, their initial values, and a forward for several
branches at once, each with parameters of its own. Where one stands is an `AdapterSite`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from tezo_ds.rng.philox import derive_key, normals

Weights = tuple[
    Tensor, ...
]  # an adapter's parameters as its products take them, (branches, …) each
Shape = tuple[int, ...]


class Adapter(ABC):
    """A function h -> term, and the parameters that it has.

    Two adapters are equal if their parameters have the same shapes, so that those of many sites can be
    prepared at once.

    Attributes:
        kind: value of the config's `adapter`.
        no_merge: why its terms do not go into the weights, and what to do, in a phrase.
        size: sizes of h and of the term.
    """

    kind: ClassVar[str]
    no_merge: ClassVar[str]
    size: tuple[int, int]

    @property
    @abstractmethod
    def shapes(self) -> dict[str, Shape]:
        """Shape of each parameter, by its name within the adapter."""

    @property
    def numel(self) -> int:
        """Number of all parameters."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    @abstractmethod
    def prepared_numel(self) -> int:
        """Number of all numbers that `prepare` gives for a branch."""

    @abstractmethod
    def deviations(self) -> dict[str, float]:
        """Returns the standard deviation of each parameter's initial values, 0 where they are zeros."""

    @abstractmethod
    def prepare(self, parameters: Mapping[str, Tensor]) -> Weights:
        """Returns what `term` takes; parameters and results have the same leading dims.

        Args:
            parameters: (…, *shape) by name.
        """

    @abstractmethod
    def term(self, weights: Weights, h: Tensor) -> Tensor:
        """Returns the term of each row: (branches, rows, size[1]), in the dtype of the weights.

        Args:
            weights: result of `prepare`, (branches, …) each.
            h: (branches, rows, size[0]), of any dtype.
        """

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """Returns the arguments by which the adapter is made again, as JSON."""

    def split(self, packed: Tensor) -> dict[str, Tensor]:
        """Returns views of (…, numel) by name: (…, *shape)."""
        parts = packed.split([math.prod(shape) for shape in self.shapes.values()], dim=-1)
        return {
            name: part.view(*part.shape[:-1], *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def initial(self, prefix: str, seed: int) -> Tensor:
        """Returns all parameters at the start of a run, float64 (numel,): normals that are addressed by the
        parameter's name and the element, so the same on every rank.

        Args:
            prefix: name of the site, which the names begin with.
            seed: the run's seed.
        """
        deviations, first = self.deviations(), torch.zeros(1, dtype=torch.int64)
        parts = []
        for name, shape in self.shapes.items():
            part = torch.zeros(math.prod(shape), dtype=torch.float64)
            if deviations[name]:
                k0, k1 = derive_key(seed, f"{prefix}.{name}", "initial")
                z = normals((torch.tensor([k0]), torch.tensor([k1])), first, len(part))[0]
                # Rounded, as the last bit of a power is not the same on all machines.
                part = z.double() * torch.tensor(deviations[name], dtype=torch.float32).double()
            parts.append(part)
        return torch.cat(parts)
