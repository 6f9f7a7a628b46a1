"""Lengths of examples that lie in one row, for attention that is told them and no mask.

transformers tells flash attention of several examples in a row only where the batch is that one row, and
branches are rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# What collators say of a batch's one row, in the words of transformers; not so of a row for each branch.
OF_ONE_ROW = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def tell_lengths(module: nn.Module) -> None:
    """Has a model of transformers that computes flash attention told how long the examples of each row are,
    wherever `lie_in_rows`, from now on."""
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    base: Any = getattr(module, "base_model", None)
    if base is None or "flash" not in (implementation or ""):
        return
    if _with_lengths not in base._forward_pre_hooks.values():
        base.register_forward_pre_hook(_with_lengths, with_kwargs=True)


def lie_in_rows(position_ids: Tensor | None, attention_mask: Tensor | None) -> bool:
    """Returns whether positions, (B, T), start anew within a row without a mask, which is how collators say
    that it holds several examples."""
    if position_ids is None or attention_mask is not None or position_ids.dim() != 2:
        return False
    return bool((position_ids.diff(dim=1) != 1).any())


def _with_lengths(
    _: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    positions: Tensor | None = kwargs.get("position_ids")
    if positions is None or not lie_in_rows(positions, kwargs.get("attention_mask")):
        return None
    flat = positions.flatten()
    starts = (flat == 0).nonzero()[:, 0]
    bounds = torch.cat([starts, starts.new_tensor([len(flat)])]).to(torch.int32)  # (examples + 1,)
    longest = int(bounds.diff().max())
    return args, {
        **kwargs,
        **dict(zip(OF_ONE_ROW, (bounds, bounds, longest, longest), strict=True)),
    }
