"""An update rule of your own: `python examples/custom_method.py HuggingFaceTB/SmolLM2-135M`.

TeZO whose step is a Lion step, the sign of a moving average of g = Σ slope · τ. Replicas compute it alike
from the scalars that they agree on; directions, probes, sharding and resuming know nothing of it.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM

import tezo_ds
from tezo_ds.directions.rounding import Storing
from tezo_ds.methods import MethodFacts, register
from tezo_ds.methods.descent import Sgd
from tezo_ds.methods.tezo import Tezo


class LionTezo(Tezo):
    """a ← a − η sign(β₁m + (1 − β₁)g);  m ← β₂m + (1 − β₂)g, with β = 0.9 and 0.99."""

    def __init__(self, space, config):
        super().__init__(space, Sgd(), config.refresh_every, Storing.of(config))
        self.average = torch.zeros_like(self.coefficients)  # float64 (D,), equal on every rank

    def update(self, step, slopes, gradient, lr):
        self.coefficients -= lr * torch.lerp(gradient, self.average, 0.9).sign()
        self.average.lerp_(gradient, 0.01)
        return None  # no weight is written

    @property
    def state(self):
        return {**super().state, "average": self.space.pack(self.average)}  # as snapshots need it


def make(config, space, device):
    return LionTezo(space, config)


facts = {"fixed_factors": True, "learns_coefficients": True}
register("lion-tezo", MethodFacts(f"{__name__}:make", "TeZO by Lion's signs", **facts))


def main(name: str, steps: int = 10) -> tezo_ds.Engine:
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    engine = tezo_ds.initialize(model, {"method": "lion-tezo", "rank": 8, "lr": 1e-4})
    words = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (4, 12), generator=words)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    for _ in range(steps):
        report = engine.step(batch)
        print(f"step {report.step}  loss {report.loss:.4f}")
    return engine


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
