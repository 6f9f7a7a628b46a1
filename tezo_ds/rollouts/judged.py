"""Completions as texts, and what a judge gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tezo_ds.errors import RewardFailed
from tezo_ds.rollouts.prompts import IDS, MASK, PROMPT, prompts_of, until

TAIL = 4  # tokens more than a stop text has, whose first may lose a space when it is decoded


class Judge(Protocol):
    """What gives completions their rewards."""

    def __call__(
        self, prompts: list[str], completions: list[str], columns: Mapping[str, list[Any]], /
    ) -> list[float]:
        """Returns the reward of each completion.

        Raises:
            RewardFailed: in one line, what failed and on which completion.
        """


@dataclass(frozen=True)
class Rewarded:
    """What a model generates, and who judges it.

    Attributes:
        judge: gives rewards.
        tokenizer: the model's.
        most: tokens of a completion, at most.
        stop: texts that end a completion, besides EOS; they and what follows are cut away.
    """

    judge: Judge
    tokenizer: PreTrainedTokenizerBase
    most: int
    stop: tuple[str, ...] = ()

    def has_stop(self, tokens: list[int]) -> bool:
        """Returns whether the end of a completion holds a text that ends it."""
        longest = max(len(stop.encode()) for stop in self.stop)  # a token has a byte at the least
        end = tokens[-longest - TAIL :]
        text = str(self.tokenizer.decode(end, skip_special_tokens=True))
        return any(stop in text for stop in self.stop)

    def text(self, tokens: list[int]) -> str:
        """Returns a completion's text."""
        return until(str(self.tokenizer.decode(tokens, skip_special_tokens=True)), self.stop)

    def prompts(self, part: Mapping[str, Any]) -> tuple[list[str], dict[str, list[Any]]]:
        """Returns the texts of the real prompts, and the judge's columns of them."""
        real = prompts_of(part).real.tolist()
        rows = [i for i, is_real in enumerate(real) if is_real]
        columns = {
            name: [_plain(column[i]) for i in rows]
            for name, column in part.items()
            if name not in (IDS, MASK, PROMPT, "labels")
        }
        if PROMPT in part:
            return [part[PROMPT][i] for i in rows], columns
        masks = part.get(MASK, torch.ones_like(part[IDS])).bool()
        prompts = [part[IDS][i][masks[i]].tolist() for i in rows]
        return [
            str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in prompts
        ], columns

    def rewards(
        self, part: Mapping[str, Any], completions: list[str], branches: int
    ) -> list[list[float]]:
        """Returns the rewards of the real prompts, of each branch.

        Raises:
            RewardFailed: the judge's own, or it gives more or fewer rewards.
        """
        prompts, columns = self.prompts(part)
        count = len(prompts)
        if not count:
            return [[]] * branches
        repeated = {name: column * branches for name, column in columns.items()}
        rewards = self.judge(prompts * branches, completions, repeated)
        if len(rewards) != len(completions):
            raise RewardFailed(
                f"a judge gave {len(rewards)} rewards for {len(completions)} completions; return one for each"
            )
        return [list(rewards[b * count : (b + 1) * count]) for b in range(branches)]


@dataclass(frozen=True)
class Sample:
    """A prompt, what the model answers, and its reward."""

    prompt: str
    completion: str
    reward: float


def _plain(cell: Any) -> Any:
    return cell.tolist() if isinstance(cell, Tensor) else cell
