"""Sequences of token ids with their labels, and batches of them as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tezo_ds.losses.targets import IGNORE
from tezo_ds.tasks.chat import Spans

ROW = 256  # tokens of a row of several sequences


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
    answer: tuple[int, ...] | None = None
    """Labels of a decoder, beside the `input_ids` of its encoder; None: the labels are in `input_ids`."""
    start: tuple[int, ...] = ()
    """Tokens that the decoder begins with, before an answer."""
    number: int | None = None
    """The class that is the label, of a model that classifies."""

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
    if encoded.answer is not None:
        return list(encoded.answer)
    least = 0 if encoded.mask is not None else 1
    return [
        token
        for start, end in encoded.label_spans
        for token in encoded.input_ids[max(least, start) : end]
    ]


def highest_token(encoded: Encoded) -> int:
    """Returns the largest token id of a sequence, its decoder's labels included."""
    return max(*encoded.input_ids, *(encoded.answer or ()), -1)


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
    masked model's mask stands where its labels are. Labels of a decoder have a length of their own and stand
    where they are predicted; classes are labels (B,).

    A rank with nothing to do must still take part in a sharded forward: an empty batch gives one
    row of `filler` whose labels are all -100. Raises ValueError when batch and filler are missing.
    """
    rows = list(batch)
    if not rows:
        if filler is None:
            raise ValueError("collate: the batch is empty and there is no filler")
        rows = [filler]
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
        for start, end in e.label_spans if batch else ():
            labels[i, start:end] = ids[start:end]
            if e.mask is not None:
                input_ids[i, start:end] = e.mask
    collated = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    if rows[0].answer is not None:
        collated |= _of_decoder(rows, pad_id)
    elif rows[0].number is not None:
        collated["labels"] = torch.tensor([e.number for e in rows])
    if not batch:
        collated["labels"] = torch.full_like(collated["labels"], IGNORE)
    return collated


def end_to_end(batch: Sequence[Encoded], pad_id: int, filler: Encoded) -> dict[str, torch.Tensor]:
    """Puts a batch's sequences one after another into few rows, by `rows_of`, next to without padding.

    Returns int64 tensors (rows, tokens): input_ids; position_ids, from 0 anew at each sequence, by which
    transformers knows them apart where there is no attention_mask; and labels as `collate` aligns them. The
    first token of a sequence is no label, as nothing of its own comes before it. What fills shorter rows
    comes last, where causal models do not see it.

    An empty batch gives `filler`, without labels.
    """
    whole = list(batch) or [filler]
    lengths = [len(e.input_ids) for e in whole]
    rows = rows_of(lengths)
    length = longest_of(rows, lengths)
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    position_ids, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, IGNORE)
    for row, members in enumerate(rows):
        first = 0
        for e in (whole[i] for i in members):
            place = slice(first, first := first + len(e.input_ids))
            ids = torch.tensor(e.input_ids, dtype=torch.int64)
            input_ids[row, place], position_ids[row, place] = ids, torch.arange(len(ids))
            wanted = labels[row, place]
            for start, end in e.label_spans if batch else ():
                wanted[max(start, 1) : end] = ids[max(start, 1) : end]
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}


def rows_of(lengths: Sequence[int]) -> list[list[int]]:
    """Returns which sequences make each row: about as many tokens in every row, some `ROW` where no sequence
    is longer, as attention that is told of no lengths takes the square of a row."""
    count = max(1, sum(lengths) // max(ROW, *lengths))
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        least = filled.index(min(filled))
        rows[least].append(i)
        filled[least] += lengths[i]
    return [sorted(row) for row in rows]


def longest_of(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    """Returns the tokens of the fullest of some rows, each of which names its sequences."""
    return max(sum(lengths[i] for i in row) for row in rows)


def _of_decoder(rows: Sequence[Encoded], pad_id: int) -> dict[str, torch.Tensor]:
    """Returns a decoder's labels, (B, T), and where more than one token comes before the answer its inputs;
    otherwise the model makes these of the labels itself."""
    ahead = len(rows[0].start) - 1
    shape = (len(rows), ahead + max(len(e.answer or ()) for e in rows))
    labels = torch.full(shape, IGNORE, dtype=torch.int64)
    inputs = torch.full(shape, pad_id, dtype=torch.int64)
    for i, e in enumerate(rows):
        answer = e.answer or ()
        labels[i, ahead : ahead + len(answer)] = torch.tensor(answer)
        inputs[i, : ahead + len(answer)] = torch.tensor([*e.start, *answer[:-1]])
    return {"labels": labels, **({"decoder_input_ids": inputs} if ahead else {})}
