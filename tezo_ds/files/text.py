"""Text files and JSON: read with errors that name the file, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tezo_ds.errors import ConfigError, StorageError


def from_json(text: str) -> Any:
    """Returns the content of a user's JSON.

    Raises:
        ValueError: not JSON, a field that is there twice, too deep, or too many digits to be read.
    """
    try:
        return json.loads(text, object_pairs_hook=_unrepeated)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return fields


def read_json(path: str | Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        ConfigError: no such file, not JSON, or not an object.
    """
    try:
        content = from_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except ValueError as error:  # also for bytes that are not UTF-8
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold a JSON object, holds a {type(content).__name__}")
    return content


def to_json(content: Any, indent: int | None = None) -> str:
    """Returns JSON that any reader takes: numbers that are not finite, which JSON lacks, are null."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def sync_folder(folder: Path) -> None:
    """Syncs a folder, so that the names of its files are on disk, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _finite(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _finite(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_finite(value) for value in node]
    if isinstance(node, float) and (node != node or abs(node) == float("inf")):
        return None
    return node


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Context manager: an OSError or SafetensorError inside becomes a StorageError of one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise StorageError(f"{folder}: cannot be written ({reason}); make room") from None
