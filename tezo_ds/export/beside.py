"""Adapters that trained beside the weights, as files: of peft for lora, of our own for tensor trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from tezo_ds.adapters import loading
from tezo_ds.adapters.base import Adapter
from tezo_ds.adapters.lora import ALPHA, LoraAdapter
from tezo_ds.adapters.tt import TensorTrainAdapter
from tezo_ds.config import TezoConfig
from tezo_ds.engine.engine import Engine
from tezo_ds.errors import ConfigError
from tezo_ds.models.structure import kind_of

KINDS: dict[str, type[Adapter]] = {"tt": TensorTrainAdapter, "lora": LoraAdapter}


def refuse_merged(config: TezoConfig, option: str) -> None:
    """Raises ConfigError if a run's result is beside the weights and an option asks for merged ones."""
    if config.adapter != "none":
        raise ConfigError(f"{option}: {KINDS[config.adapter].no_merge}; leave {option} out")


def peft_tensors(engine: Engine) -> dict[str, Tensor]:
    """Returns peft's tensors of an engine's adapters lora: A (r, inputs) and B (outputs, r)."""
    learnt = engine.coefficients()
    return {
        f"base_model.model.{site.path}.lora_{name}.weight": learnt[f"{site.name}.{name}"]
        .view(shape).float().clone()
        for site in engine.selection.adapters.sites
        for name, shape in site.adapter.shapes.items()
    }  # fmt: skip


def peft_pairs(engine: Engine) -> dict[str, Any]:
    """Returns the fields of peft's adapter_config.json that tell what the pairs are."""
    sites = engine.selection.adapters.sites
    adapter = sites[0].adapter
    assert isinstance(adapter, LoraAdapter)
    return {
        "r": adapter.rank,
        "lora_alpha": ALPHA,
        "fan_in_fan_out": any(kind_of(site.module) == "conv1d" for site in sites),
        "target_modules": [site.path for site in sites],
    }


def save_tensor_trains(engine: Engine, folder: Path, base_model: str) -> None:
    """Writes adapter.safetensors and adapter.json into a folder that exists."""
    loading.save(engine.selection.adapters, engine.coefficients(), folder, base_model)
