"""Completions of a step's prompts in all branches at once, a forward a token, keys and values kept.

    1. all branches' prompts in one batch, branch-major, through the model: what comes before the first module
       that trains once for all branches
    2. a token for each row, that has seen its own branch's weights
    3. rows that have ended leave the batch; the probe is told of which branch each remaining row is
    4. again from 2., one token a row, until all have ended, on all ranks

Every rank runs as many forwards as the one with the most, as they gather weights: a rank without prompts, or
whose rows have all ended, goes on with one row of no use.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from tezo_ds.rollouts.prompts import Prompts
from tezo_ds.sharding.base import Sharding

FEW = 8  # a batch is made smaller once one in so many of its rows has ended

Choose = Callable[[Tensor, int, Sequence[int]], Tensor]
Seat = Callable[[Tensor | None], None]


class Decoder:
    """Generator of completions.

    Args:
        sharding: the model.
        ends: tokens that end a completion.
        most: tokens of a completion, at most.
        stopped: whether a completion's tokens hold a text that ends it.
    """

    def __init__(
        self, sharding: Sharding, ends: Collection[int], most: int,
        stopped: Callable[[list[int]], bool] | None = None,
    ) -> None:  # fmt: skip
        self._sharding, self._ends, self._most, self._stopped = sharding, ends, most, stopped

    def __call__(
        self, choose: Choose, prompts: Prompts, branches: int, cache: Any, prefill: Callable[[], Tensor],
        decode: Callable[[dict[str, Any]], Tensor], seat: Seat,
    ) -> tuple[list[list[int]], set[int]]:  # fmt: skip
        """Returns the tokens of each prompt's completion in each branch, branch-major, without what ended
        them, and which of them ended as a logit was NaN. All ranks must call it.

        Args:
            choose: (logits (rows, vocabulary), tokens before, place of each row's prompt) -> the next token
                of each row, int64 (rows,).
            prompts: this rank's.
            branches: number of copies.
            cache: transformers' cache, empty.
            prefill: fills the cache with the prompts in all branches and returns logits of their last
                positions, (branches * B, vocabulary).
            decode: runs one token a row and returns its logits, (rows, vocabulary).
            seat: tells the probe the branch of each row; None: they are branch-major.
        """
        B = len(prompts.ids)
        found: list[list[int]] = [[] for _ in range(branches * B)]
        alive = prompts.real.repeat(branches).tolist()  # of all rows
        rows = torch.arange(branches * B)  # those in the batch
        mask = prompts.mask.repeat(branches, 1)  # (rows, T)
        broken: set[int] = set()
        seat(None)
        logits = prefill()
        for position in range(self._most):
            numbers = rows.tolist()
            tokens = choose(logits, position, [row % B for row in numbers]).cpu()
            odd = logits.amax(dim=-1).isnan().tolist()
            for row, token, is_odd in zip(numbers, tokens.tolist(), odd, strict=True):
                if alive[row] and is_odd:
                    broken.add(row)
                alive[row] = alive[row] and not is_odd and self._goes_on(found[row], token)
            if position + 1 == self._most or not self._anywhere(any(alive)):
                break
            keep = self._kept([alive[row] for row in numbers])
            if keep is not None:
                rows, mask, tokens = rows[keep], mask[keep], tokens[keep]
                cache.batch_select_indices(keep.to(self._sharding.device))
                seat(rows // B)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            logits = decode(self._inputs(tokens, mask, cache))
        return found, broken

    def _inputs(self, tokens: Tensor, mask: Tensor, cache: Any) -> dict[str, Any]:
        places = mask.sum(dim=1, keepdim=True) - 1
        return {
            "input_ids": tokens[:, None], "attention_mask": mask, "position_ids": places,
            "past_key_values": cache,
        }  # fmt: skip

    def _goes_on(self, completion: list[int], token: int) -> bool:
        """Adds a token to a completion; returns whether more are to follow."""
        if token in self._ends:
            return False
        completion.append(token)
        return self._stopped is None or not self._stopped(completion)

    def _anywhere(self, going_on: bool) -> bool:
        """Returns whether a row goes on, on any rank."""
        if self._sharding.everyone == 1:
            return going_on
        return bool(self._sharding.maxima([going_on])[0])

    @staticmethod
    def _kept(alive: list[bool]) -> Tensor | None:
        """Returns the rows of the batch that stay, int64; None: all. Where none goes on the first stays."""
        ended = len(alive) - sum(alive)
        if len(alive) == 1 or ended * FEW < len(alive):
            return None
        return torch.tensor([i for i, goes_on in enumerate(alive) if goes_on] or [0])
