"""Refusal of data and options that a kind of model has no sense for, before the model is loaded."""

from __future__ import annotations

from tezo_ds.config import TezoConfig
from tezo_ds.errors import ConfigError, DataError
from tezo_ds.kinds import ModelKind
from tezo_ds.settings import Settings
from tezo_ds.tasks import TaskData
from tezo_ds.tasks.metrics import NONE
from tezo_ds.tasks.seq2seq import refuse_undivided


def refuse_unfit(kind: ModelKind, settings: Settings, config: TezoConfig, task: TaskData) -> None:
    """Refuses what a model of this kind cannot serve.

    Raises:
        ConfigError: an option. DataError: the task.
    """
    if settings.padding_free and kind is not ModelKind.CAUSAL:
        raise ConfigError(
            f"--padding-free: is for causal models, in which examples of one row are known apart, and "
            f"{settings.model} is another kind; leave it off, or use --group-by-length"
        )
    if kind is ModelKind.CLASSIFIER:
        _refuse_for_classes(settings, config, task)
    elif kind is ModelKind.ENCODER_DECODER:
        if config.inner_layers != "none":
            raise ConfigError(
                f"inner_layers: {settings.model} is an encoder-decoder model, of which no labelled position "
                "runs by itself; leave inner_layers off"
            )
        for example in [*task.train[:1], *task.test[:1]]:
            refuse_undivided(example)


def _refuse_for_classes(settings: Settings, config: TezoConfig, task: TaskData) -> None:
    named = f"{settings.model} is a model for sequence classification"
    if settings.metric != NONE:
        raise ConfigError(
            f"--metric {settings.metric}: {named}, which generates nothing; leave it out"
        )
    if settings.objective == "choices":
        raise ConfigError(
            f"--objective choices: {named}, whose loss is that of its classes already; leave it out"
        )
    if config.inner_layers != "none":
        raise ConfigError(f"inner_layers: {named}, without label words; leave inner_layers off")
    if config.output_layer != "frozen":
        raise ConfigError(
            f"output_layer: {named}, whose head has no rows of words; leave it frozen and let the head "
            "train (--include), or take a causal model"
        )
    if task.spec.choices_field is not None:
        raise DataError(
            f"{task.spec.name}: {named}, whose classes are the same for all examples; leave choices_field "
            "out, or take a causal model"
        )
    if task.spec.verbalizers is None:
        raise DataError(
            f"{task.spec.name}: {named}, and the task has no labels; give a template and a label column, or "
            "take a causal model"
        )
