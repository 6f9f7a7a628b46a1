"""What a run's folder holds of its result, and how an engine gets there: by loading coefficients, by
starting from the merged model, or by replaying the steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tezo_ds.config import TezoConfig, read_json
from tezo_ds.engine import Engine
from tezo_ds.errors import ConfigError
from tezo_ds.merged import is_complete
from tezo_ds.methods import in_coefficients
from tezo_ds.runfolder import COEFFICIENTS, CONFIG, METRICS, MODEL, SUMMARY, read_metrics

if TYPE_CHECKING:
    from tezo_ds.display import Display


@dataclass(frozen=True)
class Result:
    """One of the three, and what an engine has to be made with.

    Attributes:
        coefficients: by parameter name, as of `Engine.coefficients`.
        model: folder of the merged model, to be loaded in place of the base model; then nothing is left
            to do.
        steps: lines of metrics.jsonl, from the first step on.
        ranks: of each matrix, where the run chose them itself.
    """

    coefficients: dict[str, Tensor] = field(default_factory=dict)
    model: Path | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    ranks: dict[str, int] | None = None

    @property
    def writes(self) -> bool:
        """Whether `give` writes weights; they then have to be of the dtype that the run's shards had."""
        return bool(self.steps) or any(part.dim() == 2 for part in self.coefficients.values())

    def give(self, engine: Engine, display: Display) -> None:
        """Takes an engine that was just made to the result. All ranks must call it.

        Raises:
            TezoError: the result is of another model.
        """
        if self.coefficients:
            engine.load_coefficients(self.coefficients)
        if not self.steps:
            return
        display.note(f"replaying {len(self.steps)} steps of {METRICS} from the base model")
        with display.evaluation("replaying") as progress:
            for line in self.steps:
                engine.replay(line["step"], line["kappa"], line["lr"], line["rho"])
                if progress is not None:
                    progress(engine.step_index / len(self.steps))
        engine.check()  # ranks may have read the file of a run that still goes on


def read_result(folder: Path, config: TezoConfig, base: bool = False) -> Result:
    """The result of a run, in the most exact form that its folder has.

    Args:
        folder: of the run.
        config: of the run.
        base: the run's own model is not to be used; the result is put on the base model.

    Raises:
        ConfigError: there is none, or its file is damaged.
    """
    ranks = _ranks(folder) if config.rank == "auto" else None
    path = folder / COEFFICIENTS
    if in_coefficients(config) and path.exists():
        try:
            return Result(coefficients=load_file(path), ranks=ranks)
        except SafetensorError as error:
            raise ConfigError(f"{path}: cannot be read ({error}); take it from a copy") from None
    if is_complete(folder / MODEL) and not base:
        return Result(model=folder / MODEL, ranks=ranks)
    if not (folder / METRICS).exists():
        raise ConfigError(f"{path} does not exist; has the run ended?")
    return Result(steps=steps_to_replay(folder), ranks=ranks)


def steps_to_replay(folder: Path) -> list[dict[str, Any]]:
    """The step lines of a run's metrics.jsonl.

    Raises:
        ConfigError: one is missing or has no slopes.
    """
    path = folder / METRICS
    steps, _ = read_metrics(path)
    expected = len(steps)
    if (folder / SUMMARY).exists():
        summary = read_json(folder / SUMMARY)
        if summary.get("status") != "failed":  # in the middle of a step that has no line, perhaps
            expected = summary.get("steps", expected)
    for step, line in enumerate(steps):
        if line.get("step") != step:
            raise ConfigError(f"{path}: {_hole(step)}, the line after it is of {line.get('step')}")
        # a kappa may be null: that one failed
        if not line.get("kappa") or line.get("lr") is None or line.get("rho") is None:
            raise ConfigError(
                f"{path}: step {step} has no kappa, lr or rho, so it cannot be replayed"
            )
    if len(steps) < expected:
        raise ConfigError(f"{path}: {_hole(len(steps))}, and the run had {expected}")
    return steps


def _hole(step: int) -> str:
    return (
        f"step {step} is missing, so nothing can be replayed from there; take the file from a copy"
    )


def _ranks(folder: Path) -> dict[str, int]:
    ranks = read_json(folder / CONFIG).get("ranks")
    if not isinstance(ranks, dict) or not all(isinstance(r, int) and r > 0 for r in ranks.values()):
        raise ConfigError(
            f'{folder / CONFIG}: "ranks" of a run of rank auto is missing or malformed'
        )
    return ranks


@torch.no_grad()
def gathered_in(engine: Engine, dtype: torch.dtype) -> None:
    """Rounds the weights of one process to what a run in mixed precision gathered from its shards, and
    before that adds what is kept aside."""
    engine.merge()
    for parameter in engine.sharding.module.parameters():
        parameter.data = parameter.data.to(dtype)
