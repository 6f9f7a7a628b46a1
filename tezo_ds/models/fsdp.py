"""Models larger than one rank's memory under FSDP2: built without values, sharded, then filled.

transformers' `from_pretrained` does the filling, so whatever it knows of checkpoints holds here (names with
and without a prefix, tied and renamed weights, conversions, dtypes): for a parameter that is sharded
already it reads from the safetensors files only the slice that this rank keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from transformers.distributed import DistributedConfig

from tezo_ds.errors import ConfigError
from tezo_ds.models.checkpoint import misfit_of, note_left_over, without_tables
from tezo_ds.models.structure import blocks
from tezo_ds.quantised.packed import make_portable, misfits, packed_weights


@dataclass(frozen=True)
class FsdpPlan:
    """Plan by which FSDP2 shards a model over all ranks.

    Attributes:
        replicas: whole copies, each over world_size / replicas ranks.
        compute_dtype: dtype to which weights are cast as they are gathered; None: as they are stored.
        offload: shards stay in CPU memory and come to the device when they are gathered.
        layers: class names of the modules that are gathered one at a time; None: the model's own
            choice of transformer blocks.
    """

    replicas: int = 1
    compute_dtype: torch.dtype | None = None
    offload: bool = False
    layers: tuple[str, ...] | None = None


def load_sharded(
    loader: Any,
    name: str,
    dtype: torch.dtype | str,
    device: torch.device,
    plan: FsdpPlan,
    trust: bool = False,
    given: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Loads a model under `fully_shard`; no rank ever holds more of the model than its shards.

    Args:
        loader: transformers' AutoModel class.
        name: folder or hub name.
        dtype: dtype of the shards; "auto": the checkpoint's.
        device: where forwards run.
        plan: how the model is sharded.
        trust: whether to run Python code that comes with the model.
        given: more for `from_pretrained`.

    Raises:
        ConfigError: `plan` does not fit the world or the model, or the installed transformers is too
            old. OSError: no such model, or not in safetensors. ValueError: weights are missing, or of
            another shape.
    """
    mesh = _mesh(plan.replicas, device)
    parameters: list[str] = []

    def shard(model: nn.Module) -> nn.Module:
        sharded = _shard(model, mesh, plan)
        parameters.extend(name for name, _ in sharded.named_parameters())
        return sharded

    try:
        with _shards_by(shard), without_tables():
            model, report = loader.from_pretrained(
                name, dtype=dtype, device_map={"": "cpu" if plan.offload else device},
                use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True,
                distributed_config=DistributedConfig(), trust_remote_code=trust, **(given or {}),
            )  # fmt: skip
    except OSError as error:
        if "file named" not in str(error):
            raise
        raise OSError(
            "no safetensors files there, the only ones that --fsdp reads; convert .bin files by "
            "from_pretrained and save_pretrained"
        ) from None
    del model.config.distributed_config
    _check(model, report, parameters)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    return model


def shard_whole(model: nn.Module, device: torch.device, plan: FsdpPlan) -> nn.Module:
    """Shards a model that is filled already, as `load_sharded` would.

    Raises:
        ConfigError: `plan` does not fit the world or the model.
    """
    return _shard(model, _mesh(plan.replicas, device), plan)


def shard_packed(model: nn.Module, device: torch.device, plan: FsdpPlan) -> nn.Module:
    """Shards a model whose weights of 4 bits are stored as numbers of the dtype of the rest.

    Raises:
        ConfigError: `plan` does not fit the world or the model, or casts weights.
        ValueError: a packed layer does not act as y = x Ŵᵀ.
    """
    if plan.compute_dtype is not None:
        raise ConfigError(
            "--compute-dtype would cast packed weights as if they were numbers; leave it out, and use "
            "--dtype for the rest"
        )
    packed = packed_weights(model)
    for weight, why in misfits(packed.values()):
        raise ValueError(f"{weight.path}: {weight.kind} {why}")
    sharded = shard_whole(model, device, plan)
    make_portable(packed.values(), device)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    return sharded


def _mesh(replicas: int, device: torch.device) -> DeviceMesh:
    world_size = dist.get_world_size()
    if world_size % replicas:
        raise ConfigError(
            f"--fsdp-replicas {replicas} does not divide the {world_size} ranks that there are"
        )
    if replicas == 1:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    shape = (replicas, world_size // replicas)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


@contextmanager
def _shards_by(shard: Callable[[nn.Module], nn.Module]) -> Iterator[None]:
    """Context manager: `from_pretrained` inside calls `shard` in place of its own plans, between building a
    model on the meta device and filling it. Its own plans keep the last layers gathered."""
    models: Any = transformers.PreTrainedModel
    if not hasattr(models, "maybe_distribute_model"):
        raise ConfigError(
            f"--fsdp: transformers {transformers.__version__} cannot fill a sharded model; install "
            "transformers>=5.23"
        )
    models.maybe_distribute_model = classmethod(lambda cls, model, config, meshes: shard(model))
    try:
        yield
    finally:
        del models.maybe_distribute_model  # the class that it inherits from has the original


def _shard(model: Any, mesh: DeviceMesh, plan: FsdpPlan) -> nn.Module:
    model.tie_weights()  # before, so that a tied weight is one parameter of one group
    pinned = torch.accelerator.is_available()
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": True,
        "mp_policy": MixedPrecisionPolicy(param_dtype=plan.compute_dtype),
        "offload_policy": CPUOffloadPolicy(pinned) if plan.offload else OffloadPolicy(),
    }
    for block in blocks(model, plan.layers):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def _check(model: nn.Module, report: dict[str, Any], parameters: list[str]) -> None:
    """Raises ValueError, on all ranks, unless the checkpoint filled just the parameters that were
    sharded. A rank sees only its own slices, which may fit while other ranks' do not."""
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, _misfit(model, report, parameters))
    if misfit := next(filter(None, found), None):
        raise ValueError(misfit)
    note_left_over(report)


def _misfit(model: nn.Module, report: dict[str, Any], parameters: list[str]) -> str | None:
    if misfit := misfit_of(report):
        return misfit
    if untied := [name for name, _ in model.named_parameters() if name not in parameters]:
        return (
            f"its {untied[0]} differs from the weight that config.json ties it to; set "
            '"tie_word_embeddings": false there'
        )
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    if len(dtypes) > 1:
        return (
            f"its weights are of more than one dtype ({', '.join(sorted(dtypes))}), which --fsdp "
            "cannot gather together; use --dtype float32, with --compute-dtype where it is slow"
        )
    return None
