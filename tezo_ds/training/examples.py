"""Examples of a task as settings ask for them, and the tokens of its words."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor

from tezo_ds.errors import ConfigError
from tezo_ds.settings import Settings
from tezo_ds.tasks import TaskData, load_task
from tezo_ds.tasks.lazy import LazyExamples
from tezo_ds.tasks.posing import Posing
from tezo_ds.tasks.sources import Hub

LOOKED_AT = 1000  # prompts of a task whose rows stay on disk that words are tried after


def load_asked(settings: Settings) -> TaskData:
    """Loads the examples that settings ask for.

    Raises:
        DataError: one line, of anything that is wrong with them.
    """
    s = settings
    hub = Hub(s.dataset_config, s.dataset_revision, s.train_split, s.test_split, s.validation_split)
    return load_task(
        s.task, data=s.data, dataset=s.dataset, hub=hub, test_data=s.test_data,
        validation_data=s.validation_data, template=s.template, verbalizers=s.verbalizers,
        label_field=s.label_field, choices_field=s.choices_field, text_field=s.text_field,
        prompt_field=s.prompt_field, completion_field=s.completion_field,
        messages_field=s.messages_field, loss_on=s.loss_on, test_fraction=s.test_fraction,
        train_examples=s.train_examples, test_examples=s.test_examples,
        validation_examples=s.validation_examples, shots=s.shots, seed=s.data_seed,
        streaming=s.streaming, columns=bool(s.reward),
    )  # fmt: skip


def choices(posing: Posing, task: TaskData, objective: str) -> Tensor:
    """Returns the token of each verbaliser's word, which an --objective needs that picks among them.

    Raises:
        ConfigError: one token does not tell the words apart.
    """
    words = list((task.spec.verbalizers or {}).values())
    if not words:
        raise ConfigError(
            f"--objective {objective} needs label words, and this data has none; leave it out, or give a "
            "template and a label column"
        )
    most = (
        LOOKED_AT if isinstance(task.train, LazyExamples) else None
    )  # others when a step takes them
    examples = [*islice(task.train, most), *task.test, *task.validation]
    prompts = [example.prompt for example in examples]
    tokens = posing.tokens(words, prompts)
    if tokens is None:
        shown = f"{words}" if len(words) <= 10 else f"the {len(words)} words {words[:3]} …"
        raise ConfigError(
            f"--objective {objective} needs words of one token each, all different; {shown} are not for this "
            "tokenizer: choose others, or use --objective lm"
        )
    return torch.tensor(tokens)
