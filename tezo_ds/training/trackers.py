"""Trackers that a run reports to: accelerate's own, on the rank that has the run's folder.

A run reports what metrics.jsonl has, a step as the number of steps that are then done. A tracker that fails
is let go, once said, as a run's result needs none.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from tezo_ds.config import BLOCK
from tezo_ds.engine.report import StepReport
from tezo_ds.errors import ConfigError
from tezo_ds.files.text import read_json
from tezo_ds.run.about import on_rewards
from tezo_ds.run.folder import (
    CONFIG,
    METRICS,
    PARTS,
    TENSORBOARD,
    TRACKERS,
    RunFolder,
    measured,
    read_metrics,
)
from tezo_ds.training.display import Display

if TYPE_CHECKING:  # takes a second, which runs without trackers need not wait for
    from accelerate.tracking import GeneralTracker

# Where wandb, trackio and mlflow put runs, unless their own variables name another.
PROJECT = "tezo_ds"

# Fields of a step's line in metrics.jsonl, and what trackers call them.
STEP = {
    "loss": "train/loss", "kappa_mean": "train/kappa", "kappa_spread": "train/kappa_spread",
    "gradient_norm": "train/gradient_norm", "snr": "train/snr", "lr": "train/lr", "rho": "train/rho",
    "dropped": "train/directions_failed", "reward": "train/reward", "reward_best": "train/reward_best",
    "reward_spread": "train/reward_spread",
}  # fmt: skip


def refuse_missing(names: Sequence[str]) -> None:
    """Raises ConfigError if a tracker's package is not installed, or `none` is named among others."""
    if not names:
        return
    from accelerate.tracking import get_available_trackers

    known = {str(each) for each in get_available_trackers()}
    for name in names:
        if name == "none":
            raise ConfigError("--report-to none: stands alone; leave it out, or the others")
        if name not in known:
            raise ConfigError(
                f"--report-to {name}: its package is not installed, or is switched off by its own variables; "
                f"pip install {name}"
            )


class Trackers:
    """Context manager: the trackers of one run, started where earlier processes of the run have left them.

    Args:
        names: of `RunOptions.report_to`.
        folder: the run's folder, opened; None on other ranks, which report nothing.
        display: receiver of notices.
    """

    def __init__(self, names: Sequence[str], folder: RunFolder | None, display: Display) -> None:
        self._names = names if folder is not None else ()
        self._folder, self._display = folder, display
        self._alive: dict[str, GeneralTracker] = {}
        self._rewarded = False

    def __enter__(self) -> Trackers:
        if self._names and self._folder is not None:
            self._rewarded = on_rewards(read_json(self._folder.path / CONFIG))
        for name in self._names:
            self._try(name, "could not start", partial(self._start, name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, tracker in list(self._alive.items()):
            self._try(name, "could not finish", tracker.finish)
        self._alive = {}

    def step(self, report: StepReport) -> None:
        """Reports a step by the fields that its line in metrics.jsonl has."""
        if self._alive:
            line = {"step": report.step, "rho": report.rho, "lr": report.lr, **measured(report)}
            self._log(_of_step(line) | {"memory/peak_gib": _peak() / 2**30}, line["step"] + 1)

    def score(self, line: Mapping[str, Any], step: int, of: str = "") -> None:
        """Reports an evaluation by the fields of its line in metrics.jsonl.

        Args:
            line: the fields.
            step: steps before it.
            of: what the evaluation is of, besides the part, where it is not of the weights after a step.
        """
        if self._alive:
            self._log(_of_score(line, of, self._rewarded), step)

    def _start(self, name: str) -> None:
        from accelerate import PartialState

        assert self._folder is not None
        threads = torch.get_num_threads()
        PartialState()  # which accelerate's trackers ask for the rank
        # The state's own choice would change the last bits of products.
        torch.set_num_threads(threads)
        path = self._folder.path
        known = read_json(path / TRACKERS) if (path / TRACKERS).exists() else {}
        tracker, own = _make(name, self._folder, known.get(name))
        tracker.start()
        self._alive[name] = tracker
        if name in known:
            return
        tracker.store_init_configuration(_flat(read_json(path / CONFIG)))
        for step, values in _past(self._folder, self._rewarded):
            tracker.log(_taken(name, values), step=step)
        self._folder.write_json(TRACKERS, {**known, name: own or str(tracker.tracker.info.run_id)})

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        for name, tracker in list(self._alive.items()):
            fit = _taken(name, values)
            self._try(name, f"failed after {step} steps", partial(tracker.log, fit, step=step))

    def _try(self, name: str, what: str, do: Callable[[], object]) -> None:
        try:
            do()
        except Exception as error:  # of any library, service or network
            failed = self._alive.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            self._display.note(
                f"warning: --report-to {name} {what} ({type(error).__name__}: {reason}); the run goes on "
                "without it"
            )
            if failed is not None and not what.endswith("finish"):
                with contextlib.suppress(Exception):
                    failed.finish()


def _make(name: str, folder: RunFolder, kept: str | None) -> tuple[GeneralTracker, str | None]:
    """Returns a tracker that is not started, and what it will know the run by, if that is known.

    Args:
        name: the tracker's name.
        folder: the run's folder.
        kept: what an earlier process's tracker knew the run by.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    env, path, new = os.environ, folder.path.absolute(), secrets.token_hex(4)
    project, own = env.get(f"{name.upper()}_PROJECT", PROJECT), kept
    given: dict[str, Any] = {"run_name": project}
    if name == "tensorboard":
        own = TENSORBOARD
        given = {"run_name": own, "logging_dir": str(path)}
    elif name == "wandb":
        own = kept or env.get("WANDB_RUN_ID", new)
        run = env.get("WANDB_NAME", path.name)
        given |= {"name": run, "id": own, "resume": "allow", "dir": str(path)}
    elif name == "trackio":  # knows a run by its name alone
        own = kept or f"{path.name}-{new}"
        given |= {"name": own, "resume": "allow", "embed": False}
    else:
        given = {"experiment_name": project, "run_name": path.name, "run_id": kept}
    return LOGGER_TYPE_TO_CLASS[name](**given), own


def _past(folder: RunFolder, rewarded: bool) -> Iterable[tuple[int, dict[str, Any]]]:
    """Returns what a tracker has missed of the steps that are made, in their order."""
    path = folder.path / METRICS
    found = [(line["step"] + 1, _of_step(line)) for line in read_metrics(path)[0]]
    for part in PARTS:
        for line in read_metrics(path, part)[1]:
            found.append((line["step"], _of_score(line, line.get("after", ""), rewarded)))
    return sorted(found, key=lambda pair: pair[0])


def _of_step(line: Mapping[str, Any]) -> dict[str, float]:
    seconds = line.get("seconds")
    speed = {"train/tokens_per_second": line["tokens"] / seconds} if seconds else {}
    fields = {
        field: name for field, name in STEP.items() if field != "loss" or "reward" not in line
    }
    return _finite({name: line.get(field) for field, name in fields.items()} | speed)


def _of_score(line: Mapping[str, Any], of: str, rewarded: bool) -> dict[str, Any]:
    """Returns `test_loss` and the like as test/loss, or as test_output_layer/loss; answers as text. Of a run
    on rewards, whose loss is minus the reward, test/reward in the place of both loss and metric."""
    values, samples = {}, {}
    for name, value in line.items():
        part, _, what = name.partition("_")
        if rewarded and what == "loss":
            continue
        what = "reward" if rewarded and what == "metric" else what
        if part in PARTS and what == "answers":
            samples[f"samples/{part}"] = "\n\n".join(value)
        elif part in PARTS and what != "examples":
            values["_".join(filter(None, (part, of))) + f"/{what}"] = value
    return {**_finite(values), **samples}


def _taken(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that a tracker takes: mlflow has no texts."""
    return {k: v for k, v in values.items() if name != "mlflow" or not isinstance(v, str)}


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    """Returns the values that are numbers to draw."""
    return {name: x for name, x in values.items() if x is not None and math.isfinite(x)}


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields of config.json under one name each, in types that every tracker takes."""
    parts = {BLOCK: config[BLOCK], "settings": config["settings"]}
    fields = {f"{part}/{name}": x for part, found in parts.items() for name, x in found.items()}
    fields |= {name: config[name] for name in ("steps", "batch_size", "world_size")}
    return {
        name: x if isinstance(x, (bool, int, float, str)) else str(x)
        for name, x in fields.items()
        if x is not None
    }


def _peak() -> int:
    """Returns the most bytes that this process has held: of the accelerator, or resident where there is
    none."""
    if torch.accelerator.is_available():
        return int(torch.accelerator.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
