"""Prompts of a batch, padded on the left, and the tokens that end what follows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

IDS, MASK = "input_ids", "attention_mask"  # keys of a batch
PROMPT = "prompt"  # another: texts of the prompts, in place of what their ids are decoded to


@dataclass(frozen=True)
class Prompts:
    """Prompts of one rank, padded on the left.

    Attributes:
        ids, mask: int64 (B, T).
        real: which rows carry a prompt, bool (B,).
    """

    ids: Tensor
    mask: Tensor
    real: Tensor

    @property
    def tokens(self) -> list[list[int]]:
        """The prompts without padding."""
        return [row[kept].tolist() for row, kept in zip(self.ids, self.mask.bool(), strict=True)]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The prompts as inputs of a model."""
        places = (self.mask.cumsum(dim=1) - 1).clamp(min=0)
        return {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": places}


def prompts_of(batch: Mapping[str, Any]) -> Prompts:
    """Returns the prompts of a batch, each moved to the right end of its row."""
    ids = batch[IDS].cpu()
    mask = batch[MASK].cpu() > 0 if MASK in batch else torch.ones_like(ids, dtype=torch.bool)
    real = mask.any(dim=1)
    mask[:, -1] |= ~real  # attention over nothing is NaN
    order = mask.int().argsort(dim=1, stable=True)  # padding first, tokens as they were
    ids, mask = ids.gather(1, order), mask.gather(1, order).long()
    width = int(mask.sum(dim=1).max())
    ids, mask = ids[:, -width:], mask[:, -width:]
    return Prompts(ids, mask, real)


def last_positions(prompts: Prompts) -> Tensor:
    """Returns the last position of each prompt in the flattened (B * T), int64 (B,)."""
    B, T = prompts.ids.shape
    return torch.arange(1, B + 1) * T - 1


def until(text: str, stops: Sequence[str]) -> str:
    """Returns a text as far as the first of some that end it."""
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def ends_of(module: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the tokens that end a text: those that the model's own `generate` stops at."""
    found = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    listed = found if isinstance(found, (list, tuple)) else [found]
    return frozenset(int(x) for x in (*listed, tokenizer.eos_token_id) if x is not None)
