"""Sequences of token ids with their labels, and batches of them as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tezo_ds.losses.targets import IGNORE
from tezo_ds.tasks.chat import Spans


@dataclass(frozen=True)
class Encoded:
    """One sequence of token ids; `input_ids[label_start:label_end]` are its labels, `label` is the
    example's."""

    input_ids: list[int]
    label_start: int
    label: str | None
    truncated: int = 0
    """How many tokens of the prompt's beginning were cut away; 0 for a whole prompt."""
    label_end: int | None = None
    """Where the labels end; None: with the sequence."""
    mask: int | None = None
    """The token that a masked model gets in the place of each label; None: the model gets the labels."""
    spans: Spans | None = None
    """Start and end of each run of labels, where they are more than `label_start` to `label_end`."""
    lost: int = 0
    """How many labels were cut away."""

    @property
    def label_spans(self) -> Spans:
        """Start and end of each run of labels."""
        if self.spans is not None:
            return self.spans
        end = len(self.input_ids) if self.label_end is None else self.label_end
        return ((self.label_start, end),)


def labels_of(encoded: Encoded) -> list[int]:
    """Returns a sequence's labels; the first token of all has nothing before it to be predicted by, but for
    a masked model."""
    least = 0 if encoded.mask is not None else 1
    return [
        token
        for start, end in encoded.label_spans
        for token in encoded.input_ids[max(least, start) : end]
    ]


def truncations(encoded: Sequence[Encoded]) -> int:
    """Returns how many sequences lost a part of their prompt, to be reported to the user."""
    return sum(e.truncated > 0 for e in encoded)


def losses_of_labels(encoded: Sequence[Encoded]) -> int:
    """Returns how many sequences lost a part of what they train on."""
    return sum(e.lost > 0 for e in encoded)


def collate(
    batch: Sequence[Encoded], pad_id: int, multiple: int = 1, filler: Encoded | None = None
) -> dict[str, torch.Tensor]:
    """Pads a batch on the right to its longest sequence, rounded up to a multiple of `multiple`.

    Returns int64 tensors (B, T): input_ids, attention_mask, and labels, which are aligned with
    input_ids (the loss does the shifting) and -100 where nothing is to be predicted. In input_ids a
    masked model's mask stands where its labels are.

    A rank with nothing to do must still take part in a sharded forward: an empty batch gives one
    row of `filler` whose labels are all -100. Raises ValueError when batch and filler are missing.
    """
    rows = list(batch)
    if not rows:
        if filler is None:
            raise ValueError("collate: the batch is empty and there is no filler")
        rows = [replace(filler, label_start=len(filler.input_ids), label_end=None, spans=None)]
    longest = max(len(e.input_ids) for e in rows)
    shape = (len(rows), -(-longest // multiple) * multiple)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE, dtype=torch.int64)
    for i, e in enumerate(rows):
        length = len(e.input_ids)
        ids = torch.tensor(e.input_ids, dtype=torch.int64)
        input_ids[i, :length] = ids
        attention_mask[i, :length] = 1
        for start, end in e.label_spans:
            labels[i, start:end] = ids[start:end]
            if e.mask is not None:
                input_ids[i, start:end] = e.mask
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
