"""What a branch generates and gains, by its definition: dense weights, one prompt and one token at a time, no
cache and no padding. For small models; `decoding` is tested against it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from tezo_ds.rng.philox import gumbels
from tezo_ds.rollouts.sampling import address_of, key_of


def completion(
    model: nn.Module, weights: Mapping[str, Tensor], prompt: Sequence[int], most: int, ends: Collection[int],
    temperature: float = 0.0, seed: int = 0, step: int = 0,
) -> list[int]:  # fmt: skip
    """Returns the tokens that follow a prompt, without the one that ended them.

    Args:
        model: a causal model.
        weights: W + Δ of one branch, by parameter name.
        prompt: token ids.
        most: tokens, at most.
        ends: tokens that end a text.
        temperature: 0: the likeliest token; else argmax_v (z_v / temperature + G_v).
        seed, step: of the run, which address G, beside the prompt and the position.
    """
    ids = list(prompt)
    for position in range(most):
        outputs = torch.func.functional_call(
            model, dict(weights), (torch.tensor([ids]),), {"use_cache": False}, tie_weights=True
        )
        scores = outputs.logits[0, -1].float()  # (vocabulary,)
        if temperature:
            address = torch.tensor([address_of(prompt) + position])
            scores = scores / temperature + gumbels(key_of(seed), address, len(scores), step)[0]
        token = int(scores.argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]
