"""Parameters without data: refused before the first step, or served where only forwards read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from tiny import make_batch, tiny
from torch import nn
from transformers import AutoModelForCausalLM

import tezo_ds

FIELDS = {"seed": 1, "lr": 1e-3, "rank": 2}
LAYERS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
WHERE = {
    "all on disk": {"": "disk"},
    "a layer on disk": {**dict.fromkeys(LAYERS, "cpu"), "model.layers.0": "disk"},
    "the first on disk": {**dict.fromkeys(LAYERS, "cpu"), "model.embed_tokens": "disk"},
}


@pytest.fixture(params=WHERE)
def offloaded(request: pytest.FixtureRequest, tmp_path: Path) -> nn.Module:
    tiny(tied=False).save_pretrained(tmp_path / "model")
    places = {**WHERE[request.param], "model.rotary_emb": "cpu"}
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map=places if "" not in places else {"": "disk"},
        offload_folder=tmp_path / "off",
    )
    assert any(p.is_meta for p in model.parameters())
    return model


def slopes(model: nn.Module, **fields: Any) -> list[tuple[float, ...]]:
    engine = tezo_ds.initialize(model, {**FIELDS, **fields})
    return [engine.step(make_batch(4, seed=step)).kappa for step in range(3)]


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "mezo"},
        {"method": "mezo-adam"},
        {"method": "lozo"},
        {"method": "tezo-adam"},
        {"probe": "inplace"},
        {"refresh_every": 1},
        {"rank": "auto"},
    ],
    ids=str,
)
def test_offloaded_weights_are_not_written(offloaded: nn.Module, fields: dict[str, Any]) -> None:
    with pytest.raises(tezo_ds.ShardingError, match="accelerate's AlignDevicesHook") as caught:
        tezo_ds.initialize(offloaded, {**FIELDS, **fields})
    assert "without device_map" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["tezo", "tezo-m", "tezo-adam-coef"])
def test_offloaded_weights_that_are_only_read_are_served(offloaded: nn.Module, method: str) -> None:
    assert slopes(offloaded, method=method) == slopes(tiny(tied=False), method=method)


def test_offloaded_weights_are_not_merged(offloaded: nn.Module) -> None:
    engine = tezo_ds.initialize(offloaded, FIELDS)
    engine.step(make_batch(4))
    for ask in (engine.merge, engine.state_dict):
        with pytest.raises(tezo_ds.ShardingError, match="kept out of the model between forwards"):
            ask()


def test_a_hook_put_on_by_hand() -> None:
    model = tiny(tied=False)
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(tezo_ds.ShardingError, match="AlignDevicesHook"):
        tezo_ds.initialize(model, {**FIELDS, "method": "mezo"})


def test_a_hook_that_keeps_weights_in_the_model() -> None:
    model, _ = cpu_offload_with_hook(tiny(tied=False), torch.device("cpu"))
    assert slopes(model, method="mezo") == slopes(tiny(tied=False), method="mezo")


@pytest.mark.parametrize("fields", [{}, {"method": "mezo"}, {"zero_optimization": {"stage": 3}}])
@pytest.mark.parametrize("whole", [True, False])
def test_a_model_on_meta(fields: dict[str, Any], whole: bool) -> None:
    """Nothing brings its weights, so no method can use it."""
    model: Any = tiny(tied=False)
    (model if whole else model.model.layers[1].mlp).to("meta")
    config = {"tezo": FIELDS, **fields} if "zero_optimization" in fields else {**FIELDS, **fields}
    with pytest.raises(tezo_ds.ShardingError, match="has no data"):
        tezo_ds.initialize(model, config)
