"""Definition of a task: a prompt template, the words that stand for its labels, and where its data is."""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

MOST_CHOICES = 256
"""Most labels of a file without verbalizers that an answer is picked from; with more they are free text."""


class TaskSpec(BaseModel):
    """Definition of one task.

    `template` is a prompt with `{column}` fields, filled from the columns of a row; `{{` and `}}`
    are literal braces. `verbalizers` maps each label to the word that answers the prompt, after one
    space. None makes a language-model task: there is no answer, all of the prompt is trained on.

    Raises pydantic's ValidationError (a ValueError) when a field is malformed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    template: str
    verbalizers: dict[str, str] | None = None
    label_field: str = "label"
    """The column that holds the label."""
    choices_field: str | None = None
    """The column that holds each example's own answers, of which the label is one, or its index from 0."""
    answer_field: str | None = None
    """The column that holds an answer in free text."""
    hub_id: str | None = None
    hub_config: str | None = None
    hub_revision: str | None = None
    hub_label_field: str | None = None
    """The hub's name for the label column, where it differs: it is renamed to `label_field`."""
    train_split: str = "train"
    test_split: str = "test"

    @property
    def columns(self) -> list[str]:
        """The columns that the template names, in order, without repeats."""
        return list(dict.fromkeys(c for _, c in _parse(self.template) if c is not None))

    @property
    def is_free_text(self) -> bool:
        """Whether the answers are texts rather than choices: too many labels, each its own word."""
        words = self.verbalizers or {}
        return len(words) > MOST_CHOICES and all(label == word for label, word in words.items())

    def fill(self, values: Mapping[str, str]) -> str:
        """Returns the prompt of one row; `values` has a text for each of `columns`."""
        pieces = (lit + (values[c] if c is not None else "") for lit, c in _parse(self.template))
        return "".join(pieces)

    @field_validator("template")
    @classmethod
    def _check_template(cls, template: str) -> str:
        if all(column is None for _, column in _parse(template)):
            raise ValueError(f"template {template!r} names no column; write one as {{column}}")
        return template

    @field_validator("verbalizers")
    @classmethod
    def _check_verbalizers(cls, verbalizers: dict[str, str] | None) -> dict[str, str] | None:
        if verbalizers is None:
            return None
        if len(verbalizers) < 2:
            raise ValueError(f"verbalizers need at least two labels, got {sorted(verbalizers)}")
        label_of: dict[str, str] = {}
        for label, word in verbalizers.items():
            if not word or word != word.strip():
                raise ValueError(f"verbalizer {word!r} of label {label!r} is blank or padded")
            if word in label_of:
                raise ValueError(f"labels {label_of[word]!r} and {label!r} share the word {word!r}")
            label_of[word] = label
        return verbalizers

    @model_validator(mode="after")
    def _check_answer_fits(self) -> TaskSpec:
        if self.choices_field is not None and self.verbalizers is not None:
            raise ValueError(
                "verbalizers are words of all examples, choices_field each one's own; keep one"
            )
        if self.verbalizers is None and self.choices_field is None and self.answer_field is None:
            return self
        if self.label_field in self.columns:
            raise ValueError(f"the template shows the label column {self.label_field!r}")
        if self.template != self.template.rstrip():
            raise ValueError("the template ends in whitespace; the answer follows after one space")
        return self


def _parse(template: str) -> list[tuple[str, str | None]]:
    """Returns (literal text, column or None) pairs. Only plain fields: `{a}`, not `{}` or `{a:>5}`."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error}") from None
    for _, column, spec, conversion in parts:
        if column == "" or spec or conversion:
            raise ValueError(f"template {template!r}: only plain {{column}} fields can be used")
    return [(literal, column) for literal, column, _, _ in parts]
