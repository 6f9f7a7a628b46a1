"""From settings to something that can train or be evaluated: model, data, engine."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tezo_ds.config import BLOCK, TezoConfig, read_json, resolve
from tezo_ds.engine import Engine
from tezo_ds.errors import ConfigError
from tezo_ds.loading import join_world, load_model, load_tokenizer
from tezo_ds.runfolder import COEFFICIENTS, CONFIG
from tezo_ds.sharding import sharding_of
from tezo_ds.tasks import TaskData, first_tokens, load_task
from tezo_ds.tasks.evaluation import Evaluator


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
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    objective: Literal["lm", "choices"] = "lm"


@dataclass
class Session:
    """A model with its engine and its task's examples."""

    settings: Settings
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    task: TaskData

    @property
    def pad_id(self) -> int:
        """The token that pads a batch; masked out wherever it does."""
        return int(self.tokenizer.pad_token_id)

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
    settings: Settings, config: TezoConfig, deepspeed_config: dict[str, Any] | None
) -> Session:
    """Loads data first (its errors come at once), then the model, sharded as the config says.

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
    model = load_model(s.model, s.dtype, deepspeed_config)
    engine = Engine(sharding_of(model, deepspeed_config), config, loss_fn=None)
    if s.objective == "choices":
        engine.objective.choices = _choices(tokenizer, task)
    return Session(settings, engine, tokenizer, task)


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
    deepspeed: Path | None,
    overrides: dict[str, Any] | None = None,
    defaults: dict[str, Any] | None = None,
) -> tuple[TezoConfig, dict[str, Any] | None]:
    """The tezo block with the command line's overrides, and the DeepSpeed config if there is one;
    joins the launcher's world on the way, as ZeRO-3 needs one before the model is built.

    Raises:
        ConfigError: see `config.resolve`; a stage other than 3.
    """
    source: Path | dict[str, Any] = {} if deepspeed is None else deepspeed
    config, deepspeed_config = resolve(source, overrides, defaults)
    if deepspeed_config is not None:
        from tezo_ds.sharding import zero3

        deepspeed_config = zero3.prepare(deepspeed_config)
    join_world(deepspeed=deepspeed_config is not None)
    return config, deepspeed_config


def describe_run(session: Session, extra: dict[str, Any]) -> dict[str, Any]:
    """config.json: all it takes to evaluate or repeat the run."""
    return {
        BLOCK: session.engine.config.model_dump(mode="json"),
        "settings": session.settings.model_dump(mode="json"),
        "weights_dtype": weights_dtype(session.engine),
        "world_size": session.engine.sharding.world_size,
        **extra,
        "versions": {name: version(name) for name in ("tezo_ds", "torch", "transformers")},
    }


def weights_dtype(engine: Engine) -> str:
    """The dtype in which a run's factors are rounded, e.g. "bfloat16"."""
    return str(next(engine.sharding.module.parameters()).dtype).removeprefix("torch.")


def read_run(folder: Path) -> tuple[Settings, TezoConfig]:
    """Settings and config of a run folder; the dtype is the one the run really had.

    Raises:
        ConfigError: it is no run folder.
    """
    content = read_json(folder / CONFIG)
    if BLOCK not in content or "settings" not in content:
        raise ConfigError(f'{folder / CONFIG}: no "{BLOCK}" and "settings"; is it a run folder?')
    try:
        settings = Settings(**{**content["settings"], "dtype": content.get("weights_dtype")})
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors())
        raise ConfigError(f"{folder / CONFIG}: missing or malformed: {fields}") from None
    return settings, resolve({BLOCK: content[BLOCK]})[0]


def load_result(engine: Engine, folder: Path) -> None:
    """Gives the engine the coefficients of a run folder.

    Raises:
        ConfigError: there are none, or of another model.
    """
    path = folder / COEFFICIENTS
    if not path.exists():
        raise ConfigError(f"{path} does not exist; has the run ended?")
    engine.load_coefficients(load_file(path))
