"""A Trainer's output folder as a run's: config.json, journal, snapshots, results, as of `tezo-ds train`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from tezo_ds.engine.engine import Engine
from tezo_ds.engine.report import StepReport
from tezo_ds.errors import ConfigError
from tezo_ds.intake.weights import agreed_fingerprint
from tezo_ds.integrations.sharded import is_fsdp2
from tezo_ds.run import changed, resuming
from tezo_ds.run.about import TRAINER, describe
from tezo_ds.run.folder import VALIDATION, RunFolder
from tezo_ds.run.results import replay
from tezo_ds.settings import Settings
from tezo_ds.training.display import Display
from tezo_ds.training.records import of_journal, write_results


class Record:
    """Context manager: one run in a folder, from where the folder has it.

    Attributes:
        found: the run as its folder has it.

    Args:
        path: the run's folder.
        engine: the engine; new, or as an earlier `train` of this process has left it.
        about: steps, batch_size and deepspeed, as in config.json.
        data: `examples` and `data`, as in a journal's header.
        resume: as of `RunOptions`.
    """

    def __init__(
        self, path: Path, engine: Engine, about: dict[str, Any], data: Mapping[str, Any],
        resume: bool | None,
    ) -> None:  # fmt: skip
        self._path, self._engine, self._about = path, engine, about
        self._data, self._resume = data, resume
        self.model = name_of(engine)
        self._display = Display(engine.sharding.place, engine.sharding.world_size, 1)
        self._exit = ExitStack()
        self._folder: RunFolder | None = None
        self._start = time.perf_counter()
        self._initial: dict[str, Tensor] = {}

    def __enter__(self) -> Record:
        engine = self._engine
        fsdp = is_fsdp2(engine.sharding.module)
        settings = Settings(model=self.model, task=TRAINER, fsdp=fsdp)
        asked = {**describe(settings, engine.config), **self._about}
        begun = resuming.begun(self._path, self._resume, asked)
        try:
            self._folder, self.found = self._exit.enter_context(begun)
            about = {**self._about, changed.WEIGHTS: agreed_fingerprint(self.model)}
            if engine.step_index:
                self._refuse_elsewhere()
                self.found = resuming.Begun(self._path, self.found.config, self.found.header)
            self._initial = engine.state() if not engine.step_index else {}
            resuming.go_on(
                settings, engine, self._data, self._folder, self.found, about, self._display
            )
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _refuse_elsewhere(self) -> None:
        if self.found.done != self._engine.step_index:
            raise ConfigError(
                f"{self._path} has {self.found.done} steps, and this process's model has made "
                f"{self._engine.step_index}; start a new process, or choose another output_dir"
            )

    def step(self, report: StepReport) -> None:
        """Writes a step's lines, on disk when this returns."""
        if self._folder is not None:
            seen = self._engine.step_index * self._about["batch_size"]
            self._folder.log_step(report, seen, of_journal(self._engine))

    def score(self, metrics: Mapping[str, float], examples: int) -> None:
        """Writes an evaluation's line."""
        if self._folder is not None and "eval_loss" in metrics:
            step, accuracy = self._engine.step_index, metrics.get("eval_accuracy")
            self._folder.log_score(step, accuracy, metrics["eval_loss"], examples, part=VALIDATION)

    def snapshot(self, kept: int) -> None:
        """Saves a snapshot to go on from. All ranks must call this."""
        resuming.snapshot(self._engine, self._path, self._folder, kept)

    def go_back(self, step: int, state: Mapping[str, Tensor] | None) -> None:
        """Brings the engine to where it was after an earlier step; `state` is what it was, if this process
        knows. All ranks must call this."""
        if state is not None:
            self._engine.load_state(state, written=False)
            return
        self._engine.load_state(self._initial, written=False)
        replay(self._engine, self.found.steps[:step], self._display)

    def leave(self, tokenizer: Any, summary: Mapping[str, Any]) -> None:
        """Writes the results on rank 0."""
        if self._folder is None:
            return
        engine, seconds = self._engine, round(time.perf_counter() - self._start, 2)
        known = {
            "status": "finished", "model": self.model, "task": TRAINER, "method": engine.config.method,
            "probe": engine.probe.name, "world_size": engine.sharding.world_size,
            "train_examples": self._data["examples"], "seconds": seconds,
        }  # fmt: skip
        results = {**known, **summary}
        write_results(engine, self.model, tokenizer, self._folder, results, self._display)


def name_of(engine: Engine) -> str:
    """Returns the name or path that a model was loaded from; its class's name where it was made otherwise."""
    module = engine.sharding.module
    name = getattr(getattr(module, "config", None), "_name_or_path", "")
    return str(name or type(module).__name__)


def data_of(dataset: Any) -> dict[str, Any]:
    """Returns how many examples a data set has, and a digest of some; None of what cannot be asked."""
    try:
        count = len(dataset)
        some = [dataset[i] for i in sorted({0, count // 2, count - 1})]
    except (TypeError, KeyError, IndexError, NotImplementedError):  # streams
        return {"examples": None, "data": None}
    text = repr([_plain(each) for each in some])
    return {"examples": count, "data": hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}


def _plain(thing: Any) -> Any:
    if isinstance(thing, Mapping):
        return sorted((name, _plain(part)) for name, part in thing.items())
    return thing.tolist() if hasattr(thing, "tolist") else thing
