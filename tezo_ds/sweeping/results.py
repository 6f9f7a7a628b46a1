"""What a sweep has found so far, in a file that it goes on from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tezo_ds.errors import ConfigError
from tezo_ds.files.text import read_json, to_json, writing
from tezo_ds.sharding.world import agreed

FILE, PICTURE = "sweep.json", "sweep.png"


class Results:
    """Scores of a sweep's runs, by the run's name and its steps, the same on every rank.

    Args:
        folder: the sweep's folder, made if it is not there.
        asked: what the sweep is of; a folder of another one is refused.
        writes: whether this is the rank that writes.

    Raises:
        ConfigError: the folder holds another sweep, or something else.
    """

    def __init__(self, folder: Path, asked: dict[str, Any], writes: bool) -> None:
        self._path, self._asked, self._writes = folder / FILE, asked, writes
        self._found: dict[str, dict[str, Any]] = agreed(self._read)
        self._keep()  # before the first run's folder is beside it

    def _read(self) -> dict[str, dict[str, Any]]:
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._path.exists():
            if others := sorted(os.listdir(self._path.parent)):
                raise ConfigError(
                    f"{self._path.parent} holds {others[0]} and no sweep; choose another --output"
                )
            return {}
        content = read_json(self._path)
        for name, value in self._asked.items():
            if content.get(name) != value:
                raise ConfigError(
                    f"{self._path} is of a sweep of other {name}; give the same to go on, or choose another "
                    "--output"
                )
        found: dict[str, dict[str, Any]] = content["results"]
        return found

    def of(self, name: str, steps: int) -> dict[str, Any] | None:
        """Returns a run's score after some steps; None where there is none yet."""
        return self._found.get(name, {}).get(str(steps))

    def add(self, name: str, steps: int, score: dict[str, Any]) -> None:
        """Keeps a score, on disk when this returns."""
        self._found.setdefault(name, {})[str(steps)] = score
        self._keep()

    def _keep(self) -> None:
        if self._writes:
            partial = self._path.with_name(f".{FILE}")
            with writing(self._path):
                partial.write_text(
                    to_json({**self._asked, "results": self._found}, indent=2) + "\n"
                )
                partial.replace(self._path)

    def losses(self, names: Sequence[str], steps: int) -> list[float | None]:
        """Returns the losses of runs after some steps."""
        return [(self.of(name, steps) or {}).get("loss") for name in names]
