"""Hidden states after the trunk, kept for each example of a data set."""

from __future__ import annotations

import logging
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tezo_ds.errors import ConfigError
from tezo_ds.sharding.base import Sharding

log = logging.getLogger(__name__)


@dataclass
class Budget:
    """Bytes that the caches of a rank may take together.

    Attributes:
        most: the bound; None: none.
        taken: bytes taken so far.
    """

    most: int | None
    taken: int = 0

    def takes(self, nbytes: int) -> bool:
        """Counts some bytes and returns True, unless they would pass the bound."""
        if self.most is not None and self.taken + nbytes > self.most:
            return False
        self.taken += nbytes
        return True


class Cache(ABC):
    """Hidden states by example. What does not fit is left out, and computed at each visit.

    Args:
        budget: shared by the caches of a rank.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget, self.full = budget, False

    @abstractmethod
    def tokens_of(self, example: int) -> int | None:
        """Returns the checksum of the tokens that an example had; None if it is not kept."""

    @abstractmethod
    def get(self, example: int) -> Tensor:
        """Returns the hidden states of an example that is kept: (tokens, hidden), on the CPU."""

    @abstractmethod
    def _put(self, example: int, tokens: int, hidden: Tensor) -> None:
        """Keeps the hidden states of an example; raises OSError or RuntimeError where there is no room."""

    def put(self, example: int, tokens: int, hidden: Tensor) -> None:
        """Keeps the hidden states of an example, (tokens, hidden), if there is room.

        Args:
            example: its number in the data set.
            tokens: checksum of its tokens.
            hidden: its states, on any device.
        """
        if self.full or self.tokens_of(example) is not None:
            return
        why = "trunk_cache_gib is reached"
        fits = self._budget.takes(hidden.numel() * hidden.element_size())
        if fits:
            try:
                self._put(example, tokens, hidden)
            except (
                OSError,
                RuntimeError,
                MemoryError,
            ) as error:  # torch's own of memory is the second
                fits, why = False, f"{error}".split("\n")[0]
        if not fits:
            self.full = True
            log.warning("trunk cache: %s; what is not kept yet is computed at each visit", why)


class MemoryCache(Cache):
    """Hidden states in host memory, pinned where the model is on an accelerator."""

    def __init__(self, budget: Budget, pinned: bool) -> None:
        super().__init__(budget)
        self._pinned = pinned
        self._kept: dict[int, tuple[int, Tensor]] = {}

    def tokens_of(self, example: int) -> int | None:
        return self._kept[example][0] if example in self._kept else None

    def get(self, example: int) -> Tensor:
        return self._kept[example][1]

    def _put(self, example: int, tokens: int, hidden: Tensor) -> None:
        copy = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=self._pinned)
        self._kept[example] = tokens, copy.copy_(hidden)


class Visit:
    """A batch whose examples may be in a cache.

    Args:
        cache: where they are kept.
        ids: int64 (B,), the examples' numbers.
        batch: their input_ids (B, T), with an attention_mask (B, T) where they are padded.
    """

    def __init__(self, cache: Cache, ids: Tensor, batch: Mapping[str, Any]) -> None:
        tokens: Tensor = batch["input_ids"].cpu()
        mask: Tensor | None = batch.get("attention_mask")
        whole = torch.ones_like(tokens, dtype=torch.bool)
        self._mask = whole if mask is None else mask.cpu().bool()  # (B, T)
        self._cache, self._ids = cache, [int(i) for i in ids]
        self._sums = [
            zlib.crc32(row[real].numpy().tobytes())
            for row, real in zip(tokens, self._mask, strict=True)
        ]
        kept = [cache.tokens_of(i) for i in self._ids]
        self._missing = [row for row, found in enumerate(kept) if found is None]
        others = [
            i for i, a, b in zip(self._ids, kept, self._sums, strict=True) if a not in (None, b)
        ]
        self._problem = ""
        if not bool(self._mask[:, 0].all() and (self._mask[:, 1:] <= self._mask[:, :-1]).all()):
            self._problem = "trunk_cache needs batches that are padded on the right"
        elif others:
            self._problem = (
                f"example_ids: example {others[0]} has other tokens than before; ids have to number the "
                "examples of one data set"
            )

    def missing_anywhere(self, sharding: Sharding) -> bool:
        """Returns whether any rank has to run the trunk, and so all; raises ConfigError where ids or padding
        are wrong on any. All ranks must call it."""
        missing, problem = sharding.maxima([len(self._missing), bool(self._problem)])
        if problem:
            raise ConfigError(self._problem or "trunk_cache: see another rank")
        return missing > 0

    @property
    def _computed(self) -> list[int]:
        """Rows that are run: a rank that misses none takes part with its first."""
        return self._missing or [0]

    def of_missing(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the inputs of the examples that are not kept; of all of them untouched."""
        count = len(self._ids)
        if len(self._missing) == count:
            return dict(inputs)
        rows = torch.tensor(self._computed)
        return {
            key: value[rows.to(value.device)]
            if isinstance(value, Tensor) and value.shape[:1] == (count,)
            else value
            for key, value in inputs.items()
        }

    def joined(self, new: Tensor | None, device: torch.device) -> Tensor:
        """Returns all hidden states, zero where the batch is padded, and keeps the new ones: (B, T, hidden).

        Args:
            new: those of the examples that were not kept; None: all are.
            device: where they go.
        """
        like = self._cache.get(self._ids[0]) if new is None else new
        hidden = torch.zeros(*self._mask.shape, like.shape[-1], dtype=like.dtype, device=device)
        known = [row for row in range(len(self._ids)) if row not in self._missing]
        for row in known:
            states = self._cache.get(self._ids[row])
            hidden[row, : len(states)] = states.to(device, non_blocking=True)
        for row, states in zip(self._missing, () if new is None else new, strict=False):
            length = int(self._mask[row].sum())
            hidden[row, :length] = states[:length]
            self._cache.put(self._ids[row], self._sums[row], states[:length])
        return hidden
