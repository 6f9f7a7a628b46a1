"""A checkpoint of random weights, of any size: written file by file, so that it is never held whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from tezo_ds.errors import StorageError
from tezo_ds.patterns import numbered_module

DEVIATION = 0.02
PERIOD = (1 << 25) + 1  # numbers drawn, used again and again: no multiple of any usual width
SPARE = 2 << 30  # bytes of the disk that are left alone


def write_random(model: PreTrainedModel, folder: Path) -> None:
    """Writes config, safetensors files of one block each, and their index.

    Matrices are N(0, 0.02²), but all from the same `PERIOD` numbers, each from another place on. Vectors
    are one in norms, zero elsewhere. What is written leaves the page cache.

    Args:
        model: a model without values, on the meta device.
        folder: a new folder.

    Raises:
        StorageError: the disk has no room; nothing is written.
    """
    sizes = {name: p.nbytes for name, p in model.named_parameters()}
    total = sum(sizes.values())
    folder.mkdir(parents=True)
    if (free := shutil.disk_usage(folder).free) < total + SPARE:
        folder.rmdir()
        raise StorageError(
            f"{folder}: has {free / 1e9:.1f} GB free, and the weights take {total / 1e9:.1f} and "
            f"{SPARE / 1e9:.1f} are to be left; name another --folder or a smaller --model"
        )
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)
    weight_map = {}
    for number, tensors in enumerate(_blocks(model), start=1):
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        leave_cache(folder / file)
        weight_map.update(dict.fromkeys(tensors, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index))


def leave_cache(file: Path) -> None:
    """Drops a file from the page cache, so that the next reader reads from the disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _blocks(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yields the values of each numbered module, and of each parameter outside of any."""
    drawn = torch.randn(PERIOD, generator=torch.manual_seed(0))
    dtype = next(model.parameters()).dtype
    numbers = drawn.mul_(DEVIATION).to(dtype)
    parameters = enumerate(model.named_parameters())
    for _, group in groupby(parameters, key=lambda item: numbered_module(item[1][0]) or item[1][0]):
        yield {name: _values(name, p, number, numbers) for number, (name, p) in group}


def _values(name: str, parameter: Tensor, number: int, numbers: Tensor) -> Tensor:
    values = torch.empty(parameter.shape, dtype=parameter.dtype)
    if parameter.dim() < 2:
        return values.fill_(float("norm" in name and name.endswith("weight")))
    flat, start, filled = values.view(-1), number * 7919 % len(numbers), 0
    while filled < len(flat):
        part = numbers[start : start + len(flat) - filled]
        flat[filled : filled + len(part)] = part
        filled, start = filled + len(part), 0
    return values
