"""PyTorch FSDP2 (`fully_shard`) without a backward, alone, hybrid or over tensor parallelism."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from tezo_ds.errors import ShardingError
from tezo_ds.quantised.packed import make_portable
from tezo_ds.sharding.base import Sharding, named_state
from tezo_ds.sharding.view import Block, ShardView, as_matrix

log = logging.getLogger(__name__)


class Fsdp2(Sharding):
    """A module to which `fully_shard` was applied, on a mesh of one dim (shard) or two (replicate,
    shard), over weights that tensor parallelism may have split before.

    Raises:
        ShardingError: `fully_shard` was not applied to the root, so some weights would stay whole.
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, FSDPModule):
            raise ShardingError(
                "fully_shard was applied to submodules alone; apply it to the whole model as well, "
                "so that the parameters outside of them are sharded too"
            )
        self._root: FSDPModule = module
        self._mesh = _data_mesh(module)
        super().__init__(module, _group(self._mesh))
        self.device = torch.device(self._mesh.device_type)
        if self.device.type != "cpu":
            self.device = torch.device(self.device.type, torch.accelerator.current_device_index())
        make_portable(self.packed.values(), self.device)
        # Otherwise the root stays gathered after a forward, and writes to its shards are lost until
        # a backward that never comes.
        _warn_of_smaller_groups(module)
        module.set_reshard_after_forward(True)
        module._get_fsdp_state()._lazy_init()  # what the first forward would do; reset_iter_state needs it
        self._compute_dtypes = _compute_dtypes(module)

    def forward(self, **inputs: Any) -> Any:
        try:
            return self.module(**inputs)
        finally:
            # Each forward notes its groups for a backward, a list that only grows; and one that fails
            # leaves groups gathered, which the next would use instead of newer shards.
            self._root.reset_iter_state()

    def compute_dtype(self, parameter: nn.Parameter) -> torch.dtype:
        """Returns the mixed precision policy's dtype, where there is one, else the parameter's."""
        return self._compute_dtypes.get(id(parameter), parameter.dtype)

    def block(self, parameter: nn.Parameter) -> Block:
        """Returns this rank's rows or columns under tensor parallelism, else the whole matrix."""
        found = _tensor_parallel(parameter, self._mesh)
        if found is None:
            return super().block(parameter)
        mesh, placement = found
        local, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, [placement])
        if len(local) == 1:
            return Block(range(1), range(offset[0], offset[0] + local[0]))
        if len(local) != 2:
            raise ShardingError(f"a weight of shape {tuple(parameter.shape)} is split over ranks")
        rows, columns = (range(o, o + k) for o, k in zip(offset, local, strict=True))
        return Block(rows, columns)

    def local(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Returns this rank's parts; raises ShardingError unless the layer is colwise or rowwise."""
        if not isinstance(x, DTensor) or not isinstance(y, DTensor):
            raise ShardingError(
                "a layer's weight is split by tensor parallelism but its input is not a DTensor; "
                "use parallelize_module's ColwiseParallel or RowwiseParallel"
            )
        last = x.dim() - 1
        by_columns = any(placement.is_shard(last) for placement in x.placements)
        if by_columns != any(placement.is_partial() for placement in y.placements):
            raise ShardingError(
                f"input {x.placements} gives {y.placements}: neither colwise nor rowwise; set probe "
                "to inplace"
            )
        return x.to_local(), y.to_local()

    def each_shard(self, names: Collection[str], write: Callable[[ShardView], None]) -> None:
        """Calls `write` on whole rows of each parameter, none on the last ranks of a small one; under
        rowwise tensor parallelism on some columns of the rows."""
        self._root.reset_iter_state()  # a write to the shard of a gathered parameter would be lost
        for name, parameter in self.module.named_parameters():
            if name in names:
                write(_view(name, parameter))

    def full_tensors(self) -> Iterator[tuple[list[str], Tensor | None]]:
        """Gathers one parameter at a time."""
        self._root.reset_iter_state()
        first = dist.get_rank() == 0
        for names, tensor in named_state(self.module):
            whole = tensor.detach()
            if isinstance(whole, DTensor):
                whole = whole.full_tensor()
            yield names, whole.cpu().clone() if first else None


def sharding_of(model: nn.Module, config: Mapping[str, Any]) -> Fsdp2:
    """Returns the sharding of a model to which `fully_shard` was applied.

    Raises:
        ShardingError: weights are DTensors, and it was not.
    """
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ShardingError(
            "the model's weights are DTensors but fully_shard was not applied; apply it on the data "
            "dim of the mesh, even if that has one rank"
        )
    return Fsdp2(model)


def _view(name: str, parameter: nn.Parameter) -> ShardView:
    shape = as_matrix(parameter.shape)
    tensor = parameter.data
    if not isinstance(tensor, DTensor):
        return ShardView(name, shape, 0, tensor.view(-1))
    # Right for strided shards too (tensor parallelism by rows under FSDP), where rank order is not
    # row order.
    local_shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    local = tensor.to_local()
    if not local.is_contiguous() or local_shape[1:-1] != tensor.shape[1:-1]:
        raise ShardingError(
            f"{name} of shape {tuple(tensor.shape)} is placed as {tensor.placements}; shard it by its "
            "first dim (and, by tensor parallelism, by its last)"
        )
    if tensor.dim() == 1:
        return ShardView(name, shape, offset[0], local)
    first_row = offset[0] * math.prod(tensor.shape[1:-1])
    columns = range(offset[-1], offset[-1] + local_shape[-1])
    whole_rows = len(columns) == shape[1] or not local.numel()
    width = shape[1] if whole_rows else len(columns)
    start = first_row * width
    return ShardView(name, shape, start, local.view(-1), None if whole_rows else columns)


def _data_mesh(module: nn.Module) -> DeviceMesh:
    """Returns the mesh over whose ranks the data differ: (shard) or (replicate, shard)."""
    meshes = [group.mesh_info.mesh for group in _param_groups(module)]
    if any(mesh != meshes[0] for mesh in meshes):
        raise ShardingError(
            "modules are sharded over different meshes; pass fully_shard the same one"
        )
    mesh: DeviceMesh = meshes[0]
    return mesh


def _group(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """Returns the process group of a mesh; None for the whole world."""
    if mesh.size() == dist.get_world_size():
        return None
    return (mesh if mesh.ndim == 1 else mesh._flatten()).get_group()


def _param_groups(module: nn.Module) -> Iterator[Any]:
    """Yields torch's own record of each group of parameters that is gathered together."""
    for m in module.modules():
        if isinstance(m, FSDPModule):
            yield from m._get_fsdp_state()._fsdp_param_groups


def _compute_dtypes(module: nn.Module) -> dict[int, torch.dtype]:
    """Returns dtypes, by id, of parameters that a mixed precision policy casts when gathered."""
    return {
        id(fsdp_param.sharded_param): fsdp_param.mp_policy.param_dtype
        for group in _param_groups(module)
        for fsdp_param in group.fsdp_params
        if fsdp_param.mp_policy.param_dtype is not None
    }


def _warn_of_smaller_groups(module: nn.Module) -> None:
    if any(
        group.post_forward_mesh_info not in (None, group.mesh_info)
        for group in _param_groups(module)
    ):
        log.warning("reshard_after_forward as a number of ranks is not used; it is True here")


def _tensor_parallel(
    parameter: nn.Parameter, data_mesh: DeviceMesh
) -> tuple[DeviceMesh, Placement] | None:
    """Returns the mesh and placement by which tensor parallelism splits a parameter, else None."""
    tensor = parameter.data
    if not isinstance(tensor, DTensor) or tensor.device_mesh.ndim == data_mesh.ndim:
        return None
    placement = tensor.placements[-1]
    if isinstance(placement, Replicate):
        return None
    if not isinstance(placement, Shard) or tensor.device_mesh.ndim != data_mesh.ndim + 1:
        raise ShardingError(
            f"a weight of shape {tuple(tensor.shape)} is placed as {tensor.placements}; only "
            "colwise and rowwise tensor parallelism on one further mesh dim are known"
        )
    names = tensor.device_mesh.mesh_dim_names
    assert names is not None, "FSDP over tensor parallelism names its mesh dims"
    return tensor.device_mesh[names[-1]], placement
