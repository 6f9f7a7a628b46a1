"""Completions of the present model, every so many steps: samples.jsonl, and a few lines for the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tezo_ds.errors import StorageError
from tezo_ds.files.text import to_json
from tezo_ds.rollouts.objective import RewardObjective
from tezo_ds.run.folder import SAMPLES, RunFolder
from tezo_ds.tasks.encoded import Encoded
from tezo_ds.tasks.prompted import Prompted, collate_prompts
from tezo_ds.training.display import Display
from tezo_ds.training.session import Session

COUNT, SHOWN = 4, 2  # prompts that are completed, and those of them that the terminal shows


class Samples:
    """Completions of a few prompts, the same ones throughout a run: test examples, or where there are none
    training ones.

    Args:
        session: a session with its engine.
        examples: the training examples.
        folder: the run's folder, on rank 0.
        display: shows some of them.
        every: steps between them; 0: none.
    """

    def __init__(
        self, session: Session, examples: Sequence[Encoded], folder: RunFolder | None, display: Display,
        every: int,
    ) -> None:  # fmt: skip
        self._engine, self._pad, self._display = session.engine, session.pad_id, display
        self._path = None if folder is None else folder.path / SAMPLES
        objective = session.engine.objective
        self._objective = objective if isinstance(objective, RewardObjective) else None
        self._every = every if self._objective is not None else 0
        self._prompts: list[Prompted] = []
        if self._every:
            tests = session.task.test[:COUNT]
            length = session.settings.max_length
            found = session.posing.encode(tests, length) if tests else examples[:COUNT]
            self._prompts = [each for each in found if isinstance(each, Prompted)]

    def before(self, done: int) -> None:
        """Removes what a killed run has half written, and makes the samples after `done` steps that are
        missing. All ranks must call it."""
        if not self._every:
            return
        have = self._kept(done)
        if done % self._every == 0 and not self._engine.sharding.maxima([have])[0]:
            self._make(done)

    def after(self, done: int) -> None:
        """Makes the samples that are due after `done` steps. All ranks must call it."""
        if self._every and done % self._every == 0:
            self._make(done)

    def _make(self, done: int) -> None:
        assert self._objective is not None
        mine = self._prompts if self._engine.sharding.rank == 0 else []
        with self._engine.applied():
            found = self._objective.samples(collate_prompts(mine, self._pad, self._prompts[0]))
        if self._path is None:
            return
        lines = [
            {"step": done, "prompt": s.prompt, "completion": s.completion, "reward": s.reward}
            for s in found
        ]
        self._write(self._path, "".join(f"{to_json(line)}\n" for line in lines), "a")
        for sample in found[:SHOWN]:
            self._display.sample(done, sample)

    def _kept(self, done: int) -> bool:
        """Keeps the whole lines of steps that are done; returns whether those of the last one are there."""
        if self._path is None or not self._path.exists():
            return False
        lines = [line for line in map(_parsed, self._path.read_text().splitlines()) if line]
        lines = [line for line in lines if line["step"] <= done]
        last = [line for line in lines if line["step"] == done]
        if len(last) < len(self._prompts):
            lines, last = lines[: len(lines) - len(last)], []
        self._write(self._path, "".join(f"{to_json(line)}\n" for line in lines), "w")
        return bool(last)

    @staticmethod
    def _write(path: Path, text: str, mode: str) -> None:
        try:
            with path.open(mode) as file:
                file.write(text)
        except OSError as error:
            raise StorageError(
                f"{path}: cannot be written ({error.strerror}); make room, then start the same command to go "
                "on"
            ) from None


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None
