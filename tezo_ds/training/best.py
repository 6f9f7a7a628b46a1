"""The best evaluation of a run: what its result may be, and whether to wait for a better one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from tezo_ds.config import TezoConfig
from tezo_ds.engine.engine import Engine
from tezo_ds.errors import ConfigError
from tezo_ds.run.folder import TEST
from tezo_ds.settings import RunOptions, Settings
from tezo_ds.tasks.metrics import NONE


def refuse_unfit(options: RunOptions, settings: Settings, config: TezoConfig) -> None:
    """Raises ConfigError if a run cannot keep what was best, or has nothing to judge it by."""
    if options.patience is not None and not options.eval_every:
        raise ConfigError("--patience counts evaluations; set --eval-every, too")
    if options.keep == "last" and options.patience is None:
        return
    if options.best_by == "metric" and settings.metric == NONE and not settings.reward:
        raise ConfigError("--best-by metric: there is none; name one by --metric")
    if options.keep == "last":
        return
    if not options.eval_every:
        raise ConfigError("--keep best chooses among evaluations; set --eval-every, too")
    if not config.facts.learns_coefficients or config.refresh_every:
        raise ConfigError(
            f"--keep best: {config.method} writes weights as it goes, so that earlier ones are gone; take a "
            "method that keeps coefficients, without refresh_every, or tezo-ds replay --to-step"
        )
    if config.output_layer_every:
        raise ConfigError(
            "--keep best: the output layer is fitted anew on the way; leave --output-layer-every out"
        )


class Best:
    """The best of the evaluations so far, and the engine's state at it, a few numbers a matrix.

    Args:
        options: say what is better, what to keep and how long to wait.
        rebuild: (engine, steps): brings an engine to where the run was after so many steps, of those that
            earlier processes made.
        part: part of the examples that decides.
    """

    def __init__(
        self, options: RunOptions, rebuild: Callable[[Engine, int], None], part: str = TEST
    ) -> None:
        self._part = part
        self._by, self._patience = options.best_by, options.patience
        self._keeps, self._rebuild = options.keep == "best", rebuild
        self.step: int | None = None
        self.line: Mapping[str, Any] = {}
        self._value, self._since = -math.inf, 0
        self._state: dict[str, Tensor] | None = None

    @property
    def over(self) -> bool:
        """Whether as many evaluations as the run is patient for have brought nothing better."""
        return self._patience is not None and self._since >= self._patience

    def see(self, step: int, line: Mapping[str, Any], engine: Engine | None) -> None:
        """Takes note of an evaluation.

        Args:
            step: steps before it.
            line: its fields in metrics.jsonl.
            engine: as it was evaluated; None: by an earlier process.

        Raises:
            ConfigError: it has not measured what decides.
        """
        value = line.get(f"{self._part}_{self._by}")
        if value is None:
            raise ConfigError(
                f"--best-by {self._by}: evaluations of this task measure no {self._by}; use --best-by loss"
            )
        value = -value if self._by == "loss" else value
        if value > self._value:  # not a number is never better
            self.step, self.line, self._value, self._since = step, line, value, 0
            self._state = engine.state() if engine is not None and self._keeps else None
        elif step:
            self._since += 1

    def give(self, engine: Engine) -> bool:
        """Brings the engine to the best evaluation if that is to be kept, and is not the last step; returns
        whether it was not."""
        if not self._keeps or self.step in (None, engine.step_index):
            return False
        if self._state is not None:
            engine.load_state(self._state, written=False)
        else:
            assert self.step is not None
            self._rebuild(engine, self.step)
        return True
