"""Adapters on disk: adapter.safetensors with adapter.json beside it, loaded into any model of one process."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tezo_ds.adapters.base import Adapter, Weights
from tezo_ds.adapters.found import Adapters
from tezo_ds.adapters.places import Place
from tezo_ds.adapters.sites import AdapterSite
from tezo_ds.adapters.tt import TensorTrainAdapter
from tezo_ds.errors import ConfigError, StorageError
from tezo_ds.files.tensors import digest, read
from tezo_ds.files.text import read_json, to_json

TENSORS, CONFIG = "adapter.safetensors", "adapter.json"
FORMAT = "tezo_ds tensor-train adapter 1"


def save(adapters: Adapters, parameters: dict[str, Tensor], folder: Path, base_model: str) -> None:
    """Writes adapters into a folder.

    Args:
        adapters: those of a run.
        parameters: their values by name, flat, as `Engine.coefficients` gives them.
        folder: a folder that exists.
        base_model: name or path of the model that they belong to.
    """
    tensors = {
        f"{site.name}.{name}": parameters[f"{site.name}.{name}"].view(shape).float().clone()
        for site in adapters.sites
        for name, shape in site.adapter.shapes.items()
    }
    sites = [
        {"path": site.path, "side": site.side, **site.adapter.described()}
        for site in adapters.sites
    ]
    about = {"format": FORMAT, "base_model": base_model, "digest": digest(tensors), "sites": sites}
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(to_json(about) + "\n")


@torch.no_grad()
def load(model: nn.Module, folder: Path | str) -> nn.Module:
    """Adds the tensor-train adapters of a run's folder to a model, for inference in one process.

    The model's forwards, `generate` included, have the terms from now on; its weights stay as they are. The
    terms cannot be merged into them, as there is a nonlinearity in between.

    Args:
        model: the base model of the run, any of transformers, whole in this process.
        folder: the run's adapter folder, with adapter.safetensors and adapter.json.

    Returns:
        The same model.

    Raises:
        ConfigError: the folder holds no such adapter, or the model is another.
        StorageError: a file is damaged.
    """
    folder = Path(folder)
    if not (folder / CONFIG).exists():
        raise ConfigError(
            f"{folder}: no {CONFIG}; name a folder that a run of adapter tt has written"
        )
    about = read_json(folder / CONFIG)
    if about.get("format") != FORMAT:
        raise ConfigError(f"{folder / CONFIG}: is not of {FORMAT!r}; use the tezo_ds that wrote it")
    tensors, _ = read(folder / TENSORS)
    if digest(tensors) != about["digest"]:
        raise StorageError(f"{folder / TENSORS}: does not have its checksum; take it from a copy")
    modules = dict(model.named_modules())
    for described in about["sites"]:
        site = _site(modules, dict(described), folder)
        names = site.adapter.shapes
        device = next(chain(site.module.parameters(), site.module.buffers())).device
        parameters = {n: tensors[f"{site.name}.{n}"][None].to(device) for n in names}
        _stay(site, site.adapter.prepare(parameters))
    return model


def _site(modules: dict[str, nn.Module], described: dict[str, Any], folder: Path) -> AdapterSite:
    path, side = described.pop("path"), described.pop("side")
    if path not in modules:
        raise ConfigError(f"{folder}: is for a model with a module {path}, which this one lacks")
    adapter: Adapter = TensorTrainAdapter.from_described(**described)
    return AdapterSite(Place(path, modules[path], side), adapter)


def _stay(site: AdapterSite, weights: Weights) -> None:
    """Replaces the forward of a site's module by one with the term, for good."""
    site.module.__dict__["forward"] = site.around(lambda at, x, y: at.add(x, y, weights))
