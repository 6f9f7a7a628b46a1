"""From settings to something that can train or be evaluated: model, data, engine."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tezo_ds.config import BLOCK, TezoConfig, build, read_json, resolve
from tezo_ds.engine import Engine
from tezo_ds.errors import ConfigError
from tezo_ds.loading import TIMEOUT, join_world, load_model, load_tokenizer
from tezo_ds.runfolder import CONFIG
from tezo_ds.sharding import Sharding, sharding_of
from tezo_ds.tasks import TaskData, first_tokens, load_task
from tezo_ds.tasks.evaluation import Evaluator

Dtype = Literal["float32", "bfloat16", "float16"]


class Settings(BaseModel):
    """What both commands need to know besides the `tezo` block; kept in a run's config.json."""

    model_config = ConfigDict(extra="forbid")

    model: str
    task: str
    data: str | None = None
    test_data: str | None = None
    template: str | None = None
    verbalizers: dict[str, str] | None = None
    label_field: str | None = None
    test_fraction: float = 0.2
    train_examples: int | None = None
    test_examples: int | None = None
    data_seed: int = 0
    max_length: int = Field(512, ge=2)
    eval_batch_size: int = Field(32, ge=1)
    dtype: Literal["auto", Dtype] = "auto"
    compute_dtype: Dtype | None = None  # of a forward; None: of the weights
    factors_dtype: Dtype | None = None  # to which the run rounded U and V; None: the compute dtype
    fsdp: bool = False
    fsdp_replicas: int = Field(1, ge=1)
    fsdp_offload_params: bool = False
    fsdp_layers: tuple[str, ...] | None = None
    objective: Literal["lm", "choices"] = "lm"


class _About(BaseModel):
    """Of config.json what is read again; the rest is for people."""

    model_config = ConfigDict(strict=True)

    tezo: dict[str, Any]
    settings: Settings
    weights_dtype: Dtype
    factors_dtype: Dtype | None = None
    batch_size: int
    deepspeed: dict[str, Any] | None = None
    ranks: dict[str, Annotated[int, Field(ge=1)]] | None = None
    versions: dict[str, str]


@dataclass
class Session:
    """A model with its engine and its task's examples."""

    settings: Settings
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    task: TaskData

    @property
    def pad_id(self) -> int:
        """The token that pads a batch; masked out wherever it does, so 0 will do for one without."""
        return int(self.tokenizer.pad_token_id or 0)

    def evaluator(self) -> Evaluator | None:
        """Of the test examples; None where there are none."""
        if not self.task.test:
            return None
        s = self.settings
        return Evaluator(
            self.engine,
            self.tokenizer,
            self.task.spec,
            self.task.test,
            s.eval_batch_size,
            s.max_length,
        )


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
        deepspeed_config: that shards the weights; None: none does.
        ranks: of each matrix, where an earlier run chose them itself.
        batch_size: examples a step over all ranks, of a run that trains.

    Raises:
        TezoError: one line that says what to change.
    """
    s = settings
    task = load_task(
        s.task, data=s.data, test_data=s.test_data, template=s.template, verbalizers=s.verbalizers,
        label_field=s.label_field, test_fraction=s.test_fraction, train_examples=s.train_examples,
        test_examples=s.test_examples, seed=s.data_seed,
    )  # fmt: skip
    tokenizer = load_tokenizer(s.model)
    if batch_size and config.query_schedule != "constant" and config.steps_per_epoch is None:
        steps = math.ceil(len(task.train) / batch_size)
        config = config.model_copy(update={"steps_per_epoch": steps})
    engine = open_engine(s, config, deepspeed_config, ranks)
    if s.objective == "choices":
        engine.objective.choices = _choices(tokenizer, task)
    return Session(settings, engine, tokenizer, task)


def open_engine(
    settings: Settings,
    config: TezoConfig,
    deepspeed_config: dict[str, Any] | None,
    ranks: Mapping[str, int] | None = None,
) -> Engine:
    """Loads the model, sharded as the settings or the DeepSpeed config say; see `open_session`.

    Raises:
        TezoError: one line that says what to change.
    """
    s, plan = settings, None
    if s.fsdp:
        from tezo_ds.fsdp_loading import FsdpPlan

        compute_dtype = None if s.compute_dtype is None else getattr(torch, s.compute_dtype)
        plan = FsdpPlan(s.fsdp_replicas, compute_dtype, s.fsdp_offload_params, s.fsdp_layers)
    model = load_model(s.model, s.dtype, deepspeed_config, plan)
    sharding = sharding_of(model, deepspeed_config)
    sharding.filled_apart |= s.fsdp  # copies on different nodes come from different files
    return engine_for(s, config, sharding, ranks)


def engine_for(
    settings: Settings, config: TezoConfig, sharding: Sharding, ranks: Mapping[str, int] | None
) -> Engine:
    """An engine of a model that is loaded already; see `open_session`."""
    name = settings.factors_dtype
    return Engine(sharding, config, None, None if name is None else getattr(torch, name), ranks)


def _choices(tokenizer: PreTrainedTokenizerBase, task: TaskData) -> Tensor:
    """The token of each verbaliser's word.

    Raises:
        ConfigError: one token does not tell them apart.
    """
    words = list((task.spec.verbalizers or {}).values())
    prompts = [example.prompt for example in [*task.train, *task.test]]
    tokens = first_tokens(tokenizer, words, prompts) if words else None
    if tokens is None:
        raise ConfigError(
            f"--objective choices needs words of one token each, all different; {words} are not "
            "for this tokenizer: choose others, or use --objective lm"
        )
    return torch.tensor(tokens)


def resolve_config(
    deepspeed: Path | dict[str, Any] | None,
    overrides: dict[str, Any] | None = None,
    defaults: dict[str, Any] | None = None,
    fsdp: bool = False,
    timeout: float = TIMEOUT,
) -> tuple[TezoConfig, dict[str, Any] | None]:
    """As `read_config`; joins the launcher's world, as sharding needs one before the model is built."""
    config, deepspeed_config = read_config(deepspeed, overrides, defaults, fsdp)
    join_world(deepspeed_config is not None, fsdp, timeout)
    return config, deepspeed_config


def read_config(
    deepspeed: Path | dict[str, Any] | None,
    overrides: dict[str, Any] | None = None,
    defaults: dict[str, Any] | None = None,
    fsdp: bool = False,
) -> tuple[TezoConfig, dict[str, Any] | None]:
    """The tezo block with the command line's overrides, and the DeepSpeed config if there is one.

    Raises:
        ConfigError: see `config.resolve`; a stage other than 3; with `fsdp` anything but a tezo block.
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
        from tezo_ds.sharding import zero3

        deepspeed_config = zero3.prepare(deepspeed_config)
    return config, deepspeed_config


def describe(settings: Settings, config: TezoConfig) -> dict[str, Any]:
    """Of config.json what is known before a model is loaded."""
    return {BLOCK: config.model_dump(mode="json"), "settings": settings.model_dump(mode="json")}


def describe_run(session: Session, extra: dict[str, Any]) -> dict[str, Any]:
    """config.json: all it takes to evaluate or repeat the run."""
    config, matrices = session.engine.config, session.engine.space.matrices
    chosen = {"ranks": {m.name: m.rank for m in matrices}} if config.rank == "auto" else {}
    return {
        **describe(session.settings, config),
        "weights_dtype": _name(next(session.engine.sharding.module.parameters()).dtype),
        "factors_dtype": _name(matrices[0].rounding) if matrices else None,
        "world_size": session.engine.sharding.world_size,
        **extra,
        **chosen,
        "versions": {name: version(name) for name in ("tezo_ds", "torch", "transformers")},
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_run(folder: Path) -> tuple[Settings, TezoConfig]:
    """Settings and config of a run folder; the dtypes are those that the run really had.

    Raises:
        ConfigError: it is no run folder.
    """
    content = read_about(folder)
    weights = content["weights_dtype"]
    dtypes = {"dtype": weights, "factors_dtype": content.get("factors_dtype", weights)}
    return Settings(**{**content["settings"], **dtypes}), TezoConfig(**content[BLOCK])


def read_about(folder: Path) -> dict[str, Any]:
    """config.json of a run folder, in which all that is ever read again is there and of its type.

    Raises:
        ConfigError: it is no run folder, or the file is damaged; names the fields.
    """
    path = folder / CONFIG
    content = read_json(path)
    if BLOCK not in content or "settings" not in content:
        raise ConfigError(f'{path}: no "{BLOCK}" and "settings"; is it a run folder?')
    try:
        settings = _About(**content).settings
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors())
        raise ConfigError(f"{path}: missing or malformed: {fields}") from None
    config = build(content[BLOCK], f'{path}: "{BLOCK}" block')
    return {**content, **describe(settings, config)}


def sharded_as(
    folder: Path, deepspeed: Path | None, fsdp: bool | None
) -> tuple[Path | dict[str, Any] | None, bool]:
    """How to shard a run's model: as asked, and where nothing is, as the run did; but a process that
    is alone then holds it whole.

    Args:
        folder: of the run.
        deepspeed: the DeepSpeed JSON that was asked for.
        fsdp: whether FSDP2 was; None: nothing was said.

    Returns:
        The DeepSpeed config (the run's with an empty tezo block), and whether to use FSDP2.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if deepspeed is not None or fsdp is not None or alone:
        return deepspeed, bool(fsdp)
    content = read_about(folder)
    ran = content.get("deepspeed")
    return {**ran, BLOCK: {}} if ran else None, bool(content["settings"].get("fsdp"))
