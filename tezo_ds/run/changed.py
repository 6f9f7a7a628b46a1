"""Weights and examples under a run that has begun, which must stay what they were."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tezo_ds.errors import ConfigError
from tezo_ds.intake.weights import agreed_fingerprint
from tezo_ds.run.about import read_about
from tezo_ds.settings import Settings

WEIGHTS, TESTS, VALIDATION = (
    "weights",
    "tests",
    "validation",
)  # fields of config.json; runs of older code have none


def refuse_changed(
    path: Path, stored: Mapping[str, Any], now: Mapping[str, Any], settings: Settings
) -> None:
    """Raises ConfigError, which names model or file, if a digest is not the one that a run began with.

    Args:
        path: the run's folder.
        stored: fields of its config.json and its journal's header; a digest that is missing is not checked.
        now: the same fields, of the run asked for.
        settings: model and data.
    """
    source = settings.data or settings.dataset or settings.task
    what = {
        WEIGHTS: f"the weights in {settings.model}",
        "data": f"the training examples in {source}, as the model's tokenizer encodes them,",
        TESTS: f"the test examples in {settings.test_data or source}",
        VALIDATION: f"the validation examples in {settings.validation_data or source}",
    }
    for name, words in what.items():
        if None not in (stored.get(name), now.get(name)) and stored[name] != now[name]:
            raise ConfigError(
                f"{path}: {words} are not those that the run began with; bring those back to go on, or "
                "choose another --output"
            )


def refuse_changed_weights(run: Path, model: str) -> None:
    """Raises ConfigError if a base model's weights are not those that a run began with.

    All ranks must call this, after the model was loaded.
    """
    now, stored = agreed_fingerprint(model), read_about(run).get(WEIGHTS)
    if None not in (now, stored) and now != stored:
        raise ConfigError(
            f"{run}: the weights of its base model in {model} are not those that the run began with, so its "
            "result does not fit them; bring those back"
        )
