"""Files in a new run's folder that are not the run's."""

from __future__ import annotations

from pathlib import Path

from tezo_ds.config import BLOCK
from tezo_ds.errors import ConfigError
from tezo_ds.files.text import read_json
from tezo_ds.quiet import LOG
from tezo_ds.run.folder import (
    ADAPTER,
    COEFFICIENTS,
    CONFIG,
    CURVE,
    JOURNAL,
    LAYERS,
    LAYERS_PICTURE,
    METRICS,
    MODEL,
    OUTPUT_LAYER,
    REPORT,
    SAMPLES,
    SNAPSHOTS,
    SUMMARY,
    TENSORBOARD,
    TRACKERS,
    TRUNK_CACHE,
)

_OURS = {
    CONFIG, METRICS, SUMMARY, JOURNAL, COEFFICIENTS, ADAPTER, CURVE, MODEL, SNAPSHOTS, TRUNK_CACHE,
    OUTPUT_LAYER, LAYERS, LAYERS_PICTURE, TRACKERS, TENSORBOARD, REPORT, LOG, SAMPLES,
}  # fmt: skip
_LOGS = "logs"  # of launch/, which makes it before a run begins


def refuse_foreign_files(path: Path) -> list[str]:
    """Returns notices on files that stay beside a new run's; to be called where no run has begun.

    Raises:
        ConfigError: a run would replace or remove one of them, such as a model's config.json.
    """
    names = {file.name for file in path.iterdir() if not file.name.startswith(".")} - {_LOGS}
    if taken := names & _OURS:
        if _begun_here(path):  # and killed before its journal had a line
            return []
        raise ConfigError(
            f"{path / min(taken)} is no run's, and a run would write its own there; choose another --output"
        )
    if not names:
        return []
    return [f"{path} holds {len(names)} other files or folders, e.g. {min(names)}; they stay"]


def _begun_here(path: Path) -> bool:
    try:
        content = read_json(path / CONFIG)
    except ConfigError:
        return False
    return BLOCK in content and "settings" in content
