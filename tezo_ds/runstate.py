"""All that is equal on every rank and that the next step depends on, as tensors by name.

For the methods whose result is their coefficients it is kilobytes, and all there is. For those that write
weights the shards belong to it, see `snapshots`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tezo_ds.engine import Engine
from tezo_ds.errors import StorageError
from tezo_ds.journal import sync_folder

_METHOD = "method."


def take(engine: Engine) -> dict[str, Tensor]:
    """Copies of it, on the CPU."""
    method, measuring = engine.method, engine.measuring
    tensors = {_METHOD + name: packed.data for name, packed in method.state.items()}
    if method.finished:
        tensors["finished"] = torch.stack(method.finished)  # (periods, D)
    tensors["clip"] = engine.clip.window
    tensors["counts"] = torch.tensor([engine.step_index, measuring.failed, method.period])
    tensors["rho"] = torch.tensor(measuring.rho, dtype=torch.float64)
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def give(engine: Engine, tensors: Mapping[str, Tensor], written: bool) -> None:
    """Takes an engine that was just made to where `take` was called on one. All ranks must call it.

    Args:
        engine: of the same config, model and data.
        tensors: of `take`.
        written: the shards already hold what the run wrote into them; otherwise only what periods of
            coefficients wrote can be made up for.

    Raises:
        StorageError: they are not of such an engine.
    """
    own = take(engine)
    expected = {name: own[name].shape for name in own if name.startswith(_METHOD)}
    found = {name: part.shape for name, part in tensors.items() if name.startswith(_METHOD)}
    if expected != found or not {"clip", "counts", "rho"} <= tensors.keys():
        raise StorageError(
            f"a snapshot does not fit method {engine.config.method} with {engine.space.numel} coefficients; "
            "use the run's own config and model"
        )
    engine.step_index, engine.measuring.failed, period = tensors["counts"].tolist()
    engine.measuring.rho, engine.clip.window = tensors["rho"].item(), tensors["clip"].clone()
    engine.go_to_period(period, list(tensors.get("finished", torch.empty(0, 0))), written)
    for name, packed in engine.method.state.items():
        packed.data.copy_(tensors[_METHOD + name])


def save(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str]) -> None:
    """Writes a safetensors file whole or not at all, with what it says of itself and a digest.

    Raises:
        StorageError: it cannot be written.
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
    """What `save` wrote: tensors, and what the file says of itself.

    Raises:
        StorageError: it cannot be read, or is damaged.
    """
    tensors, about = read(path)
    if about.pop("digest", None) != digest(tensors, about):
        raise StorageError(f"{path}: does not have its checksum; take it from a copy")
    return tensors, about


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, which checks nothing of the numbers by itself.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path}: cannot be read ({error}); take it from a copy") from None
    return tensors, about


def digest(tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> str:
    """128 bits, as hex, of tensors and of what a file says of itself."""
    hashed = hashlib.blake2b(repr(sorted((about or {}).items())).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        hashed.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        hashed.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()
