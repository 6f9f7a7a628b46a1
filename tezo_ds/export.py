"""Results in formats that others load: a run of a coefficient method is exactly a LoRA adapter."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tezo_ds.engine import Engine
from tezo_ds.errors import ConfigError
from tezo_ds.lowrank import FixedFactors
from tezo_ds.objective import is_masked_lm
from tezo_ds.probes.sites import kind_of, uncovered, users


def lora_tensors(engine: Engine) -> dict[str, Tensor]:
    """PEFT's tensors: B = U diag(a), A = Vᵀ for a Linear; A = (U diag(a))ᵀ, B = V for an Embedding.

    No communication: U and V come from the seed. A tied matrix gives one pair for each module that
    uses it, so the adapter is for adding on the side: peft's own merge would add both into one weight.

    Raises:
        ConfigError: a trained matrix sits elsewhere than in a Linear or a plain Embedding.
    """
    if reason := no_adapter_because(engine):
        raise ConfigError(reason)
    module = engine.sharding.module
    parameters, make = dict(module.named_parameters()), FixedFactors(engine.space)
    coefficients = engine.coefficients()
    owners = _owners(module)
    tensors: dict[str, Tensor] = {}
    for matrix in engine.space.matrices:
        parameter = parameters[matrix.name]
        U, V = (factor.float() for factor in make.of(matrix.name))
        scaled = (U.double() * coefficients[matrix.name]).float()  # (m, rank)
        for path, kind in owners[id(parameter)]:
            prefix = f"base_model.model.{path}.lora_"
            if kind == "embedding":
                tensors[f"{prefix}embedding_A"] = scaled.t().contiguous()
                tensors[f"{prefix}embedding_B"] = V.clone()
            else:
                tensors[f"{prefix}A.weight"] = V.t().contiguous()
                tensors[f"{prefix}B.weight"] = scaled.clone()
    return tensors


def no_adapter_because(engine: Engine) -> str | None:
    """What stands against an adapter of this run, in one line; None if nothing does."""
    module = engine.sharding.module
    names = {matrix.name for matrix in engine.space.matrices}
    gaps = {**uncovered(module, names), **_offset_embeddings(module, names)}
    if not gaps:
        return None
    name, where = next(iter(gaps.items()))
    return (
        f"{name} ({where}) has no place in a LoRA adapter; exclude it, or write the merged model "
        "(tezo-ds export --merged)"
    )


def _offset_embeddings(module: nn.Module, names: set[str]) -> dict[str, str]:
    """Embeddings that do not look up their first argument (OPT's positions), as peft would. It
    knows of those that scale what they looked up."""
    return {
        name: f"weight of {type(owner).__name__}"
        for name, owner, _ in users(module, names)
        if isinstance(owner, nn.Embedding)
        and type(owner).forward is not nn.Embedding.forward
        and not hasattr(owner, "embed_scale")
    }


def _owners(module: nn.Module) -> dict[int, list[tuple[str, str]]]:
    """(path, kind) of the modules that use each weight, by the weight's id."""
    owners: dict[int, list[tuple[str, str]]] = {}
    for path, owner in module.named_modules():
        if kind := kind_of(owner):
            owners.setdefault(id(owner.weight), []).append((path, kind))
    return owners


def lora_config(engine: Engine, base_model: str) -> dict[str, Any]:
    """adapter_config.json: scaling lora_alpha / r = 1, module paths in full."""
    owners = _owners(engine.sharding.module)
    parameters = dict(engine.sharding.module.named_parameters())
    paths = [
        path for matrix in engine.space.matrices for path, _ in owners[id(parameters[matrix.name])]
    ]
    rank = engine.config.rank
    return {
        "peft_type": "LORA",
        "task_type": None if is_masked_lm(engine.sharding.module) else "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": paths,
        "inference_mode": True,
    }


def save_adapter(engine: Engine, folder: Path, base_model: str) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` loads. For one rank; replaces the folder
    whole or not at all.

    Args:
        engine: after training.
        folder: to write.
        base_model: name or path of the model that the adapter is for.

    Raises:
        ConfigError: see `lora_tensors`.
    """
    tensors, config = lora_tensors(engine), lora_config(engine, base_model)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_coefficients(coefficients: dict[str, Tensor], path: Path) -> None:
    """Writes {parameter name: float64 (rank,)} as safetensors, by way of a temporary name."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({k: v.to(torch.float64) for k, v in coefficients.items()}, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
