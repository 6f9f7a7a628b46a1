"""LoRA (arXiv 2106.09685): y + (α / r) (x Aᵀ) Bᵀ, the adapter that MeZO (LoRA) trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tezo_ds.adapters.base import Adapter, Shape, Weights

ALPHA = 16


@dataclass(frozen=True)
class LoraAdapter(Adapter):
    """A of rank rows and B of rank columns; B begins at zero.

    Attributes:
        size: inputs and outputs of the layer.
        rank: r.
    """

    size: tuple[int, int]
    rank: int

    kind: ClassVar[str] = "lora"
    no_merge: ClassVar[str] = (
        "an adapter lora is merged by peft; load it by PeftModel.from_pretrained and merge_and_unload"
    )

    @property
    def shapes(self) -> dict[str, Shape]:
        return {"A": (self.rank, self.size[0]), "B": (self.size[1], self.rank)}

    @property
    def prepared_numel(self) -> int:
        return self.numel

    def deviations(self) -> dict[str, float]:
        """Returns for A the deviation of peft's uniform initial values."""
        return {"A": 1 / math.sqrt(3 * self.size[0]), "B": 0.0}

    def prepare(self, parameters: Mapping[str, Tensor]) -> Weights:
        """Returns Aᵀ and (α / r) Bᵀ."""
        return parameters["A"].mT, parameters["B"].mT * (ALPHA / self.rank)

    def term(self, weights: Weights, h: Tensor) -> Tensor:
        inner, outer = weights
        return h.to(inner.dtype) @ inner @ outer

    def described(self) -> dict[str, Any]:
        return {"size": list(self.size), "rank": self.rank, "alpha": ALPHA}
