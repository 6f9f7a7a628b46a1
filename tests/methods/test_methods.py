"""Every method of the engine against its oracle, on one process and by both probes."""

from __future__ import annotations

import pytest
import torch
from reference_cases import quick_draws
from tiny import make_batch, tiny
from torch import nn

import tezo_ds
from tezo_ds.methods import reference

STEPS, LR = (
    9,  # two periods of CASES, and a beginning of a third
    {"tezo-adam": 2e-4, "tezo-adam-coef": 2e-4, "mezo-adam": 2e-4, "mezo": 3e-5, "mezo-m": 3e-5},
)
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


pytestmark = pytest.mark.usefixtures(quick_draws.__name__)

CASES = [
    ("tezo", {}), ("tezo", {"refresh_every": 4}), ("tezo-m", {"refresh_every": 4}),
    ("tezo-m", {}), ("tezo-adam", {}), ("tezo-adam", {"bias_correction": False, "refresh_every": 4}),
    ("tezo-m", {"refresh_every": 4, "keep_periods": 2}),
    ("tezo-adam-coef", {}), ("lozo", {"nu": 3}), ("lozo", {"nu": 3, "rank_scaling": True}),
    ("lozo-m", {"nu": 3}), ("mezo", {}), ("mezo-m", {}), ("mezo-adam", {}),
]  # fmt: skip


# Each model's own way of using a weight, by both probes where there are two.
KINDS = [
    ("llama", True, {}), ("llama", False, {"train_vectors": True}), ("opt", True, {"train_vectors": True}),
    ("gpt2", True, {"train_vectors": True}), ("neox", False, {}), ("mixtral", False, {"probe": "inplace"}),
    ("qwen-moe", False, {"probe": "inplace", "train_vectors": True}),
]  # fmt: skip


def assert_engine_is_oracle(kind: str, tied: bool, fields: dict, steps: int) -> None:
    model = tiny(kind, tied).double()
    engine = tezo_ds.initialize(tiny(kind, tied).double(), fields)
    assert engine.probe.name == fields["probe"]
    names = list(engine.space.slices)
    assert bool(engine.space.vectors) == fields.get("train_vectors", False)
    batches = [make_batch(3, seed=step) for step in range(steps)]
    records = oracle(model, names, fields["method"], fields, batches)
    for record, batch in zip(records, batches, strict=True):
        report = engine.step(batch)
        torch.testing.assert_close(report.kappa, tuple(record.kappas), rtol=1e-4, atol=1e-5)
    merged = engine.state_dict()
    for name, before in model.named_parameters():
        if name in names:
            moved, expected = merged[name] - before, record.weights[name] - before
            scale = expected.abs().max().item()
            torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-4 * scale)
            assert scale > 1e-7
        else:
            assert torch.equal(merged[name], before)


BY_PROBE = [
    (method, more, probe)
    for method, more in CASES
    for probe in ("fused", "inplace")
    if probe == "inplace" or not method.startswith("mezo")  # whose directions are dense
]


@pytest.mark.parametrize(("method", "more", "probe"), BY_PROBE)
def test_the_engine_is_the_oracle(method: str, more: dict, probe: str) -> None:
    fields = {
        **FIELDS,
        "lr": LR.get(method, FIELDS["lr"]),
        "method": method,
        "probe": probe,
        **more,
    }
    assert_engine_is_oracle("llama", True, fields, STEPS)


@pytest.mark.parametrize("method", ["tezo-m", "tezo-adam", "lozo-m", "mezo-adam"])
@pytest.mark.parametrize(("kind", "tied", "more"), KINDS)
def test_on_models_of_every_kind(kind: str, tied: bool, more: dict, method: str) -> None:
    probe = "inplace" if method.startswith("mezo") else "fused"
    fields = {
        **FIELDS,
        "lr": LR.get(method, FIELDS["lr"]),
        "method": method,
        "probe": probe,
        "nu": 2,
    }
    assert_engine_is_oracle(kind, tied, {**fields, **more}, 3)
