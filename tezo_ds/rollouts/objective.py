"""The objective of a reward: minus the mean reward of what each branch generates.

    L_b = - Σ_i r(prompt_i, completion_bi) / B      over the B prompts of all ranks

so that slopes, clipping, schedules and the journal are those of a loss. Rewards are added as whole multiples
of 2⁻⁴⁰, which any order adds up to the same: a run does not depend on how ranks share its prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tezo_ds.config import TezoConfig
from tezo_ds.errors import ConfigError, DataError, RewardFailed
from tezo_ds.losses.objective import Objective, repeat
from tezo_ds.models.structure import is_encoder_decoder
from tezo_ds.rollouts.cache import cache_for
from tezo_ds.rollouts.decoding import Choose, Decoder, Seat
from tezo_ds.rollouts.judged import Rewarded, Sample
from tezo_ds.rollouts.prompts import IDS, MASK, Prompts, ends_of, last_positions, prompts_of
from tezo_ds.rollouts.sampling import Drawn, likeliest
from tezo_ds.sharding.base import Sharding
from tezo_ds.trunk.trunk import two_of

GRID = 2.0**40  # parts of 1 that rewards are rounded to


class RewardObjective(Objective):
    """Minus the mean reward of a batch's prompts, in each branch.

    A batch has `input_ids` and `attention_mask`, int64 (B, T), of prompts that are padded on either side; a
    row whose mask is 0 throughout carries none. Whatever else it has, of B items, the judge gets as a column.

    Attributes:
        seat: tells the probe the branch of each row of later forwards.
        step: index of the step, by which completions are drawn at a temperature.
    """

    gain = "reward"
    empty = "there is no prompt on {} rank; raise the batch size, or check the attention mask"

    def __init__(self, sharding: Sharding, rewarded: Rewarded, config: TezoConfig) -> None:
        super().__init__(sharding, None)
        self._rewarded, tokenizer = rewarded, rewarded.tokenizer
        stopped = rewarded.has_stop if rewarded.stop else None
        ends = ends_of(sharding.module, tokenizer)
        self._decoder = Decoder(sharding, ends, rewarded.most, stopped)
        self._seed, self._temperature = config.seed, config.temperature
        self.seat: Seat = lambda rows: None
        self.step = 0
        self._tried = False

    @property
    def piecewise_constant(self) -> bool:
        return True

    def checked(self, batch: Any) -> Mapping[str, Any]:
        """Returns a batch; raises DataError unless it holds token ids of prompts, and columns of as many
        items."""
        ids = batch.get(IDS) if isinstance(batch, Mapping) else None
        if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel():
            raise DataError(
                f"batch: has no {IDS}, int64 (prompts, tokens); pass the prompts that completions follow"
            )
        for name, column in batch.items():
            if not hasattr(column, "__len__") or len(column) != len(ids):
                raise DataError(
                    f"batch: {name} is no column of {len(ids)} items, one for each prompt; leave it out, or "
                    "fill it up"
                )
        return batch

    def recurring(self, several: bool) -> AbstractContextManager[None]:
        """Returns a context manager that does nothing: each call runs the trunk, for its keys and values."""
        return nullcontext()

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any], branches: int) -> Tensor:
        """Returns minus the sum of rewards, and the number of prompts, in each branch: float64 (2, branches)
        on the model's device. All ranks must call it.

        Raises:
            RewardFailed: a reward function failed, on this rank or on another.
        """
        self.settle(batch, branches)
        sums = torch.zeros(2, branches, dtype=torch.float64)
        for part in self._parts(batch):
            _, rewards = self._judged(part, branches, self._temperature)
            for branch, own in enumerate(rewards):
                sums[0, branch] -= _sum(own)
                sums[1, branch] += len(own)
        return sums.to(self.sharding.device)

    @torch.no_grad()
    def samples(self, batch: Mapping[str, Any]) -> list[Sample]:
        """Returns what the model answers to this rank's prompts, greedily, by the weights that forwards see
        now. All ranks must call it; raises RewardFailed as a step does."""
        self.settle(batch, 1)
        found: list[Sample] = []
        for part in self._parts(batch):
            completions, (rewards,) = self._judged(part, 1, 0.0)
            found += map(Sample, self._rewarded.prompts(part)[0], completions, rewards)
        return found

    def settle(self, batch: Mapping[str, Any], branches: int) -> None:
        """Finds, at the first batch, which logits the model lets be left out, and its trunk."""
        assert self._head is not None
        if not self._tried:
            self._tried = True
            two = {name: batch[name][:2] for name in (IDS, MASK) if name in batch}
            prompts = prompts_of(two)
            self._head(
                self._inputs(prompts, branches), last_positions(prompts), branches, lambda z, _: z
            )
        if self.trunk is not None and not self.trunk.settled:
            two = two_of({name: batch[name] for name in (IDS, MASK) if name in batch})
            self.trunk.settle(lambda: self._sums(two, branches))

    def _sums(self, batch: Mapping[str, Any], branches: int, part: int = 0) -> Tensor:
        """Returns two numbers of each branch's first logits, by which forwards of two kinds are compared."""
        logits = self._prefilled(prompts_of(batch), branches, self._cache())
        by_branch = logits.double().view(branches, -1)
        return torch.stack([by_branch.logsumexp(dim=1), by_branch.square().mean(dim=1)])

    def _parts(self, batch: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        size, count = self.micro_batch or len(batch[IDS]), len(batch[IDS])
        parts: list[Mapping[str, Any]] = [
            {name: column[start : start + size] for name, column in batch.items()}
            for start in range(0, count, size)
        ]
        if self.micro_batch:
            idle = {**parts[-1], MASK: torch.zeros_like(parts[-1][IDS])}
            parts += [idle] * (self.sharding.maxima([len(parts)])[0] - len(parts))
        return parts

    def _judged(
        self, part: Mapping[str, Any], branches: int, temperature: float
    ) -> tuple[list[str], list[list[float]]]:
        """Returns the text of each real prompt's completion in each branch, branch-major, and the rewards of
        each branch: NaN where a logit was."""
        prompts, cache = prompts_of(part), self._cache()
        choose: Choose = likeliest
        if temperature:
            choose = Drawn(self._seed, self.step, temperature, prompts.tokens)
        found, broken = self._decoder(
            choose, prompts, branches, cache, partial(self._prefilled, prompts, branches, cache),
            self._decoded, self.seat,
        )  # fmt: skip
        real = prompts.real.repeat(branches).tolist()
        texts = [self._rewarded.text(ids) for ids, of in zip(found, real, strict=True) if of]
        rewards = self._agreed(partial(self._rewarded.rewards, part, texts, branches))
        lost = iter(row in broken for row, of in enumerate(real) if of)
        return texts, [[math.nan if next(lost) else r for r in own] for own in rewards]

    def _cache(self) -> Any:
        module: Any = self.sharding.module
        return cache_for(module.config, self._rewarded.most)

    def _prefilled(self, prompts: Prompts, branches: int, cache: Any) -> Tensor:
        """Fills a cache with the prompts in all branches; returns logits of their last positions,
        (branches * B, vocabulary)."""
        assert self._head is not None
        inputs = {**self._inputs(prompts, branches), "past_key_values": cache, "use_cache": True}
        positions = last_positions(prompts)
        with self._split({IDS: prompts.ids}, branches, positions):
            logits = self._head(inputs, positions, branches, lambda z, _: z)
        return logits.flatten(0, 1)

    def _decoded(self, inputs: dict[str, Any]) -> Tensor:
        """Returns logits of one token a row, (rows, vocabulary)."""
        assert self._head is not None
        rows, first = len(inputs[IDS]), torch.zeros(1, dtype=torch.int64)
        inputs = {**self._taken(inputs), "use_cache": True}
        return self._head(inputs, first, rows, lambda z, _: z).flatten(0, 1)

    def _inputs(self, prompts: Prompts, branches: int) -> dict[str, Any]:
        return self._taken(repeat(prompts.inputs, branches))

    def _taken(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the model's forward takes, on its device."""
        device, takes = self.sharding.device, self._parameters
        return {
            key: value.to(device) if isinstance(value, Tensor) else value
            for key, value in inputs.items()
            if key in takes
        }

    def _agreed(self, judge: Callable[[], list[list[float]]]) -> list[list[float]]:
        """Returns what a judge gives; where it fails on some rank, all ranks raise RewardFailed."""
        failed, rewards = None, []
        try:
            rewards = judge()
        except RewardFailed as error:
            failed = error
        if self.sharding.everyone > 1 and self.sharding.maxima([failed is not None])[0]:
            if failed is None:
                failed = RewardFailed("a reward function failed on another rank, which names it")
                failed.speaks = False
            else:
                failed.speaks = True
        if failed is not None:
            raise failed
        return rewards


def _sum(rewards: Sequence[float]) -> float:
    """Returns a sum that does not depend on the order; NaN where a reward is not finite."""
    if not all(map(math.isfinite, rewards)):
        return math.nan
    return sum(round(reward * GRID) for reward in rewards) / GRID


def refuse_unfit(sharding: Sharding, config: TezoConfig) -> None:
    """Raises ConfigError if a model, or a config, cannot be trained by what is generated."""
    module: Any = sharding.module
    name = type(module).__name__
    able = hasattr(module, "can_generate") and module.can_generate()
    if not able or is_encoder_decoder(module) or getattr(module, "_is_stateful", False):
        raise ConfigError(
            f"reward: {name} does not go on from keys and values of a text; take a causal model"
        )
    odd = {
        "method": config.facts.solves and "needs logits of a loss",
        "rho": config.rho == "auto" and "cannot be chosen by what moves in jumps",
        "placement": config.placement == "per_example" and "is for losses of one forward",
        "compile": config.compile and "is for forwards of one shape",
        "memory_budget": config.memory_budget is not None and "does not know how long completions get",
        "trunk_cache": config.trunk_cache != "off" and "keeps no keys and values",
    }  # fmt: skip
    for field, why in odd.items():
        if why:
            raise ConfigError(
                f"{field}: {getattr(config, field)} {why}, so not with a reward; set another"
            )
