"""Facts about a rank's own machine. Nothing here judges."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

import tezo_ds

PACKAGES = ("torch", "deepspeed", "transformers")
ABSENT = "not installed"
CGROUP = Path("/sys/fs/cgroup")  # of version 2


@dataclass(frozen=True)
class Accelerator:
    """Device that forwards of a rank run on.

    Attributes:
        kind: torch's name of the device; "cpu" where there is no accelerator.
        count: number of accelerators that this rank sees.
        name: name of the rank's own accelerator.
        total, free: bytes of its memory; 0 on a CPU.
        bf16: whether the device computes in bfloat16 by itself.
        cores: CPU cores that this rank may use.
        threads: threads that torch uses for an operation on the CPU.
        deepspeed: the kind that DeepSpeed runs on; None where it was not asked for.
    """

    kind: str
    count: int
    name: str
    total: int
    free: int
    bf16: bool
    cores: int
    threads: int
    deepspeed: str | None


@dataclass(frozen=True)
class Space:
    """Bytes of a file system, or of memory."""

    total: int
    free: int


def versions() -> dict[str, str]:
    """Returns versions by package, and of Python; that of our own code with a digest of its files."""
    found = {name: version_of(name) for name in PACKAGES}
    found["tezo_ds"] = f"{tezo_ds.__version__} ({_digest_of_code()})"
    return {"python": platform.python_version(), **found}


def version_of(package: str) -> str:
    """Returns the version of an installed package, or `ABSENT`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ABSENT


def _digest_of_code() -> str:
    folder = Path(tezo_ds.__file__).parent
    files = sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix())
    whole = hashlib.blake2b(digest_size=4)
    for path in files:
        whole.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return whole.hexdigest()


def accelerator(local_rank: int, deepspeed: bool) -> Accelerator:
    """Returns the device of this rank.

    Args:
        local_rank: index of this rank's accelerator among its host's.
        deepspeed: whether DeepSpeed shards, which chooses by itself what it runs on.
    """
    chosen = None
    if deepspeed:
        from deepspeed.accelerator import get_accelerator

        chosen = get_accelerator().device_name()
    cores, threads = _cores(), torch.get_num_threads()
    if not torch.accelerator.is_available():
        name = platform.processor() or platform.machine()
        return Accelerator("cpu", 0, name, 0, 0, True, cores, threads, chosen)
    current = torch.accelerator.current_accelerator()
    assert current is not None
    kind, count = current.type, torch.accelerator.device_count()
    name, free, total, bf16 = "", 0, 0, False
    if local_rank < count:
        module = torch.get_device_module(kind)
        free, total = module.mem_get_info(local_rank)
        name, bf16 = module.get_device_name(local_rank), bool(module.is_bf16_supported())
    return Accelerator(kind, count, name, total, free, bf16, cores, threads, chosen)


def processor() -> str:
    """Returns the name of the CPU, by its maker where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    usable = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(usable(0)) if usable else os.cpu_count() or 1


def memory() -> Space:
    """Returns the memory of the host, or of the container's share of it."""
    system = psutil.virtual_memory()
    limit, used = (_number(CGROUP / f"memory.{name}") for name in ("max", "current"))
    if limit is None or used is None:
        return Space(system.total, system.available)
    return Space(min(system.total, limit), max(min(system.available, limit - used), 0))


def _number(file: Path) -> int | None:
    """Reads a number; None where there is no such file, or the file says that there is no limit."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def shared_memory() -> Space:
    """Returns the space of /dev/shm."""
    usage = shutil.disk_usage("/dev/shm")
    return Space(usage.total, usage.free)


def open_files() -> int:
    """Returns how many open files a process may have."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def existing(folder: Path) -> Path:
    """Returns a folder, or the nearest one above it that is there."""
    paths: Iterable[Path] = (folder.absolute(), *folder.absolute().parents)
    return next(path for path in paths if path.exists())


def disk(folder: Path) -> Space:
    """Returns the space of the file system that a folder is on, or would be.

    Raises:
        OSError: nothing can be written there.
    """
    place = existing(folder)
    if not place.is_dir():
        raise NotADirectoryError(f"{place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"{place} cannot be written")
    usage = shutil.disk_usage(place)
    return Space(usage.total, usage.free)
