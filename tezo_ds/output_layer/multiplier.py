"""What a model multiplies its output layer's result by, as some do that scale logits (Granite, Command R)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tezo_ds.losses.objective import Objective
from tezo_ds.trunk.stand_ins import replaced

# Of the words in turn: exact in bfloat16, and far enough apart for a soft cap to show.
KNOWN = (1.0, -96.0, 0.0, 48.0)
ROUNDINGS = 2  # of the narrower dtype, that two ways to one product may be apart


def multiplier(
    objective: Objective, layer: nn.Module, batch: Mapping[str, Any], words: Tensor
) -> float | None:
    """Returns the s for which the model's logits are s times its output layer's; None: there is no such s.

    It follows from a forward in which the layer returns numbers that are known, and so is the same on every
    rank and for any data; one of the batch as it is shows whether that is all that happens to logits. Every
    rank must call it.

    Args:
        objective: of the model, whose term is off.
        layer: the model's output layer.
        batch: examples, maybe none with a label on this rank.
        words: token ids whose logits are looked at, int64 (words,).
    """

    def passed(change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the words' logits, (k, words), as the layer returns them and as the model does."""
        given, project = torch.empty(0), layer.forward

        def forward(input: Tensor) -> Tensor:  # torch's own name: callers may use it
            nonlocal given
            logits = change(project(input))
            given = logits.clone()  # a model may go on in place
            return logits

        with replaced(layer, forward):
            _, made = objective.reduced(batch, lambda logits, _: logits[:, words.to(logits.device)])
        return given[0][:, words.to(given.device)].cpu(), made

    def known(logits: Tensor) -> Tensor:
        found = torch.zeros_like(logits)
        numbers = torch.tensor(KNOWN, dtype=found.dtype, device=found.device)
        places = torch.arange(len(words), device=found.device) % len(KNOWN)
        found[..., words.to(found.device)] = numbers[places]
        return found

    given, made = passed(known)
    scale = float(made[0, 0]) if len(made) else None
    real = passed(lambda logits: logits)
    if scale is not None and not all(_is_times(scale, *pair) for pair in ((given, made), real)):
        scale = math.nan
    found = {each for each in objective.sharding.gather(scale) if each is not None}
    common = found.pop() if len(found) == 1 else math.nan
    return common if math.isfinite(common) and common else None


def _is_times(scale: float, given: Tensor, made: Tensor) -> bool:
    """Returns whether logits are `scale` times others, up to rounding."""
    eps = max(torch.finfo(each.dtype).eps for each in (given, made))
    expected = scale * given.double()
    return torch.allclose(made.double(), expected, rtol=ROUNDINGS * eps, atol=0, equal_nan=True)
