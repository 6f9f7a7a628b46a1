"""Fingerprint of a model's weights, to tell whether a name still means the weights that a run began with.

A folder's link may move, a hub's branch may move, a file may be replaced. Only samples are read, some KiB of
each tensor, so that a model of any size takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import try_to_load_from_cache
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from tezo_ds.sharding.world import agreed

_WINDOW = 1024  # bytes of a sample
_OF_TENSOR, _OF_FILE = 4, 1024  # samples
_TAIL = 1 << 16  # torch's files end in the checksums of their tensors


def agreed_fingerprint(model: str) -> str | None:
    """Returns rank 0's `fingerprint` on every rank; all ranks must call this."""
    return agreed(lambda: fingerprint(model))


def fingerprint(model: str) -> str | None:
    """Returns a digest of names, shapes, dtypes and samples of a model's weights, however they are split into
    files; None where there are no files that are known to hold any.

    Args:
        model: folder, or a hub name that was loaded already: the hub's branch is then the one in the cache.
    """
    folder = _folder_of(model)
    if folder is None:
        return None
    try:
        files = _files(folder)
        parts = sorted(part for file in files for part in _parts(file))
    except (OSError, ValueError, KeyError, TypeError):  # loading it says what is wrong with it
        return None
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest() if parts else None


def _folder_of(model: str) -> Path | None:
    if os.path.isdir(model):
        return Path(model)
    try:
        found = try_to_load_from_cache(model, CONFIG_NAME)
    except ValueError:  # neither a folder nor a hub's name
        return None
    return Path(found).parent if isinstance(found, str) else None


def _files(folder: Path) -> list[Path]:
    """Returns the files that transformers would load: the first kind that is there."""
    for whole, index in (
        (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME),
        (WEIGHTS_NAME, WEIGHTS_INDEX_NAME),
    ):
        if (folder / whole).is_file():
            return [folder / whole]
        if (folder / index).is_file():
            content = json.loads((folder / index).read_text(encoding="utf-8"))
            return [folder / name for name in sorted(set(content["weight_map"].values()))]
    return []


def _parts(file: Path) -> Iterator[str]:
    """Yields a line for each tensor of a safetensors file, or one for a file of another kind."""
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        if file.suffix != ".safetensors":
            sampled = _samples(opened, 0, size, _OF_FILE) + _at(opened, max(size - _TAIL, 0), _TAIL)
            yield f"{file.name} {size} {_digest(sampled)}"
            return
        length = int.from_bytes(opened.read(8), "little")
        if length > size:
            raise ValueError("no safetensors file")
        for name, about in json.loads(opened.read(length)).items():
            if name != "__metadata__":
                start, end = about["data_offsets"]
                sampled = _samples(opened, 8 + length + start, end - start, _OF_TENSOR)
                yield f"{name} {about['dtype']} {about['shape']} {_digest(sampled)}"


def _samples(opened: BinaryIO, start: int, size: int, count: int) -> bytes:
    """Reads windows that lie evenly over `size` bytes, the first and the last bytes among them."""
    if size <= count * _WINDOW:
        return _at(opened, start, size)
    gaps = (i * (size - _WINDOW) // (count - 1) for i in range(count))
    return b"".join(_at(opened, start + gap, _WINDOW) for gap in gaps)


def _at(opened: BinaryIO, start: int, size: int) -> bytes:
    opened.seek(start)
    return opened.read(size)


def _digest(sampled: bytes) -> str:
    return hashlib.blake2b(sampled, digest_size=8).hexdigest()
