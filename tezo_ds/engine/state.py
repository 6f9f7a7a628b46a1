"""State of a run: all that is equal on every rank and that the next step depends on, as tensors by name.

For methods whose result is their coefficients this is kilobytes, and all there is. For methods that write
weights the shards are state as well, see `run.snapshots`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tezo_ds.errors import StorageError
from tezo_ds.methods import Method

_METHOD = "method."


@dataclass(frozen=True)
class Cost:
    """Memory of a forward, measured once in a run: the cost sets how many branches go at once, and so the
    shapes of products, and must not depend on the batch that a resumed process begins with.

    Attributes:
        fixed: bytes of tensors, whatever the branches.
        each: bytes of tensors for each token of each branch.
        where: the sharding, and the number of ranks, that were measured.
    """

    fixed: float
    each: float
    where: str


def _empty() -> Tensor:
    return torch.empty(0, dtype=torch.float64)


@dataclass
class StepState:
    """State that the next step depends on besides the method's own.

    Attributes:
        rho: ρ; NaN under `rho: auto` until chosen.
        step: index of the next step, from 0.
        failed: steps in a row in which directions failed.
        window: |κ| of the last steps, float64, whose quantile bounds later |κ| under `clip_kappa`.
        cost: memory of a forward; None before it is measured, and without a `memory_budget`.
        stopping: whether any rank was asked to stop, as of the last step's message.
    """

    rho: float
    step: int = 0
    failed: int = 0
    window: Tensor = field(default_factory=_empty)
    cost: Cost | None = None
    stopping: bool = False


def pack(state: StepState, method: Method) -> dict[str, Tensor]:
    """Returns CPU copies of the tensors that a snapshot keeps and a digest compares."""
    tensors = {_METHOD + name: packed.data for name, packed in method.state.items()}
    if method.finished:
        tensors["finished"] = torch.stack(method.finished)  # (periods, D)
    tensors["clip"] = state.window
    tensors["counts"] = torch.tensor([state.step, state.failed, method.period])
    tensors["rho"] = torch.tensor(state.rho, dtype=torch.float64)
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def refuse_unfit(tensors: Mapping[str, Tensor], method: Method, name: str) -> None:
    """Raises StorageError unless `tensors` are `pack`'s of such a method, named `name`."""
    expected = {_METHOD + key: packed.data.shape for key, packed in method.state.items()}
    found = {key: part.shape for key, part in tensors.items() if key.startswith(_METHOD)}
    if expected != found or not {"clip", "counts", "rho"} <= tensors.keys():
        raise StorageError(
            f"a snapshot does not fit method {name} with {method.space.numel} coefficients; use the run's "
            "own config and model"
        )


def unpack(tensors: Mapping[str, Tensor], state: StepState) -> tuple[int, list[Tensor]]:
    """Sets a state from tensors of `pack`; returns the method's period and coefficients of earlier ones."""
    state.step, state.failed, period = tensors["counts"].tolist()
    state.rho, state.window = tensors["rho"].item(), tensors["clip"].clone()
    return period, list(tensors.get("finished", torch.empty(0, 0)))


def unpack_method(tensors: Mapping[str, Tensor], method: Method) -> None:
    """Sets a method's own state from tensors of `pack`."""
    for name, packed in method.state.items():
        packed.data.copy_(tensors[_METHOD + name])
