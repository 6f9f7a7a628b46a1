"""Hidden states before the output layer, and the words' logits, by plain forwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tezo_ds.errors import ConfigError
from tezo_ds.losses.objective import IGNORE, Objective, targets
from tezo_ds.output_layer.fit import States


class _Seen:
    """What an output layer was last given, and what it returned; by hooks, which the probes leave alone."""

    def __init__(self, layer: nn.Module, stack: ExitStack) -> None:
        self.hidden = self.logits = torch.empty(0)
        before = layer.register_forward_pre_hook(self._before, with_kwargs=True)
        after = layer.register_forward_hook(self._after)
        stack.callback(before.remove)
        stack.callback(after.remove)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.hidden = next(iter((*args, *kwargs.values())))  # (B, T, d)

    def _after(self, _: nn.Module, args: tuple[Any, ...], logits: Tensor) -> None:
        self.logits = logits


def collect(
    objective: Objective, layer: nn.Module, batches: Iterable[tuple[Mapping[str, Any], Tensor]],
    words: Tensor,
) -> States:  # fmt: skip
    """Runs batches, as many on every rank, and keeps a state for each position with a label.

    Args:
        objective: of the model, whose term is off.
        layer: the model's output layer.
        batches: batch, and which of its examples are held out, bool (examples,).
        words: token ids, int64 (C,), one of which is each label.

    Raises:
        ConfigError: the model goes on to change what its output layer returns, or does not use it.
    """
    hidden, logits, truth, held = [], [], [], []
    sharding, changed = objective.sharding, False
    with ExitStack() as stack:
        seen = _Seen(layer, stack)
        for batch, out in batches:
            wanted = targets(sharding.module, batch["labels"]).reshape(-1)
            positions = (wanted != IGNORE).nonzero()[:, 0]
            rows, _, found = objective.score(batch, words)
            mode = objective.head_mode
            if mode == "whole":
                break
            states = seen.hidden.reshape(-1, seen.hidden.shape[-1])
            hidden.append(states[positions.to(states.device)])
            if mode == "chosen":  # (1, k, vocabulary), as the model goes on with them
                own = seen.logits[0][:, words.to(states.device)].float().cpu()
                changed |= not torch.equal(own, found)
            logits.append(found.to(states.device))
            truth.append((wanted[positions][:, None] == words).int().argmax(dim=1))
            held.append(out[rows])
    if objective.head_mode == "whole":  # by the model's code, so on all ranks alike
        raise _unfit(sharding.module, "does not take its logits from its output layer as they are")
    if sharding.maxima([changed])[0]:
        raise _unfit(sharding.module, "goes on to change what its output layer returns")
    device = hidden[0].device
    return States(
        torch.cat(hidden),
        torch.cat(logits),
        torch.cat(truth).to(device),
        torch.cat(held).to(device),
    )


def _unfit(module: nn.Module, why: str) -> ConfigError:
    return ConfigError(
        f"output_layer: {type(module).__name__} {why}, so that a term there is not one on the logits; "
        "leave it frozen"
    )
