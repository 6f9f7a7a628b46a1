"""Examples that are made, and sequences that are tokenised, when a step needs them."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from tezo_ds.errors import DataError
from tezo_ds.tasks.encoded import Encoded, highest_token
from tezo_ds.tasks.example import Example, Maker
from tezo_ds.tasks.posing import Posing
from tezo_ds.tasks.table import Table

KEPT = 512  # sequences that are kept as token ids


class LazyExamples(Sequence[Example]):
    """Examples of a table whose rows stay on disk.

    Attributes:
        labels: how many examples have each label.
        digest: of all of them, in their order.

    Args:
        table: the rows.
        index: which of them, int64, from 0.
        make: makes the example of a row.
        labels, digest: as above.
    """

    def __init__(
        self, table: Table, index: np.ndarray, make: Maker, labels: Counter[str], digest: str
    ) -> None:
        self._table, self._index, self._make = table, index, make
        self.labels, self.digest = labels, digest

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = int(self._index[index])
        return self._make(row + 1, self._table.rows[row])

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def at(self, index: int) -> str:
        """Returns where an example's row is: its file and its number there."""
        return self._table.at(int(self._index[index]) + 1)


class LazyEncoded(Sequence[Encoded]):
    """Token ids of lazy examples, looked at for what is otherwise looked for before the first step.

    Attributes:
        examples: the examples.

    Args:
        examples: the examples.
        tokenizer: the model's.
        posing: what makes sequences of them for the model.
        max_length: as `posing.encode` takes it.
        rows: tokens that the model has embeddings of; None: unknown, and nothing is checked.
    """

    def __init__(
        self, examples: LazyExamples, tokenizer: PreTrainedTokenizerBase, posing: Posing, max_length: int,
        rows: int | None = None,
    ) -> None:  # fmt: skip
        self.examples, self._tokenizer, self._posing = examples, tokenizer, posing
        self._max_length, self._rows = max_length, rows
        self._kept: OrderedDict[int, Encoded] = OrderedDict()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        return self.pick([int(index)])[0]

    def pick(self, indices: Sequence[int]) -> list[Encoded]:
        """Returns some of the sequences, tokenised together.

        Raises:
            DataError: names the row, and what is wrong with it.
        """
        new = [i for i in dict.fromkeys(indices) if i not in self._kept]
        for i, encoded in zip(new, self._encode(new), strict=True):
            self._kept[i] = encoded
        found = [self._kept[i] for i in indices]
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return found

    def _encode(self, indices: Sequence[int]) -> list[Encoded]:
        examples = [self.examples[i] for i in indices]
        try:
            found = self._posing.encode(examples, self._max_length)
        except DataError as error:
            if len(indices) > 1:  # one of them is at fault: name it
                return [each for i in indices for each in self._encode([i])]
            raise DataError(f"{self.examples.at(indices[0])}: {error}") from None
        for i, encoded in zip(indices, found, strict=True):
            if self._rows is not None and (highest := highest_token(encoded)) >= self._rows:
                token = self._tokenizer.convert_ids_to_tokens(highest)
                raise DataError(
                    f"{self.examples.at(i)}: has token {token!r} (id {highest}), but the model's embedding "
                    f"has {self._rows} rows; give the model a row for it, or leave it out"
                )
        return found


def pick(examples: Sequence[Encoded], indices: Sequence[int]) -> list[Encoded]:
    """Returns some of the sequences; lazy ones are tokenised together."""
    if isinstance(examples, LazyEncoded):
        return examples.pick(indices)
    return [examples[i] for i in indices]
