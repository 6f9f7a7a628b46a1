"""Forwards of labelled positions alone, behind the keys and values that a whole forward has kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tezo_ds.errors import ConfigError
from tezo_ds.losses.head import Head
from tezo_ds.losses.objective import Objective
from tezo_ds.output_layer.watched import Watched

CLOSE, ROUNDINGS = (
    1e-2,
    8,
)  # how far, over the largest number, what is computed another way may be off

# Changes copies of the layers of keys and values, whose rows are those of int64 (branches * k,).
Change = Callable[[Sequence[Any], Tensor], None]


class GoingOn:
    """Labelled positions that go on alone.

    Attributes:
        kept: keys and values of the last whole forward.

    Args:
        objective: of the model.
        words: token ids, int64 (C,).
    """

    def __init__(self, objective: Objective, words: Tensor) -> None:
        self._objective, self._words = objective, words
        self.kept: Any = None
        self._head = Head(objective.sharding)

    def refuse_without_keys(self, first: int) -> None:
        """Raises ConfigError unless all blocks from one on, by its number, keep keys and values. Every rank
        must call it."""
        layers = getattr(self.kept, "layers", ())[first:]
        every = bool(layers) and all(hasattr(layer, "keys") for layer in layers)
        if self._objective.sharding.maxima([not every])[0]:
            raise unfit(self._objective, "keeps no keys and values of some blocks")

    def refuse_longer(self, length: int) -> None:
        """Raises ConfigError if texts of so many tokens fill a sliding window, of whose tokens alone keys and
        values are kept, so that a position after them would not see all. Every rank must call it."""
        layers = getattr(self.kept, "layers", ())
        windows = [layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)]
        full = [window for window in windows if window <= length]
        if (short := self._objective.sharding.maxima([min(full, default=0)])[0]) > 0:
            why = f"has a sliding window of {short} tokens, and texts are as long (or lower --max-length)"
            raise unfit(self._objective, why)

    def __call__(
        self, watched: Watched, batch: Mapping[str, Any], rows: Tensor, places: Tensor, branches: int
    ) -> Tensor:  # fmt: skip
        """Returns the words' logits, (branches, k, C).

        Args:
            watched: of an inner layer, at whose block the forward begins.
            batch: the examples, (B, T).
            rows, places: of the labelled positions, int64 (k,).
            branches: number of copies.
        """
        inputs, hidden = self._inputs(watched, batch, rows, places, branches)
        words = self._words.to(rows.device)
        self._head.mode = self._objective.head_mode
        everyone = torch.arange(len(rows), device=rows.device)
        with watched.entry.beginning(hidden):
            return self._head(inputs, everyone, branches, lambda logits, _: wide(logits), words)

    def within(
        self, watched: Watched, batch: Mapping[str, Any], rows: Tensor, places: Tensor, branches: int,
        change: Change,
    ) -> None:  # fmt: skip
        """Runs the inner layer's block, of which all that is wanted happens within it; the blocks before and
        after it only where they cannot be left out.

        Args:
            watched, batch, rows, places, branches: as of a call.
            change: is given the keys and values, a layer for each block, before the forward.
        """
        inputs, hidden = self._inputs(
            watched, batch, rows, places, branches, watched.entry.leaves_out
        )
        change(inputs["past_key_values"].layers, rows.repeat(branches))
        with watched.entry.beginning(hidden, alone=True):
            self._objective.sharding.forward(**inputs)

    def _inputs(
        self, watched: Watched, batch: Mapping[str, Any], rows: Tensor, places: Tensor, branches: int,
        alone: bool = False,
    ) -> tuple[dict[str, Any], Tensor]:  # fmt: skip
        """Returns the model's inputs, and the hidden states that enter the block; `alone`: whether it is the
        only one that reads its keys and values."""
        several, entry = rows.repeat(branches), watched.entry
        kept = copy.copy(self.kept)
        kept.layers = [copy.copy(layer) for layer in kept.layers]
        end = entry.place + 1 if alone else len(kept.layers)
        for layer in kept.layers[entry.place : end]:  # those that run
            layer.batch_select_indices(several)
        batch = self._objective.inputs(batch)
        ids = batch["input_ids"]
        before = batch.get("attention_mask", torch.ones_like(ids)).clone()[rows]
        before[torch.arange(ids.shape[1], device=rows.device) >= places[:, None]] = 0
        mask = torch.cat([before, torch.ones_like(before[:, :1])], dim=1)  # (k, T + 1)
        at = batch.get(
            "position_ids", torch.arange(ids.shape[1], device=rows.device).expand_as(ids)
        )
        inputs = {
            "input_ids": ids[rows, places][:, None].repeat(branches, 1),
            "attention_mask": mask.repeat(branches, 1),
            "position_ids": at[rows, places][:, None].repeat(branches, 1),
        }
        hidden = entry.given
        if entry.leaves_out:
            hidden = hidden[several, places.repeat(branches)][:, None]  # (branches * k, 1, d)
        inputs = {**self._objective.inputs(inputs), "past_key_values": kept, "use_cache": True}
        return inputs, hidden

    def tried(self, watched: Watched, logits: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """Returns what `run` gives, (1 + C, k, words). Sees once that positions that go on from keys and
        values have a whole forward's logits, (k, words), and whether so they do without earlier blocks."""
        if watched.tried:
            return run()
        watched.tried = True
        if watched.entry.leaves_out:
            try:
                found = run()
                differs = not alike(found[0], logits, watched.given.dtype)
            except Exception:  # whatever a model of unknown kind may object to
                differs = True
            if not self._objective.sharding.maxima([differs])[0]:
                return found
            watched.entry.give_up()
            self.refuse_without_keys(0)
        found = run()
        if self._objective.sharding.maxima([not alike(found[0], logits, watched.given.dtype)])[0]:
            raise unfit(
                self._objective,
                "goes on from its keys and values to other logits than a whole forward's",
            )
        return found


def unfit(objective: Objective, why: str) -> ConfigError:
    """Returns the error of a model that has no inner layers to be fitted."""
    name = type(objective.sharding.module).__name__
    return ConfigError(f"inner_layers: {name} {why}; leave inner_layers off")


def alike(again: Tensor, logits: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether logits of positions that went on are those of a whole forward in some dtype, (k, C)."""
    if not len(logits):  # of a rank without examples, which runs along with one position
        return True
    close = max(CLOSE, ROUNDINGS * torch.finfo(dtype).eps) * float(logits.nan_to_num().abs().max())
    return torch.allclose(again, logits.to(again), rtol=0, atol=close, equal_nan=True)


def wide(tensor: Tensor) -> Tensor:
    """Returns a tensor in float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
