"""Entry of the Python API: an engine for a user's model and config, both checked."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn

from tezo_ds.config import TezoConfig, resolve
from tezo_ds.engine.engine import Engine
from tezo_ds.errors import ConfigError
from tezo_ds.installed import need_deepspeed
from tezo_ds.intake.checked_engine import checked_engine
from tezo_ds.intake.notices import notices
from tezo_ds.losses.objective import LossFn
from tezo_ds.sharding import sharding_of
from tezo_ds.sharding.absent import absent_from, refuse_absent

log = logging.getLogger(__name__)


def initialize(
    model: nn.Module,
    config: TezoConfig | dict[str, Any] | str | Path,
    loss_fn: LossFn | None = None,
) -> Engine:
    """Returns an engine for `model`.

    Args:
        model: any module, or a DeepSpeed ZeRO-3 engine made without an optimizer; put in eval mode.
            Weights are written by `Engine.merge`, methods that write weights, ended periods as they
            are loaded and, for the time of a step, the in-place probe; by nothing else.
        config: a TezoConfig; a dict of its fields; a DeepSpeed config (dict, or path to its JSON)
            with a "tezo" block, by whose zero_optimization a plain module is then partitioned.
        loss_fn: (outputs, batch) -> (loss_sum per example, count per example). The default is
            cross-entropy on batch["labels"] (-100 ignored): next-token for causal models, in place for
            masked ones and decoders with an encoder, of classes (B,) for sequence classification.

    Raises:
        ConfigError, ProbeError, ShardingError: one line that says what to change.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"initialize: the model must be a torch.nn.Module, got {_kind(model)}; pass the loaded model"
        )
    if not isinstance(config, (TezoConfig, dict, str, Path)):
        raise ConfigError(
            "initialize: the config must be a TezoConfig, a dict or the path of a JSON, got "
            f'{_kind(config)}; pass e.g. {{"rank": 16}}'
        )
    if loss_fn is not None and not callable(loss_fn):
        raise ConfigError(
            "initialize: loss_fn must be a function (outputs, batch) -> (loss sums, counts), got "
            f"{_kind(loss_fn)}"
        )
    resolved, deepspeed_config = resolve(config)
    if deepspeed_config is not None and "zero_optimization" in deepspeed_config:
        need_deepspeed("initialize: a config with zero_optimization")
        from tezo_ds.intake.deepspeed_json import fit  # imports DeepSpeed, which takes seconds

        deepspeed_config = fit(deepspeed_config)
    if resolved.trunk_cache == "disk":
        raise ConfigError(
            "trunk_cache: disk keeps files in the run folder of `tezo-ds train`; use memory here"
        )
    if resolved.output_layer != "frozen":
        raise ConfigError(
            f"output_layer: {resolved.output_layer} is fitted by `tezo-ds train`, which knows the label "
            "words; leave it frozen here"
        )
    if resolved.chooses:
        raise ConfigError(
            "include: auto measures on a task's examples, which `tezo-ds train` has; name what trains here, "
            "e.g. as tezo-ds probe-layers recommends"
        )
    absent, brought_to = absent_from(model)
    splits = "zero_optimization" in (deepspeed_config or {})
    if brought_to is None or resolved.rank == "auto" or splits:
        refuse_absent(absent, "initialize")
    sharding = sharding_of(model, deepspeed_config)
    engine = checked_engine(sharding, resolved, loss_fn)
    if engine.probe.writes or resolved.refresh_every:
        refuse_absent(absent, f"method {resolved.method} and probe {engine.probe.name}")
    engine.sharding.module.eval()
    for line in notices(engine) if sharding.place == 0 else []:
        log.warning("config: %s", line)
    return engine


def _kind(thing: object) -> str:
    return "None" if thing is None else type(thing).__name__
