"""A run's result, or a bare model, as `evaluate` and `generate` are asked for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tezo_ds.cli import accelerate
from tezo_ds.cli.options import refuse_idle, settings_from
from tezo_ds.config import TezoConfig
from tezo_ds.engine.engine import Engine
from tezo_ds.quiet import without_bars
from tezo_ds.run import results
from tezo_ds.run.changed import refuse_changed_weights
from tezo_ds.settings import Settings
from tezo_ds.training import session
from tezo_ds.training.display import Display


@dataclass(frozen=True)
class Asked:
    """What to load, and how to get to the result.

    Attributes:
        settings: model and data.
        config: the run's tezo block; of a bare model one that trains nothing much.
        deepspeed: DeepSpeed config to shard by, if any.
        result: the run's, or an empty one.
        base_of: folder of the run on whose own base model the result goes, if it does.
        gathered: dtype to which weights are rounded after the result was written into them, if any.
    """

    settings: Settings
    config: TezoConfig
    deepspeed: dict[str, Any] | None
    result: results.Result
    base_of: Path | None
    gathered: str | None

    def give(self, engine: Engine, display: Display) -> None:
        """Brings a new engine to the result. All ranks must call this.

        Raises:
            TezoError: the result is of another model.
        """
        if self.base_of is not None:
            refuse_changed_weights(self.base_of, self.settings.model)
        self.result.give(engine, display)
        if self.gathered is not None:
            results.gathered_in(engine, getattr(torch, self.gathered))


def results_of(run: Path | None, deepspeed: Path | None, given: Mapping[str, Any]) -> Asked:
    """Reads what a command line asks for, and joins the launcher's world.

    Args:
        run: folder of a run; None: a bare model.
        deepspeed: DeepSpeed JSON to shard by, in another way than the run did.
        given: flags of `Settings`.

    Raises:
        ConfigError: a flag is missing or does not go with others, or there is no result.
    """
    launched = accelerate.launched()
    deepspeed = deepspeed or launched.deepspeed
    source: Path | dict[str, Any] | None = deepspeed
    before: dict[str, Any] = {}
    ran, result = None, results.Result()
    if run is not None:
        fsdp = given["fsdp"] if given["fsdp"] is not None else launched.settings.get("fsdp")
        finished = session.open_result(run, deepspeed, fsdp, on_base=given["model"] is not None)
        source, ran, result = finished.deepspeed, finished.config, finished.result
        before = finished.settings.model_dump()
    settings = settings_from(given, {**before, **launched.settings})
    refuse_idle(settings.fsdp, given)
    # FSDP2 would gather the weights in another dtype than its shards have, in which those are written.
    gathered = settings.compute_dtype if given["dtype"] is None and not settings.fsdp else None
    beside = ran is not None and (ran.adapter != "none" or ran.keep_periods > 0)
    writes = result.writes and not beside
    if gathered and not writes:
        settings.dtype = gathered
    config, deepspeed_config = session.resolve_config(source, {"rank": 1}, fsdp=settings.fsdp)
    without_bars()
    own_base = run is not None and given["model"] is None and result.model is None
    rounded = gathered if writes and deepspeed_config is None else None
    return Asked(
        settings, ran or config, deepspeed_config, result, run if own_base else None, rounded
    )
