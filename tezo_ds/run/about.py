"""config.json of a run folder: all it takes to evaluate or repeat the run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import tezo_ds
from tezo_ds.config import BLOCK, TezoConfig, build
from tezo_ds.engine.engine import Engine
from tezo_ds.errors import ConfigError
from tezo_ds.files.text import read_json
from tezo_ds.launched import env_world_size
from tezo_ds.run.folder import CONFIG
from tezo_ds.settings import Settings, Stored

TRAINER = "transformers.Trainer"  # stands for the task where a Trainer had the data
_PLACES = (
    "model",
    "task",
    "data",
    "dataset",
    "test_data",
    "validation_data",
)  # settings that may be paths


class _About(BaseModel):
    """Fields of config.json that are read again; the rest is for people."""

    model_config = ConfigDict(strict=True)

    tezo: dict[str, Any]
    settings: Settings
    weights_dtype: Stored
    factors_dtype: Stored | None = None
    batch_size: int
    deepspeed: dict[str, Any] | None = None
    ranks: dict[str, Annotated[int, Field(ge=1)]] | None = None
    paths: dict[
        str, str
    ] = {}  # absolute, by the path as given, of what was there when the run began
    versions: dict[str, str]


def describe(settings: Settings, config: TezoConfig) -> dict[str, Any]:
    """Returns the part of config.json that is known before a model is loaded."""
    places = (getattr(settings, name) for name in _PLACES)
    paths = {place: os.path.abspath(place) for place in places if place and os.path.exists(place)}
    about = {BLOCK: config.model_dump(mode="json"), "settings": settings.model_dump(mode="json")}
    return {**about, "paths": paths}


def on_rewards(about: Mapping[str, Any]) -> bool:
    """Returns whether a run of this config.json trains on rewards, whose losses are minus the rewards."""
    return bool(about["settings"].get("reward"))


def describe_run(settings: Settings, engine: Engine, extra: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of config.json: all it takes to evaluate or repeat the run."""
    config, matrices = engine.config, engine.space.matrices
    ranks = {m.name: m.rank for m in matrices}
    chose = config.rank == "auto" or config.chooses
    odd = chose or set(ranks.values()) - {config.rank}  # chosen, or of small tables
    chosen = {"ranks": ranks} if odd else {}
    return {
        **describe(settings, config),
        "weights_dtype": _name(_plain_dtype(engine)),
        "factors_dtype": _name(matrices[0].rounding) if matrices else None,
        "world_size": engine.sharding.world_size,
        **extra,
        **chosen,
        "versions": {
            "tezo_ds": tezo_ds.__version__,
            **{name: version(name) for name in ("torch", "transformers")},
        },
    }


def _plain_dtype(engine: Engine) -> torch.dtype:
    """Returns the dtype of the first weight that is stored as plain numbers."""
    dtypes = [p.dtype for p in engine.sharding.module.parameters()]
    return next((d for d in dtypes if d.is_floating_point and d.itemsize > 1), dtypes[0])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_run(folder: Path) -> tuple[Settings, TezoConfig]:
    """Reads settings and config of a run folder, with the dtypes that the run really had, and with absolute
    paths for what is not seen from the present folder.

    Raises:
        ConfigError: the folder is no run folder.
    """
    content = read_about(folder)
    weights = content["weights_dtype"]
    dtypes = {"dtype": weights, "factors_dtype": content.get("factors_dtype", weights)}
    settings = {**content["settings"], **dtypes}
    for name in _PLACES:  # what is not seen from here is perhaps where it was
        path = content["paths"].get(settings.get(name))
        if path and not os.path.exists(settings[name]) and os.path.exists(path):
            settings[name] = path
    return Settings(**settings), TezoConfig(**content[BLOCK])


def read_about(folder: Path) -> dict[str, Any]:
    """Reads config.json of a run folder, and checks that all fields read again are there and of their type.

    Raises:
        ConfigError: the folder is no run folder, or the file is damaged; names the fields.
    """
    path = folder / CONFIG
    content = read_json(path)
    if BLOCK not in content or "settings" not in content:
        raise ConfigError(f'{path}: no "{BLOCK}" and "settings"; is it a run folder?')
    try:
        settings = _About(**content).settings
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors())
        raise ConfigError(f"{path}: missing or malformed: {fields}") from None
    config = build(content[BLOCK], f'{path}: "{BLOCK}" block')
    return {**content, **describe(settings, config), "paths": content.get("paths", {})}


def sharded_as(
    folder: Path, deepspeed: Path | None, fsdp: bool | None
) -> tuple[Path | dict[str, Any] | None, bool]:
    """Returns how to shard a run's model: as asked; where nothing was, whole in a single process, and as the
    run did in several.

    Args:
        folder: the run's folder.
        deepspeed: the DeepSpeed JSON that was asked for.
        fsdp: whether FSDP2 was asked for; None: nothing was said.

    Returns:
        The DeepSpeed config (the run's with an empty tezo block), and whether to use FSDP2.
    """
    alone = env_world_size() == 1
    if deepspeed is not None or fsdp is not None or alone:
        return deepspeed, bool(fsdp)
    content = read_about(folder)
    ran = content.get("deepspeed")
    return {**ran, BLOCK: {}} if ran else None, bool(content["settings"].get("fsdp"))
