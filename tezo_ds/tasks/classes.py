"""Examples for models that classify: prompts, and the number of each label among the model's classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from tezo_ds.errors import DataError
from tezo_ds.tasks.encoded import Encoded
from tezo_ds.tasks.encoding import whole_prompts
from tezo_ds.tasks.example import Example
from tezo_ds.tasks.spec import TaskSpec

SHOWN = 4  # labels or classes that a message names


class Classes:
    """Encoder of examples for a model with one row of logits an example, over classes.

    Args:
        tokenizer: the model's.
        numbers: class of each label, in the order of the task's labels.
        note: how labels and classes were matched, in a line.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, numbers: Mapping[str, int], note: str | None
    ) -> None:
        self._tokenizer, self._numbers, self.note = tokenizer, numbers, note

    def encode(self, examples: Sequence[Example], max_length: int) -> list[Encoded]:
        """Tokenises each prompt with the tokenizer's special tokens; its label is a class.

        A prompt longer than `max_length` loses its beginning. Raises DataError for an example without a
        label, or where there is no room for a prompt.
        """
        for example in examples:
            if example.label is None:
                raise DataError(
                    f"text {example.prompt[:40]!r} has no label, which a model that classifies needs; give a "
                    "template and a label column, or take a causal model"
                )
        prompts = whole_prompts(self._tokenizer, [e.prompt for e in examples], max_length)
        return [
            Encoded(ids, len(ids), e.label, cut, number=self._numbers[str(e.label)])
            for e, (ids, cut) in zip(examples, prompts, strict=True)
        ]

    def candidates(
        self, examples: Sequence[Example], words: Sequence[str], max_length: int
    ) -> list[list[Encoded]]:
        """Never needed, as logits tell classes apart."""
        raise AssertionError("a model that classifies has its own classes")

    def tokens(self, words: Sequence[str], prompts: Sequence[str]) -> list[int] | None:
        """Returns the class of each label, in the order of the task's labels."""
        return list(self._numbers.values())

    def prompts(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Never needed, as a model that classifies generates nothing."""
        raise AssertionError("a model that classifies generates nothing")


def classes_of(config: Any, spec: TaskSpec) -> tuple[dict[str, int], str | None]:
    """Returns the class of each of a task's labels; and how they were matched, in a line, where that is a
    guess.

    By the names in the model's config where these are the labels or their words; by the numbers that the
    labels are, from 0; otherwise in the labels' order.

    Raises:
        DataError: the task has no labels, or another number of them than the model has classes.
    """
    words = spec.verbalizers
    if words is None:
        raise DataError(
            f"{spec.name}: has no labels, which a model that classifies needs; give a template and a label "
            "column, or take a causal model"
        )
    named = {_plain(name): int(number) for name, number in (config.label2id or {}).items()}
    if len(words) != config.num_labels:
        raise DataError(
            f"{spec.name}: has {len(words)} labels ({_listed(words)}), and the model "
            f"{config.num_labels} classes ({_listed(config.label2id or {})}); set num_labels of the model's "
            "head, or take another model"
        )
    for names in (list(words), list(words.values())):
        numbers = [named.get(_plain(name), -1) for name in names]
        if sorted(numbers) == list(range(len(words))):
            return dict(zip(words, numbers, strict=True)), None
    if sorted(words) == sorted(map(str, range(len(words)))):
        return {label: int(label) for label in words}, None
    ordered = {label: number for number, label in enumerate(words)}
    return ordered, (
        f"labels are the model's classes in their order, as its names ({_listed(config.label2id or {})}) are "
        f"not theirs: {_listed(f'{label} = {number}' for label, number in ordered.items())}"
    )


def _plain(name: Any) -> str:
    return str(name).strip().lower()


def _listed(names: Any) -> str:
    listed = [str(name) for name in names]
    return ", ".join(listed[:SHOWN]) + (" …" if len(listed) > SHOWN else "")
