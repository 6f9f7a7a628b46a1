"""Misuse of the Python API ends in one line that says what to pass, and leaves the engine usable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import make_batch, tiny
from torch import nn

import tezo_ds
from tezo_ds.export.adapter import save_adapter
from tezo_ds.export.merged import save_merged

BATCH = make_batch(3)
IDS, LABELS = BATCH["input_ids"], BATCH["labels"]


def one_line(work: Callable[[], object], words: str) -> None:
    with pytest.raises(tezo_ds.TezoError, match=words) as caught:
        work()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((IDS, LABELS), "batch: got a tuple"),
        ([BATCH], "batch: got a list"),
        (None, "batch: got a NoneType"),
        (IDS, "batch: got a Tensor"),
        ({}, "batch: got a dict without tensors"),
        (
            {"input_ids": IDS.tolist(), "labels": LABELS.tolist()},
            "batch: got a dict without tensors",
        ),
        ({"input_ids": IDS.tolist(), "labels": LABELS}, "input_ids is a list"),
        ({**BATCH, "labels": LABELS.tolist()}, "labels is a list"),
        ({"inputs": IDS, "labels": LABELS}, "batch: got inputs, labels, none of which"),
        ({"labels": LABELS}, "none of which is an input"),
        ({"input_ids": IDS}, 'no "labels"'),
    ],
)
@pytest.mark.parametrize("more", [{}, {"probe": "inplace"}, {"micro_batch": 2}, {"rho": "auto"}])
def test_batches(batch: Any, words: str, more: dict[str, Any]) -> None:
    engine = tezo_ds.initialize(tiny(), {"rank": 2, **more})
    one_line(lambda: engine.step(batch), words)
    one_line(lambda: engine.loss(batch), words)
    assert engine.step_index == 0
    again = tezo_ds.initialize(tiny(), {"rank": 2, **more})
    assert engine.step(BATCH).kappa == again.step(BATCH).kappa


class Odd(nn.Module):
    """Takes whatever comes, as wrappers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, *args: Any, **named: Any) -> torch.Tensor:
        out: torch.Tensor = self.inner(named["anything"])
        return out


def sums(outputs: torch.Tensor, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return outputs.square().sum(dim=1), torch.ones(len(outputs))


def test_names_of_a_wrapper_are_not_judged() -> None:
    engine = tezo_ds.initialize(Odd(), {"rank": 2}, sums)
    assert engine.step({"anything": torch.randn(2, 4), "labels": [1, 2]}).kappa[0] != 0


@pytest.mark.parametrize(
    "returned",
    [
        lambda o: o.logits.mean(),
        lambda o: (o.logits.mean(), torch.tensor(1.0)),
        lambda o: (1.0, 2.0),
        lambda o: None,
        lambda o: "ab",
        lambda o: (torch.zeros(5), torch.ones(5)),
        lambda o: (o.logits.sum((1, 2)), torch.tensor(1.0)),
        lambda o: (o.logits.sum((1, 2)),),
    ],
)
def test_what_loss_fn_returns(returned: Callable[[Any], Any]) -> None:
    engine = tezo_ds.initialize(tiny(), {"rank": 2}, lambda outputs, batch: returned(outputs))
    one_line(lambda: engine.step(BATCH), "loss_fn must return")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("gpt2", {"rank": 2}), "must be a torch.nn.Module, got str"),
        ((None, {}), "must be a torch.nn.Module, got None"),
        ((type(tiny()), {}), "must be a torch.nn.Module, got type"),
        ((tiny(), None), "config must be .* got None"),
        ((tiny(), 3), "config must be .* got int"),
        ((tiny(), [("rank", 2)]), "config must be .* got list"),
        ((tiny(), {"ranks": 2}), "unknown field 'ranks'"),
        ((tiny(), {"rank": 2}, 3), "loss_fn must be a function .* got int"),
    ],
)
def test_initialize(arguments: tuple[Any, ...], words: str) -> None:
    one_line(lambda: tezo_ds.initialize(*arguments), words)


@pytest.mark.parametrize("coefficients", [None, "coefficients.safetensors", [1.0]])
def test_coefficients(coefficients: Any) -> None:
    engine = tezo_ds.initialize(tiny(), {"rank": 2})
    one_line(lambda: engine.load_coefficients(coefficients), "must be a dict of tensors")


def test_folders_may_be_words(tmp_path: Path) -> None:
    engine = tezo_ds.initialize(tiny(tied=False), {"rank": 2, "lr": 1e-2})
    engine.step(BATCH)
    save_adapter(engine, str(tmp_path / "adapter"))
    save_merged(engine, str(tmp_path / "merged"))
    adapted = PeftModel.from_pretrained(tiny(tied=False), tmp_path / "adapter")
    merged = type(tiny()).from_pretrained(tmp_path / "merged")
    for model in (adapted, merged):
        model.eval()
    torch.testing.assert_close(adapted(IDS).logits, merged(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "more", [{}, {"probe": "inplace"}, {"method": "mezo", "restore": "copy"}, {"method": "lozo"}]
)
def test_a_step_after_one_that_failed(more: dict[str, Any]) -> None:
    engine, calls = tezo_ds.initialize(tiny(), {"rank": 2, **more}), []

    def fail_once(module: nn.Module, inputs: Any) -> None:
        calls.append(1)
        if len(calls) == 2 or (len(calls) == 1 and engine.probe.name == "fused"):
            raise RuntimeError("out of memory")

    hook = engine.sharding.module.model.layers[1].register_forward_pre_hook(fail_once)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.step(BATCH)
    hook.remove()
    other = tezo_ds.initialize(tiny(), {"rank": 2, **more})
    for _ in range(2):
        assert engine.step(BATCH).kappa == other.step(BATCH).kappa
    assert all(map(torch.equal, engine.state_dict().values(), other.state_dict().values()))
