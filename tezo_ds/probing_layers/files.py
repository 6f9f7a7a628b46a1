"""Files of what was found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tezo_ds.errors import StorageError
from tezo_ds.files.text import to_json
from tezo_ds.probing_layers.picture import draw
from tezo_ds.probing_layers.report import Found

JSON, PICTURE = "layers.json", "layers.png"  # as in `run.folder`


def make_folder(path: Path) -> None:
    """Makes a folder, before long work that is for it; raises StorageError if it cannot."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from None


def write(found: Found, folder: Path) -> Iterator[str]:
    """Writes layers.json and layers.png; yields what stands against a picture, which matplotlib may refuse.

    Raises:
        StorageError: layers.json cannot be written.
    """
    try:
        (folder / JSON).write_text(to_json(found.as_json(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{folder / JSON}: cannot be written ({error.strerror})") from None
    try:
        names = () if found.chosen is None else found.chosen.names
        draw(found.rows, found.horizon.batch, names, folder / PICTURE)
    except Exception as error:  # of matplotlib, whose settings are the user's
        yield f"no {PICTURE}: {type(error).__name__}: {error}".split("\n")[0]
