"""Entry of the Python API: an engine for a user's model and config, both checked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from tezo_ds.config import TezoConfig, resolve
from tezo_ds.engine.engine import Engine
from tezo_ds.errors import ConfigError
from tezo_ds.installed import need_deepspeed
from tezo_ds.intake.checked_engine import checked_engine
from tezo_ds.intake.notices import notices
from tezo_ds.losses.objective import LossFn
from tezo_ds.rewards import load_judges
from tezo_ds.rewards.found import Reward
from tezo_ds.rollouts.judged import Rewarded
from tezo_ds.sharding import sharding_of
from tezo_ds.sharding.absent import absent_from, refuse_absent

log = logging.getLogger(__name__)


def initialize(
    model: nn.Module,
    config: TezoConfig | dict[str, Any] | str | Path,
    loss_fn: LossFn | None = None,
    *,
    reward_fn: Reward | Sequence[Reward] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 50,
    stop: Sequence[str] = (),
) -> Engine:
    """Returns an engine for `model`.

    Args:
        model: any module, or a DeepSpeed ZeRO-3 engine made without an optimizer; put in eval mode.
            Weights are written by `Engine.merge`, methods that write weights, ended periods as they
            are loaded and, for the time of a step, the in-place probe; by nothing else.
        config: a TezoConfig; a dict of its fields; a DeepSpeed config (dict, or path to its JSON)
            with a "tezo" block, by whose zero_optimization a plain module is then partitioned.
        loss_fn: (outputs, batch) -> (loss_sum per example, count per example). The default is
            cross-entropy on batch["labels"] (-100 ignored): next-token for causal models, in place for
            masked ones and decoders with an encoder, of classes (B,) for sequence classification.
        reward_fn: in place of a loss, (prompts, completions, **columns) -> a reward for each completion of
            what the model generates, as TRL takes it; of several the rewards are added. A step's batch
            then has input_ids and attention_mask of prompts, int64 (B, T), and lists of B items as columns;
            a rank without prompts passes a mask of zeros.
        tokenizer: the model's, which reads completions for `reward_fn`.
        max_new_tokens: tokens of a completion, at most.
        stop: texts that end a completion, besides EOS.

    Raises:
        ConfigError, ProbeError, ShardingError: one line that says what to change.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"initialize: the model must be a torch.nn.Module, got {_kind(model)}; pass the loaded model"
        )
    if not isinstance(config, (TezoConfig, dict, str, Path)):
        raise ConfigError(
            "initialize: the config must be a TezoConfig, a dict or the path of a JSON, got "
            f'{_kind(config)}; pass e.g. {{"rank": 16}}'
        )
    if loss_fn is not None and not callable(loss_fn):
        raise ConfigError(
            "initialize: loss_fn must be a function (outputs, batch) -> (loss sums, counts), got "
            f"{_kind(loss_fn)}"
        )
    rewarded = _rewarded(reward_fn, loss_fn, tokenizer, max_new_tokens, stop)
    resolved, deepspeed_config = resolve(config)
    if deepspeed_config is not None and "zero_optimization" in deepspeed_config:
        need_deepspeed("initialize: a config with zero_optimization")
        from tezo_ds.intake.deepspeed_json import fit  # imports DeepSpeed, which takes seconds

        deepspeed_config = fit(deepspeed_config)
    if resolved.trunk_cache == "disk":
        raise ConfigError(
            "trunk_cache: disk keeps files in the run folder of `tezo-ds train`; use memory here"
        )
    if resolved.output_layer != "frozen":
        raise ConfigError(
            f"output_layer: {resolved.output_layer} is fitted by `tezo-ds train`, which knows the label "
            "words; leave it frozen here"
        )
    if resolved.chooses:
        raise ConfigError(
            "include: auto measures on a task's examples, which `tezo-ds train` has; name what trains here, "
            "e.g. as tezo-ds probe-layers recommends"
        )
    absent, brought_to = absent_from(model)
    splits = "zero_optimization" in (deepspeed_config or {})
    if brought_to is None or resolved.rank == "auto" or splits:
        refuse_absent(absent, "initialize")
    sharding = sharding_of(model, deepspeed_config)
    engine = checked_engine(sharding, resolved, loss_fn, rewarded=rewarded)
    if engine.probe.writes or resolved.refresh_every:
        refuse_absent(absent, f"method {resolved.method} and probe {engine.probe.name}")
    engine.sharding.module.eval()
    for line in notices(engine) if sharding.place == 0 else []:
        log.warning("config: %s", line)
    return engine


def _rewarded(
    reward_fn: Reward | Sequence[Reward] | None, loss_fn: LossFn | None,
    tokenizer: PreTrainedTokenizerBase | None, most: int, stop: Sequence[str],
) -> Rewarded | None:  # fmt: skip
    if reward_fn is None:
        return None
    if loss_fn is not None:
        raise ConfigError("initialize: loss_fn and reward_fn both say what to train on; keep one")
    if tokenizer is None:
        raise ConfigError(
            "initialize: reward_fn judges texts, and there is no tokenizer to read them; pass the model's"
        )
    if most < 1:
        raise ConfigError(f"initialize: max_new_tokens is {most}; it must be at least 1")
    several: Any = reward_fn if isinstance(reward_fn, list | tuple) else [reward_fn]
    return Rewarded(load_judges(several), tokenizer, most, tuple(stop))


def _kind(thing: object) -> str:
    return "None" if thing is None else type(thing).__name__
