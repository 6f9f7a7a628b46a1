"""Safetensors files that carry a digest of their content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tezo_ds.errors import StorageError
from tezo_ds.files.text import sync_folder


def save(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str]) -> None:
    """Writes a safetensors file whole or not at all, with metadata `about` and a digest.

    Raises:
        StorageError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(exist_ok=True)
        save_file(dict(tensors), partial, metadata={**about, "digest": digest(tensors, about)})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"{path}: cannot be written ({reason}); make room") from None


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and metadata that `save` wrote.

    Raises:
        StorageError: the file cannot be read, or is damaged.
    """
    tensors, about = read(path)
    if about.pop("digest", None) != digest(tensors, about):
        raise StorageError(f"{path}: does not have its checksum; take it from a copy")
    return tensors, about


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and metadata of a safetensors file, without a check of the numbers.

    Raises:
        StorageError: the file cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path}: cannot be read ({error}); take it from a copy") from None
    return tensors, about


def digest(tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> str:
    """Returns a hex digest, 128 bits, of tensors and a file's metadata."""
    hashed = hashlib.blake2b(repr(sorted((about or {}).items())).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        hashed.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        hashed.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()
