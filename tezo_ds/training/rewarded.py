"""Runs that train on rewards: who judges, which prompts, and how far the model is at some of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tezo_ds.config import TezoConfig
from tezo_ds.engine.engine import Engine
from tezo_ds.errors import ConfigError
from tezo_ds.rewards import load_judges
from tezo_ds.rollouts.judged import Rewarded, Sample
from tezo_ds.rollouts.objective import RewardObjective
from tezo_ds.rollouts.prompts import PROMPT
from tezo_ds.settings import RunOptions, Settings
from tezo_ds.tasks import TaskData
from tezo_ds.tasks.encoded import Encoded
from tezo_ds.tasks.evaluation import SHOWN, Score, Stopped
from tezo_ds.tasks.metrics import NONE
from tezo_ds.tasks.posing import Posing, posing_of
from tezo_ds.tasks.prompted import ANSWER, Prompted, Prompting, collate_prompts
from tezo_ds.tasks.spec import TaskSpec


def refuse_unfit(settings: Settings, options: RunOptions, config: TezoConfig) -> None:
    """Raises ConfigError if options are set that a run on rewards, or one on a loss, cannot serve."""
    s = settings
    if not s.reward:
        if s.reward_weights:
            raise ConfigError("--reward-weights: there is no --reward; add one for each")
        return
    odd = {
        "--objective": s.objective != "lm", "--metric": s.metric != NONE,
        "--output-layer": config.output_layer != "frozen", "--include auto": config.chooses,
        "--stop-on-divergence": options.stop_on_divergence, "--loss-on": s.loss_on != "completion",
    }  # fmt: skip
    if wrong := next((name for name, is_odd in odd.items() if is_odd), None):
        raise ConfigError(f"{wrong}: is for runs that train on a loss; leave it or --reward out")


def rewarded_by(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, task: TaskData
) -> Rewarded | None:
    """Returns what a run generates and who judges it; None of a run that trains on a loss.

    Raises:
        ConfigError: a reward function cannot be had, or needs a column that is not there.
    """
    s = settings
    if not s.reward:
        return None
    judges = load_judges(
        s.reward, s.reward_weights or None, timeout=s.reward_timeout, run_code=s.run_code
    )
    first = task.train[0]
    known = {*(first.columns or {}), *([] if first.answer is None else [ANSWER])} - {PROMPT}
    if known or first.columns:
        judges.require(known)
    return Rewarded(judges, tokenizer, s.max_new_tokens, s.stop)


def posing_for(
    settings: Settings, module: Any, tokenizer: PreTrainedTokenizerBase, spec: TaskSpec, words_alone: bool
) -> Posing:  # fmt: skip
    """Returns what makes sequences of a run's examples for its model: prompts alone, where rewards are
    trained on."""
    if settings.reward:
        return Prompting(tokenizer, settings.max_new_tokens)
    return posing_of(module, tokenizer, spec, words_alone)


class RewardEvaluator:
    """Mean reward of one fixed set of prompts, split over the ranks; greedy, whatever the run's temperature.

    Attributes:
        examples: how many there are, over all ranks.
        encoded, cache, loss_alone, generated: as of `tasks.evaluation.Evaluator`.
    """

    def __init__(
        self, engine: Engine, prompts: Sequence[Encoded], share: range, batch_size: int, pad: int
    ) -> None:
        assert isinstance(engine.objective, RewardObjective) and isinstance(prompts[0], Prompted)
        self._engine, self._objective, self._filler = engine, engine.objective, prompts[0]
        self._batch_size, self._pad = batch_size, pad
        self.examples, self.encoded = len(prompts), list(prompts[share.start : share.stop])
        self.cache = self.loss_alone = self.generated = None

    def samples(self, count: int) -> list[Sample]:
        """Returns what the present model answers to the first of this rank's prompts. All ranks must call
        it."""
        return self._samples(self.encoded[:count])

    def _samples(self, prompts: Sequence[Encoded]) -> list[Sample]:
        return self._objective.samples(collate_prompts(prompts, self._pad, self._filler))

    def __call__(
        self,
        progress: Callable[[float], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Score:
        """Judges completions of all prompts; every rank must call this. The loss is minus the mean reward.

        Raises:
            Stopped: `stop` said so on some rank; raised on all.
            RewardFailed: a reward function failed.
        """
        sharding, size = self._engine.sharding, self._batch_size
        rounds = sharding.maxima([-(-len(self.encoded) // size)])[0]
        found: list[Sample] = []
        with self._engine.applied():
            for index in range(rounds):
                found += self._samples(self.encoded[index * size : (index + 1) * size])
                if progress is not None:
                    progress((index + 1) / rounds)
                if sharding.maxima([stop()])[0]:
                    raise Stopped
        total = torch.tensor([sum(x.reward for x in found)], dtype=torch.float64)
        mean = sharding.all_reduce(total.to(sharding.device)).item() / self.examples
        answers = tuple(sample.completion for sample in found[:SHOWN])
        return Score(None, -mean, self.examples, mean, answers)
