"""The journal of a run: one line a step, on disk before the step counts, from which all else follows.

    {"journal":2,…,"sum":"0f3a…"}
    {"step":0,"kappa":[…],"rho":…,"lr":…,"loss":…,"seen":…,"sum":"9c41…"}

Slopes of more than `READABLE` directions are written as base64 of their float64 bytes, little-endian: exact
and shorter than digits. Whoever reads gets numbers either way.

`sum` is a hash of its line's other text and of the line's before it, so a bit that flipped, a line that
is missing and one too many all show. What a crash can leave is a last line that is not whole: it counts
as not written. Damage above that is nobody's crash and is refused.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tezo_ds.errors import StorageError
from tezo_ds.files.text import _finite, sync_folder

VERSION = 2  # 1: all slopes in digits
READABLE = 64  # slopes, at most, that are written in digits
PACKED = ("kappa", "solved", "rewards")
_LINE = re.compile(rb'(\{.*),"sum":"([0-9a-f]{16})"\}')


@dataclass(frozen=True)
class Contents:
    """Content of a journal.

    Attributes:
        header: the run's header; None in a file without one whole line.
        steps: lines of the steps in order, from step 0 on, with `sum`.
        size: bytes of all whole lines; what the file has beyond them is torn.
        torn: why the last line does not count; None if it does.
    """

    header: dict[str, Any] | None
    steps: list[dict[str, Any]]
    size: int
    torn: str | None

    @property
    def sum(self) -> str:
        """Checksum of the last line; "" where there is none."""
        last = self.steps[-1] if self.steps else self.header
        return str(last["sum"]) if last else ""


def read_journal(path: Path) -> Contents:
    """Reads all whole lines of a journal.

    Raises:
        StorageError: the file cannot be read, is of a later version, or a line before the last is damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be read ({error.strerror}); has the run begun?"
        ) from None
    lines: list[dict[str, Any]] = []
    size, before, torn = 0, "", None
    texts = io.BytesIO(content).readlines()  # at \n alone
    for number, text in enumerate(texts, start=1):
        line, reason = _parse(text, before, number)
        if line is None:
            if number < len(texts):
                raise StorageError(
                    f"{path}: line {number} is damaged ({reason}); take the file from a copy"
                )
            torn = f"line {number} {reason}"
            break
        lines.append(line)
        size, before = size + len(text), line["sum"]
    if lines and lines[0]["journal"] > VERSION:
        raise StorageError(
            f"{path}: is of version {lines[0]['journal']}, this tezo_ds reads up to {VERSION}; update it"
        )
    return Contents(lines[0] if lines else None, lines[1:], size, torn)


def _parse(text: bytes, before: str, number: int) -> tuple[dict[str, Any] | None, str]:
    """Parses a line; where it is damaged, returns None and what is wrong with it."""
    if not text.endswith(b"\n"):
        return None, "was not written to its end"
    found = _LINE.fullmatch(text[:-1])
    if found is None or _sum(before, found[1]) != found[2].decode():
        return None, "does not have its checksum"
    try:
        line = json.loads(text)
    except ValueError as error:  # bytes that are not UTF-8 are a ValueError, too
        return None, f"is no JSON: {error}"
    place = number - 2
    if not isinstance(line, dict) or (
        line.get("step") != place if place >= 0 else "journal" not in line
    ):
        return None, f"is not of step {place}" if place >= 0 else "is no header"
    try:
        return {key: unpacked(part) if key in PACKED else part for key, part in line.items()}, ""
    except ValueError as error:
        return None, f"has slopes that cannot be read: {error}"


def packed(line: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a step as a line keeps them, more than `READABLE` slopes as text."""

    def text(slopes: Sequence[float]) -> str:
        return base64.b64encode(struct.pack(f"<{len(slopes)}d", *slopes)).decode()

    return {
        key: text(part) if key in PACKED and len(part) > READABLE else part
        for key, part in line.items()
    }


def unpacked(kept: Any) -> Any:
    """Returns slopes that a line keeps, None for those that failed. Raises ValueError: no float64 numbers."""
    if not isinstance(kept, str):
        return kept
    content = base64.b64decode(kept, validate=True)
    if len(content) % 8:
        raise ValueError(f"{len(content)} bytes are no float64 numbers")
    numbers = struct.unpack(f"<{len(content) // 8}d", content)
    return [number if math.isfinite(number) else None for number in numbers]


def _sum(before: str, text: bytes) -> str:
    return hashlib.blake2b(before.encode() + text, digest_size=8).hexdigest()


class Journal:
    """A journal to append to, by one process at a time.

    Args:
        path: the file's path; made, or continued after `contents`, whose torn rest is cut off.
        header: header of a new journal.
        contents: content of a journal that is there.

    Raises:
        StorageError: the file cannot be written.
    """

    def __init__(
        self, path: Path, header: Mapping[str, Any], contents: Contents | None = None
    ) -> None:
        self._path = path
        begun = contents is not None and contents.header is not None
        # A journal that an earlier version began stays one that it can read.
        version = (
            VERSION if contents is None or contents.header is None else contents.header["journal"]
        )
        self._packs = version > 1
        self.sum = contents.sum if contents is not None and begun else ""
        self._size = contents.size if contents is not None and begun else 0
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.ftruncate(self._file, self._size)
        except OSError as error:
            raise StorageError(f"{path}: cannot be written ({error.strerror})") from None
        if not begun:
            self._append({"journal": VERSION, **header}, "its first line")
            sync_folder(path.parent)

    def append(self, step: Mapping[str, Any]) -> None:
        """Writes a step's line, on disk when this returns.

        Args:
            step: fields of the line, at least "step", the next step's index.

        Raises:
            StorageError: the line cannot be written; the file is then as before.
        """
        self._append(packed(step) if self._packs else step, f"step {step['step']}")

    def _append(self, line: Mapping[str, Any], what: str) -> None:
        text = json.dumps(_finite(line), separators=(",", ":"), allow_nan=False)[:-1].encode()
        made = _sum(self.sum, text)
        whole = text + f',"sum":"{made}"}}\n'.encode()
        try:
            if os.write(self._file, whole) < len(whole):
                raise OSError(28, "No space left on device")
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise StorageError(
                f"{self._path}: {what} cannot be written ({error.strerror}); make room, then start the "
                "same command to go on"
            ) from None
        self.sum, self._size = made, self._size + len(whole)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)
