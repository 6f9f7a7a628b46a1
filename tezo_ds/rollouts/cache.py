"""A cache of keys and values with room for the tokens to come: transformers' own is copied at each token."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """Keys and values of a layer, as views of larger tensors.

    Args:
        room: tokens that are to come after the first ones.
    """

    keys: Any
    values: Any

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._buffers: list[Tensor] = []  # of keys and of values, (rows, heads, T + room, size)
        self._seen: Tensor | None = None  # keys as views of the first

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes the next tokens' keys and values, (rows, heads, t, size); returns those of all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        if self.keys is not self._seen or end > self._buffers[0].shape[2]:
            self._buffers = [
                self._larger(old, new, length, end)
                for old, new in ((self.keys, key_states), (self.values, value_states))
            ]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, length:end] = new
        self._show(end)
        return self.keys, self.values

    def _larger(self, old: Tensor, new: Tensor, length: int, end: int) -> Tensor:
        rows, heads, _, size = new.shape
        made = new.new_empty(rows, heads, end + self._room, size)
        if length:
            made[:, :, :length] = old
        return made

    def _show(self, length: int) -> None:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)
        self._seen = self.keys

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows alone."""
        if length := self.get_seq_length():
            if self.keys is not self._seen:  # set from outside
                self._buffers = [self.keys, self.values]
            self._buffers = [buffer[indices] for buffer in self._buffers]
            self._show(length)


def cache_for(config: PreTrainedConfig, room: int) -> DynamicCache:
    """Returns an empty cache of a model, with room for so many tokens after the prompts."""
    cache = DynamicCache(config=config)
    cache.layers = [
        RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
