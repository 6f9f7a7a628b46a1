"""The next token of each row: the likeliest, or at a temperature one drawn by addressed random numbers.

    token = argmax_v (z_v / temperature + G_v),   G_v = -ln(-ln u_v)

draws v with probability softmax(z / temperature)_v (Gumbel-max). u is addressed by (seed, step, prompt,
position, v), and not by branch: all branches of a step draw alike, so that a difference of two branches is
one of their weights and not of their luck, and the number of ranks does not show.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tezo_ds.rng.philox import derive_key, gumbels


def likeliest(logits: Tensor, position: int, prompts: Sequence[int]) -> Tensor:
    """Returns the token of the largest logit of each row, the first of equals: int64 (k,)."""
    return logits.argmax(dim=-1)


class Drawn:
    """Tokens drawn at a temperature.

    Args:
        seed, step: of the run.
        temperature: above 0.
        prompts: token ids of the step's prompts.
    """

    def __init__(
        self, seed: int, step: int, temperature: float, prompts: Sequence[Sequence[int]]
    ) -> None:
        self._key, self._step, self._temperature = key_of(seed), step, temperature
        self._addresses = torch.tensor([address_of(ids) for ids in prompts])

    def __call__(self, logits: Tensor, position: int, prompts: Sequence[int]) -> Tensor:
        """Returns the next token of each row, int64 (k,).

        Args:
            logits: (k, vocabulary).
            position: tokens that the completions have already.
            prompts: place of each row's prompt among those of the step.
        """
        own = sorted(set(prompts))
        place = {prompt: i for i, prompt in enumerate(own)}
        index = (self._addresses[own] + position).to(logits.device)
        noise = gumbels(self._key, index, logits.shape[-1], self._step)  # (prompts, vocabulary)
        rows = torch.tensor([place[prompt] for prompt in prompts], device=logits.device)
        return (logits.float() / self._temperature).add_(noise[rows]).argmax(dim=-1)


def key_of(seed: int) -> tuple[int, int]:
    """Returns the key of a run's random numbers for completions."""
    return derive_key(seed, "completions", "gumbel")


def address_of(ids: Sequence[int]) -> int:
    """Returns the address of a prompt, of its tokens alone: 43 bits, above 20 for positions."""
    first, second = derive_key(0, ",".join(map(str, ids)), "prompt")
    return (first << 11 | second >> 21) << 20
