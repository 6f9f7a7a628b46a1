"""One example of a task, before it is tokenised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tezo_ds.tasks.formats import Kind


@dataclass(frozen=True)
class Example:
    """A filled-in prompt; label and answer (the label's word) are None in a language-model task.

    Attributes:
        prompt: text; of a conversation its JSON, see `formats.Conversation`.
        label: of a task with labels.
        answer: text that follows the prompt: a label's word after a space, or a completion as it is.
        kind: what prompt and answer are.
        everything: whether all tokens train, where by its kind the answers alone would.
        candidates: answers of this example's own, the right one among them; none where the task has words.
        columns: cells of its row, where they are asked for.
    """

    prompt: str
    label: str | None
    answer: str | None
    kind: Kind = Kind.TEMPLATE
    everything: bool = False
    candidates: tuple[str, ...] = ()
    columns: Mapping[str, Any] | None = field(default=None, compare=False)

    @property
    def key(self) -> str:
        """Text that two examples share if one is the other again: of a prompt with a completion both."""
        return self.prompt if self.kind is not Kind.COMPLETION else f"{self.prompt}\0{self.answer}"


Maker = Callable[[int, Mapping[str, Any]], Example]  # of a row, by its number from 1 and its cells


def keeping_columns(make: Maker) -> Maker:
    """Returns a maker whose examples have the cells of their rows."""
    return lambda number, row: replace(make(number, row), columns=dict(row))
