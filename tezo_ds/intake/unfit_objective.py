"""Refusal of options that need a loss with slopes, where a metric is the objective."""

from __future__ import annotations

from tezo_ds.config import TezoConfig
from tezo_ds.errors import ConfigError
from tezo_ds.settings import Settings


def refuse_unfit_objective(settings: Settings, config: TezoConfig) -> None:
    """Raises ConfigError for an option that --objective accuracy or f1 cannot serve."""
    objective = settings.objective
    if objective not in ("accuracy", "f1"):
        return
    of_metric = f"--objective {objective}"
    if config.rho == "auto":
        raise ConfigError(
            f"rho auto: is chosen by how a loss bends, and {of_metric} moves in steps; give a number, some "
            "times that which suits --objective choices"
        )
    if config.facts.solves:
        raise ConfigError(
            f"method {config.method}: solves for the cross-entropy of logits, which {of_metric} is not; take "
            "tezo, or --objective choices"
        )
    if objective == "f1" and config.placement == "per_example":
        raise ConfigError(
            "placement per_example: one example has no F1, which is that of all; take --objective accuracy, "
            "or placement shared"
        )
