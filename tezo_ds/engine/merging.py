"""Whole weights with the change that a run keeps aside, gathered one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tezo_ds.directions.branches import Branches
from tezo_ds.directions.space import CoefficientSpace
from tezo_ds.sharding import Sharding, ShardView


@torch.no_grad()
def merged_tensors(
    sharding: Sharding, space: CoefficientSpace, kept: Branches, dtype: torch.dtype | None,
    add: Callable[[Sequence[str], Tensor], None],
) -> Iterator[tuple[list[str], Tensor | None]]:  # fmt: skip
    """Yields full merged weights, as `Engine.merged_tensors` does.

    Args:
        sharding: the model.
        space: what trains.
        kept: one branch: the change that is not in the weights.
        dtype: dtype of the copies; None: the weights' own.
        add: adds what else belongs to the tensor of these names, in place.
    """
    shapes = {matrix.name: matrix.shape for matrix in space.matrices}
    shapes |= {vector.name: (1, vector.numel) for vector in space.vectors}
    for names, tensor in sharding.full_tensors():
        if tensor is not None:
            target = dtype if dtype and tensor.is_floating_point() else tensor.dtype
            tensor = tensor.to(torch.promote_types(tensor.dtype, target))
            for name in shapes.keys() & set(names):
                kept.move_(ShardView(name, shapes[name], 0, tensor.view(-1)), None, 0)
            add(names, tensor)
            tensor = tensor.to(target)
        yield names, tensor
