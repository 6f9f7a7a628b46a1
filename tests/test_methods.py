"""Every method of the engine against its oracle, on one process and by both probes."""

from __future__ import annotations

import pytest
import torch
from tiny import make_batch, tiny
from torch import nn

import tezo_ds
from tezo_ds.methods import reference

STEPS, LR = 23, {"tezo-adam": 2e-4, "tezo-adam-coef": 2e-4, "mezo-adam": 2e-4}
FIELDS = {"seed": 7, "rank": 3, "rho": 1e-2, "queries": 2, "lr": 3e-4}


def oracle(model: nn.Module, names: list[str], method: str, fields: dict, batches: list[dict]):
    """Records of the oracle on a copy of a model's weights."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if name in names}

    def loss(step: int, changed: dict[str, torch.Tensor]) -> float:
        batch = batches[step]
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        logits = torch.func.functional_call(model, changed, kwargs=inputs, tie_weights=True).logits
        labels = batch["labels"][:, 1:]
        return nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100
        ).item()

    known = reference.Fields.__dataclass_fields__
    options = {name: value for name, value in fields.items() if name in known}
    with torch.no_grad():
        yield from reference.run(
            method, weights, loss, len(batches), fields["lr"], fields["rho"], **options
        )


CASES = [
    ("tezo", {}), ("tezo", {"refresh_every": 8}), ("tezo-m", {"refresh_every": 8}),
    ("tezo-m", {}), ("tezo-adam", {}), ("tezo-adam", {"bias_correction": False, "refresh_every": 8}),
    ("tezo-adam-coef", {}), ("lozo", {"nu": 5}), ("lozo", {"nu": 5, "rank_scaling": True}),
    ("lozo-m", {"nu": 5}), ("mezo", {}), ("mezo-m", {}), ("mezo-adam", {}),
]  # fmt: skip


@pytest.mark.parametrize("probe", ["fused", "inplace"])
@pytest.mark.parametrize("kind", ["llama"])
@pytest.mark.parametrize(("method", "more"), CASES)
def test_the_engine_is_the_oracle(kind: str, method: str, more: dict, probe: str) -> None:
    if method.startswith("mezo") and probe == "fused":
        pytest.skip("dense directions are for the in-place probe")
    fields = {**FIELDS, "lr": LR.get(method, FIELDS["lr"]), **more}
    model = tiny(kind).double()
    engine = tezo_ds.initialize(tiny(kind).double(), {**fields, "method": method, "probe": probe})
    names = list(engine.space.slices)
    batches = [make_batch(3, seed=step) for step in range(STEPS)]
    for record, batch in zip(oracle(model, names, method, fields, batches), batches, strict=True):
        report = engine.step(batch)
        torch.testing.assert_close(report.kappa, tuple(record.kappas), rtol=1e-5, atol=1e-6)
        merged = engine.state_dict()
        for name in names:
            torch.testing.assert_close(merged[name], record.weights[name], rtol=1e-7, atol=1e-9)
    before = dict(model.named_parameters())
    assert all(not torch.equal(merged[name], before[name]) for name in names)
