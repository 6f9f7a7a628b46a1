"""All that is equal on every rank and that the next step depends on, as tensors by name.

For the methods whose result is their coefficients it is kilobytes, and all there is. For those that write
weights the shards belong to it, see `snapshots`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tezo_ds.engine.engine import Engine
from tezo_ds.errors import StorageError

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
