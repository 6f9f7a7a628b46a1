"""DeepSpeed ZeRO-3 without an optimizer, forward only."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import default_pg_timeout
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload, ZeROOrderedDict
from deepspeed.runtime.zero.partition_parameters import Init, ZeroParamStatus
from torch import Tensor, nn

from tezo_ds.errors import ConfigError, ShardingError
from tezo_ds.sharding.base import Sharding, named_state
from tezo_ds.sharding.rendezvous import of_restart
from tezo_ds.sharding.view import ShardView, as_matrix
from tezo_ds.sharding.zero3_config import check_stage, check_version, prepare


def _set_given_dtype(self: Init, ds_config: Any, dtype: torch.dtype | None) -> None:
    """Replaces `Init._set_dtype`, which on a device without float16 (most CPUs) takes bfloat16 whatever
    dtype is given, and so would change the dtype of weights or of their buffers for NVMe."""
    if dtype is None:
        _set_dtype(self, ds_config, dtype)
    else:
        self.dtype = dtype


_set_dtype, Init._set_dtype = Init._set_dtype, _set_given_dtype


class Zero3(Sharding):
    """A DeepSpeedEngine of stage 3 that has no optimizer.

    Raises:
        ConfigError: another stage, or DeepSpeed older than `OLDEST`.
        ShardingError: the engine has an optimizer, whose master weights would undo our writes.
    """

    uncompiled = "ZeRO-3 gathers weights by hooks of every layer, which do not compile"

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        check_version()
        check_stage(engine.zero_optimization_stage())
        if not isinstance(engine.optimizer, DeepSpeedZeRoOffload):
            raise ShardingError(
                "the DeepSpeed engine has an optimizer; call deepspeed.initialize without one"
            )
        super().__init__(engine.module, engine.data_parallel_group)
        self._offload = engine.optimizer
        self._forward_only()
        self.device = torch.device(engine.device)
        zero = engine._config.zero_config
        if zero.zero_quantized_weights:
            self.quantised = "zero_quantized_weights"
        elif zero.zero_quantized_nontrainable_weights:
            self.quantised = "zero_quantized_nontrainable_weights"

    def _forward_only(self) -> None:
        """Takes away what DeepSpeed does at each layer for a backward pass, which an engine without an
        optimizer has not: a third or more of what small layers cost the host."""
        for hook in self._offload.backward_hooks:
            hook.remove()
        self._offload.backward_hooks.clear()

    def forward(self, **inputs: Any) -> Any:
        """Runs one forward of the model. A failed one leaves layers gathered, which the next would mix
        with newer shards, and DeepSpeed ready to gather any weight that is merely read, on this rank
        alone: both are undone before the error goes on."""
        try:
            with buffers_explained():
                return self.module(**inputs)
        except BaseException:
            self._partition()
            for module in self.module.modules():
                if isinstance(module._parameters, ZeROOrderedDict):
                    module._parameters._in_forward = False
            raise

    def _partition(self) -> None:
        """Partitions every parameter, also persistent ones and ones left gathered by a failed forward."""
        self._offload.partition_all_parameters()
        for parameter in map(_internals, self.module.parameters()):
            # A forward that failed leaves shards that were read ahead from NVMe: they hold on to
            # DeepSpeed's few buffers, and would go into the next gather however old they are.
            if _on_nvme(parameter):
                parameter.nvme_swapper.synchronize_reads()
                if parameter.ds_tensor.status == PartitionedParamStatus.AVAILABLE:
                    parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Returns the shape before partitioning (the parameter itself is empty)."""
        shape: torch.Size = vars(parameter)["ds_shape"]
        return shape

    def each_shard(self, names: Collection[str], write: Callable[[ShardView], None]) -> None:
        """Calls `write` on the partition of each parameter, and on its secondary copy under hpZ.

        A view is good during the call alone: a shard on NVMe has memory for no longer.

        Persistent parameters stay gathered between forwards and would hide a write for ever, so
        everything is partitioned first.
        """
        self._partition()
        for name, parameter in self.module.named_parameters():
            if name not in names:
                continue
            status = vars(parameter)["ds_status"]
            if status != ZeroParamStatus.NOT_AVAILABLE:
                raise ShardingError(f"{name}: still {status.name} while being written")
            with _in_memory(_internals(parameter)):
                for view in _views(name, parameter):
                    write(view)
        # Gathers may run on a stream of their own, which does not wait for writes on this one.
        get_accelerator().synchronize()

    def full_tensors(self) -> Iterator[tuple[list[str], Tensor | None]]:
        """Gathers one parameter at a time."""
        for names, tensor in named_state(self.module):
            with _whole(tensor) as whole:
                copy = whole.detach().cpu().clone() if self.rank == 0 else None
            yield names, copy


def _internals(parameter: nn.Parameter) -> Any:
    """Returns the parameter untyped, as no type checker knows the attributes that DeepSpeed adds."""
    return parameter


@contextmanager
def _whole(tensor: Any) -> Iterator[Tensor]:
    """Context manager: the whole of a parameter or buffer inside.

    Under hpZ gathers go as in forwards, from the copies within a group of ranks, which may differ from
    the primary shards in the last bits once a method has written both: products depend on a range.
    """
    if getattr(tensor, "ds_secondary_tensor", None) is None:
        with deepspeed.zero.GatheredParameters([tensor] if hasattr(tensor, "ds_id") else []):
            yield tensor
        return
    group, shard = tensor.ds_zero_param_process_group, tensor.ds_secondary_tensor.detach()
    size = torch.distributed.get_world_size(group)
    whole = shard.new_empty(size * shard.numel())
    torch.distributed.all_gather(list(whole.chunk(size)), shard, group=group)
    yield whole[: tensor.ds_numel].view(tensor.ds_shape)


def _on_nvme(parameter: Any) -> bool:
    """Returns whether the shard lives in a file. DeepSpeed keeps any under a megabyte in memory."""
    return bool(parameter.ds_tensor.final_location == OffloadDeviceEnum.nvme)


@contextmanager
def _in_memory(parameter: Any) -> Iterator[None]:
    """Context manager: `ds_tensor` is the shard inside. A shard on NVMe takes a buffer of DeepSpeed's for
    that time, and goes back to its file if it was written in place."""
    if not _on_nvme(parameter):
        yield
        return
    swapper = parameter.nvme_swapper
    swapper.swap_in([parameter], async_op=False)
    version = parameter.ds_tensor._version
    try:
        yield
    finally:
        if parameter.ds_tensor._version == version:
            swapper.remove_partition_and_release_buffers([parameter])
        else:
            get_accelerator().synchronize()  # under GDS the buffer is the accelerator's
            swapper.swap_out_and_release([parameter])


def _views(name: str, parameter: Any) -> Iterator[ShardView]:
    """Yields the shards that this rank holds, without their padding, which is uninitialised memory."""
    shards = [(parameter.ds_tensor, parameter.ds_zero_partition_rank)]
    secondary = parameter.ds_secondary_tensor
    if secondary is not None:  # hpZ: forwards gather from it, never from ds_tensor
        group = parameter.ds_zero_param_process_group
        shards.append((secondary, torch.distributed.get_rank(group)))
    for tensor, rank in shards:
        if hasattr(tensor, "ds_quant_scale"):
            raise ShardingError(f"{name}: its shard is quantised; set quantisation off to write it")
        start = min(rank * tensor.numel(), parameter.ds_numel)
        valid = min(parameter.ds_numel - start, tensor.numel())
        yield ShardView(name, as_matrix(parameter.ds_shape), start, tensor.detach()[:valid])


@contextmanager
def buffers_explained() -> Iterator[None]:
    """Context manager: a failed assertion on NVMe buffers inside becomes a ConfigError with a remedy."""
    try:
        yield
    except AssertionError as error:
        if "buffer" not in str(error):
            raise
        raise ConfigError(
            f"offload_param: {error}; raise buffer_size to the elements of the largest shard (of a "
            "parameter, divided by the ranks), buffer_count above the parameters of one layer"
        ) from error


def init_distributed(timeout: timedelta | None = None) -> None:
    """Joins the launcher's world, or makes one of a single process; does nothing once in a world.

    Args:
        timeout: limit of collectives; None takes DeepSpeed's default.
    """
    # On CPU this op would compile for minutes at every first start, for intra-node all-reduces of
    # a size that we never make.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.distributed.is_initialized():
        return
    if not os.environ.get("RANK"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    limit = timeout or default_pg_timeout
    if place := of_restart(limit):
        torch.distributed.init_process_group(timeout=limit, **place)  # DeepSpeed takes it as it is
    deepspeed.init_distributed(timeout=limit, verbose=False)


def sharding_of(model: nn.Module, config: Mapping[str, Any]) -> Zero3:
    """Returns the sharding of a DeepSpeed engine, or of a module that `config` partitions.

    Raises:
        ConfigError: a stage other than 3; the module is partitioned by `zero.Init`, and there is no
            `zero_optimization` in `config`. ShardingError: an engine with an optimizer.
    """
    if hasattr(model, "zero_optimization_stage"):
        return Zero3(model)
    if "zero_optimization" not in config:
        raise ConfigError(
            "the model's weights are partitioned (zero.Init) but there is no DeepSpeed config; "
            "pass a DeepSpeed engine, or a DeepSpeed JSON with zero_optimization and a tezo block"
        )
    return Zero3(wrap(model, dict(config)))


def wrap(module: nn.Module, config: dict[str, Any]) -> deepspeed.DeepSpeedEngine:
    """Partitions `module` by a DeepSpeed config and returns the engine."""
    check_version()
    config = prepare(config)
    init_distributed()
    # hpZ without an optimizer asks the engine for a method that only optimizers have, unless the
    # group is there already.
    hpz = config["zero_optimization"].get("zero_hpz_partition_size", 1)
    groups = deepspeed.utils.groups
    if hpz > 1 and groups._get_zero_param_intra_parallel_group() is None:
        groups._create_zero_param_parallel_group(hpz)
    with buffers_explained():
        engine, *_ = deepspeed.initialize(model=module, config=config)
    return engine
