"""Session: model, data and engine, made from settings, to train or to evaluate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tezo_ds.config import BLOCK, TezoConfig, resolve
from tezo_ds.engine.engine import Engine
from tezo_ds.errors import ConfigError
from tezo_ds.installed import need_deepspeed
from tezo_ds.intake.adapters import refuse_adapter
from tezo_ds.intake.causality import refuse_seen_answers
from tezo_ds.intake.checked_engine import checked_engine
from tezo_ds.intake.positions import fitting_length
from tezo_ds.intake.tokens import check_ids, embedding_rows, pad_of
from tezo_ds.intake.unfit_kinds import refuse_unfit
from tezo_ds.intake.unfit_objective import refuse_unfit_objective
from tezo_ds.intake.words import check_words
from tezo_ds.kinds import ModelKind, kind_named
from tezo_ds.models.loading import load_model, load_tokenizer
from tezo_ds.rollouts.judged import Rewarded
from tezo_ds.run.about import read_run, sharded_as
from tezo_ds.run.folder import TEST, VALIDATION
from tezo_ds.run.results import Result, read_result
from tezo_ds.settings import TIMEOUT, Settings
from tezo_ds.sharding import Sharding, sharding_of
from tezo_ds.sharding.world import join_world
from tezo_ds.tasks import Encoded, Example, TaskData, shard_range
from tezo_ds.tasks.evaluation import Evaluator
from tezo_ds.tasks.generation import Generated, Generator, asked
from tezo_ds.tasks.lazy import LazyEncoded, LazyExamples
from tezo_ds.tasks.metrics import NONE, metric_of
from tezo_ds.tasks.posing import Posing
from tezo_ds.training.examples import choices, load_asked
from tezo_ds.training.rewarded import RewardEvaluator, posing_for, rewarded_by


@dataclass
class Session:
    """A model with its engine and its task's examples.

    Attributes:
        settings: as asked, but for a `max_length` above the model's positions.
        engine: holds the model.
        tokenizer: the model's.
        task: the examples.
        pad_id: token that pads a batch, masked out wherever it does.
        words: tokens of the label words, int64 (words,), where they alone count in the loss; None: all do.
    """

    settings: Settings
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    task: TaskData
    pad_id: int
    words: Tensor | None = None

    @property
    def posing(self) -> Posing:
        """What makes sequences of the task's examples for the model."""
        module, alone = self.engine.sharding.module, self.words is not None
        return posing_for(self.settings, module, self.tokenizer, self.task.spec, alone)

    def encoded(self) -> Sequence[Encoded]:
        """Returns the training examples as sequences; with streaming, once a step takes them."""
        train, length = self.task.train, self.settings.max_length
        if isinstance(train, LazyExamples):
            rows = embedding_rows(self.engine.sharding.module)
            return LazyEncoded(train, self.tokenizer, self.posing, length, rows)
        return self.posing.encode(train, length)

    def train_only(self, ranks: Mapping[str, int], config: TezoConfig) -> None:
        """Replaces the engine by one that trains just these matrices, each with its rank. All ranks must call
        this, before the first step."""
        before = self.engine
        term, choices = before.output_layer.state, before.objective.choices
        before.output_layer.load({})  # what stands in the layer's forward from now on adds nothing
        self.engine = engine_for(self.settings, config, before.sharding, ranks)
        _ask(self.engine, self.settings, choices)
        self.engine.output_layer.load(term)

    def anew(
        self, config: TezoConfig, batch_size: int | None, ranks: Mapping[str, int] | None = None
    ) -> Session:
        """Returns a session of the same model and data, whose weights are what they were, with a new engine.
        All ranks must call this."""
        self.engine.output_layer.load({})  # see `train_only`
        config = _with_epochs(config, self.task, batch_size)
        rewarded = rewarded_by(self.settings, self.tokenizer, self.task)
        engine = engine_for(self.settings, config, self.engine.sharding, ranks, rewarded)
        _ask(engine, self.settings, self.words)
        return replace(self, engine=engine)

    def evaluator(self, part: str = TEST) -> Evaluator | RewardEvaluator | None:
        """Returns an evaluator of the test or the validation examples; None where there are none."""
        examples, s = self.task.validation if part == VALIDATION else self.task.test, self.settings
        if not examples:
            return None
        if s.reward:
            share = shard_range(
                len(examples), self.engine.sharding.rank, self.engine.sharding.world_size
            )
            prompts = self.posing.encode(examples, s.max_length)
            return RewardEvaluator(self.engine, prompts, share, s.eval_batch_size, self.pad_id)
        evaluator = Evaluator(
            self.engine,
            self.tokenizer,
            self.task.spec,
            examples,
            s.eval_batch_size,
            s.max_length,
            self.pad_id,
        )
        if s.metric != NONE:
            evaluator.generated = self._generated(examples)
        return evaluator

    def _generated(self, examples: Sequence[Example]) -> Generated:
        """Returns what measures generated answers to this rank's share of examples."""
        s, sharding = self.settings, self.engine.sharding
        share = shard_range(len(examples), sharding.rank, sharding.world_size)
        mine = examples[share.start : share.stop]
        prompts, right = asked(self.tokenizer, mine, s.max_length, s.max_new_tokens, self.posing)
        generator = Generator(
            self.engine, self.tokenizer, self.pad_id, s.max_new_tokens, s.stop, s.eval_batch_size
        )
        return Generated(metric_of(s.metric), generator, prompts, right)


def open_session(
    settings: Settings,
    config: TezoConfig,
    deepspeed_config: dict[str, Any] | None,
    ranks: Mapping[str, int] | None = None,
    batch_size: int | None = None,
) -> Session:
    """Loads data first (its errors come at once), then the model, sharded as the config says.

    Args:
        settings: model and data.
        config: the tezo block.
        deepspeed_config: DeepSpeed config that shards the weights; None: none does.
        ranks: rank of each matrix, where an earlier run chose ranks itself.
        batch_size: examples a step over all ranks, of a run that trains.

    Raises:
        TezoError: one line that says what to change.
    """
    s = settings
    task = load_asked(s)
    refuse_adapter(s.model)
    kind = kind_named(s.model, s.trust_remote_code)
    refuse_unfit(kind, s, config, task)
    refuse_unfit_objective(s, config)
    tokenizer = load_tokenizer(s.model, trust=s.trust_remote_code)
    if kind is not ModelKind.CLASSIFIER:  # which has no use for words
        check_words(tokenizer, task)
    config = _with_epochs(config, task, batch_size)
    rewarded = rewarded_by(s, tokenizer, task)
    engine = _open_engine(s, config, deepspeed_config, ranks, rewarded)
    model, words = engine.sharding.module, None
    posing = posing_for(s, model, tokenizer, task.spec, s.objective != "lm")
    if s.objective != "lm" and kind is not ModelKind.CLASSIFIER:  # whose classes need no words
        words = choices(posing, task, s.objective)
    _ask(engine, s, words)
    if rewarded is not None and task.train[0].answer is None:
        task.note = None  # that what has no answer is trained on as a whole
    task.note = "; ".join(filter(None, (task.note, posing.note))) or None
    s = s.model_copy(update={"max_length": fitting_length(model, s.max_length)})
    rows = embedding_rows(model)
    known = [] if s.streaming or not batch_size else task.train  # others when a step takes them
    judged = [*task.test, *task.validation]
    check_ids(tokenizer, posing, rows, task.spec, known, judged, s.max_length)
    pad_id = pad_of(model, tokenizer, rows)
    refuse_seen_answers(engine, tokenizer, task.train[0].prompt)
    return Session(s, engine, tokenizer, task, pad_id, words)


def _ask(engine: Engine, settings: Settings, words: Tensor | None) -> None:
    """Sets what an engine's branches are judged by, where they are not judged by rewards."""
    engine.objective.choices = words
    if settings.objective in ("accuracy", "f1"):
        engine.objective.metric = settings.objective


def _with_epochs(config: TezoConfig, task: TaskData, batch_size: int | None) -> TezoConfig:
    """Returns the config with the steps of an epoch, where its queries go by them."""
    if not batch_size or config.query_schedule == "constant" or config.steps_per_epoch is not None:
        return config
    steps = math.ceil(len(task.train) / batch_size)
    return config.model_copy(update={"steps_per_epoch": steps})


def open_engine(
    settings: Settings,
    config: TezoConfig,
    deepspeed_config: dict[str, Any] | None,
    ranks: Mapping[str, int] | None = None,
) -> Engine:
    """Loads a model into an engine, sharded as the settings or the DeepSpeed config say; see `open_session`.

    Raises:
        TezoError: one line that says what to change.
    """
    refuse_adapter(settings.model)
    return _open_engine(settings, config, deepspeed_config, ranks)


def _open_engine(
    settings: Settings,
    config: TezoConfig,
    deepspeed_config: dict[str, Any] | None,
    ranks: Mapping[str, int] | None,
    rewarded: Rewarded | None = None,
) -> Engine:
    s, plan = settings, None
    if s.fsdp:
        from tezo_ds.models.fsdp import FsdpPlan

        compute_dtype = None if s.compute_dtype is None else getattr(torch, s.compute_dtype)
        plan = FsdpPlan(s.fsdp_replicas, compute_dtype, s.fsdp_offload_params, s.fsdp_layers)
    model = load_model(
        s.model,
        s.dtype,
        deepspeed_config,
        plan,
        s.trust_remote_code,
        s.load_in,
        s.attn_implementation,
    )
    sharding = sharding_of(model, deepspeed_config)
    sharding.filled_apart |= s.fsdp  # copies on different nodes come from different files
    return engine_for(s, config, sharding, ranks, rewarded)


def engine_for(
    settings: Settings, config: TezoConfig, sharding: Sharding, ranks: Mapping[str, int] | None,
    rewarded: Rewarded | None = None,
) -> Engine:  # fmt: skip
    """Returns an engine of a model that is loaded already; see `open_session`."""
    name = settings.factors_dtype
    rounding = None if name is None else getattr(torch, name)
    return checked_engine(sharding, config, factors_dtype=rounding, ranks=ranks, rewarded=rewarded)


@dataclass
class Finished:
    """A run that ended, as its folder has it.

    Attributes:
        settings: the run's settings; `model` is the merged one where that is the result, and `fsdp` is
            whether to shard by FSDP2 now.
        config: the tezo block.
        result: how an engine gets to the run's result.
        base_model: the model that the run started from.
        deepspeed: DeepSpeed config to shard by, if any.
    """

    settings: Settings
    config: TezoConfig
    result: Result
    base_model: str
    deepspeed: Path | dict[str, Any] | None


def open_result(
    folder: Path, deepspeed: Path | None = None, fsdp: bool | None = None, on_base: bool = False
) -> Finished:
    """Reads a run's result, and how to shard it over the processes that there are now.

    Args:
        folder: the run's folder.
        deepspeed: DeepSpeed JSON to shard by, in another way than the run did.
        fsdp: whether to shard by FSDP2; None: as the run did, see `sharded_as`.
        on_base: whether the result goes onto another base model, and the merged model is not to be used.

    Raises:
        ConfigError: there is no result. StorageError: the result is damaged, or another run's.
    """
    settings, config = read_run(folder)
    source, settings.fsdp = sharded_as(folder, deepspeed, fsdp)
    # Of a quantised base the merged model is not in the run's own form.
    on_base = on_base or settings.load_in is not None
    result, base_model = read_result(folder, config, on_base), settings.model
    settings.model = str(result.model or base_model)
    return Finished(settings, config, result, base_model, source)


def resolve_config(
    deepspeed: Path | dict[str, Any] | None,
    overrides: dict[str, Any] | None = None,
    defaults: dict[str, Any] | None = None,
    fsdp: bool = False,
    timeout: float = TIMEOUT,
) -> tuple[TezoConfig, dict[str, Any] | None]:
    """Reads what `read_config` does, and joins the launcher's world, which sharding needs before a model."""
    config, deepspeed_config = read_config(deepspeed, overrides, defaults, fsdp)
    # Ranks read a model at their own speed, so not less than that; `Liveness` shortens it for the steps.
    join_world(deepspeed_config is not None, fsdp, max(timeout, TIMEOUT))
    return config, deepspeed_config


def read_config(
    deepspeed: Path | dict[str, Any] | None,
    overrides: dict[str, Any] | None = None,
    defaults: dict[str, Any] | None = None,
    fsdp: bool = False,
) -> tuple[TezoConfig, dict[str, Any] | None]:
    """Reads the tezo block with the command line's overrides, and the DeepSpeed config if there is one.

    Raises:
        ConfigError: see `config.resolve`; a ZeRO stage other than 3; with `fsdp` anything but a tezo block.
    """
    source: Path | dict[str, Any] = {} if deepspeed is None else deepspeed
    config, deepspeed_config = resolve(source, overrides, defaults)
    if fsdp and deepspeed_config:
        raise ConfigError(
            f"--fsdp and --deepspeed both shard: {deepspeed} has {', '.join(deepspeed_config)}; with "
            f'--fsdp only its "{BLOCK}" block could be used, so give one of the two'
        )
    if fsdp:
        deepspeed_config = None
    elif deepspeed_config is not None:
        need_deepspeed("--deepspeed")
        from tezo_ds.intake.deepspeed_json import fit

        deepspeed_config = fit(deepspeed_config)
    return config, deepspeed_config
