"""Coefficients as a file: the result of a run that writes no weights."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tezo_ds.files.tensors import digest
from tezo_ds.files.text import writing


def save_coefficients(coefficients: dict[str, Tensor], path: Path, run: str = "") -> None:
    """Writes what `Engine.coefficients` gives as safetensors, in float64, with a digest and through a
    temporary name; `run` is the identity of the run's config.

    Raises:
        StorageError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing(path):
            tensors = {k: v.to(torch.float64) for k, v in coefficients.items()}
            about = {"digest": digest(tensors), **({"run": run} if run else {})}
            save_file(tensors, partial, metadata=about)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
