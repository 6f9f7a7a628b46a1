"""What a bug report has to say of a machine: versions, devices, threads, a launcher's variables.

Nothing here names a host, a user, a folder or an address, and variables are shown by a list of names: the
text is made to be pasted where anybody reads it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping

import torch
import torch.distributed as dist

from tezo_ds.doctor import machine
from tezo_ds.launched import env_rank, env_world_size
from tezo_ds.plan.needs import GIB

# What behaviour depends on, if only here and there.
PACKAGES = (
    "accelerate", "datasets", "safetensors", "tokenizers", "numpy", "numba", "pydantic", "typer", "rich",
    "peft", "bitsandbytes", "torchao",
)  # fmt: skip
# Variables whose values are numbers or words of the library that reads them.
SHOWN = (
    "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RESTART_COUNT", "SLURM_NTASKS",
    "SLURM_NNODES", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "DS_ACCELERATOR", "OMP_NUM_THREADS",
    "MKL_NUM_THREADS", "MKL_CBWR", "NCCL_DEBUG", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF",
    "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION", "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "TOKENIZERS_PARALLELISM",
)  # fmt: skip
# Those that tell where something is; said to be set, and no more.
HIDDEN = (
    "MASTER_ADDR", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "HF_HOME", "HF_ENDPOINT", "TMPDIR",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE",
)  # fmt: skip


def environment() -> dict[str, str]:
    """Returns what to paste in a bug report, as lines by their titles."""
    found = machine.versions()
    more = ((name, machine.version_of(name)) for name in PACKAGES)
    first = ("tezo_ds", "python", "torch", "transformers", "deepspeed")
    here, memory = machine.accelerator(0, deepspeed=False), machine.memory()
    instructions = torch.backends.cpu.get_cpu_capability()
    return {
        **{name: found[name] for name in first},
        "others": ", ".join(f"{name} {what}" for name, what in more if what != machine.ABSENT),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "accelerator": _accelerator(here),
        "CPU": f"{machine.processor()}, {instructions}, {here.cores} core(s) of use to this process",
        "threads": f"{here.threads} of torch",
        "memory": f"{memory.total / GIB:.0f} GiB, {memory.free / GIB:.0f} free",
        "backends": ", ".join(name for name in ("nccl", "gloo", "mpi") if _has(name)) or "none",
        "launched": _launched(),
        "variables": variables(os.environ) or "none",
    }


def variables(environ: Mapping[str, str]) -> str:
    """Returns the variables of a launcher and of libraries that are set, those of places without values."""
    told = [f"{name}={environ[name]}" for name in SHOWN if name in environ]
    return " ".join(told + [f"{name} (set)" for name in HIDDEN if name in environ])


def _has(backend: str) -> bool:
    return bool(dist.is_available() and getattr(dist, f"is_{backend}_available")())


def _accelerator(here: machine.Accelerator) -> str:
    if here.kind == "cpu":
        return "none"
    toolkit = ", ".join(
        f"{name} {version}"
        for name, version in (("CUDA", torch.version.cuda), ("ROCm", torch.version.hip))
        if version
    )
    size = f"{here.total / GIB:.0f} GiB"
    return f"{here.count} x {here.name}, {size} ({here.kind}{', ' if toolkit else ''}{toolkit})"


def _launched() -> str:
    if "RANK" not in os.environ:
        return "plainly, as one process"
    return f"rank {env_rank()} of {env_world_size()}"
