"""DeepSpeed's offload to NVMe at toy size, on machines where its `async_io` op cannot be built.

That op needs libaio's headers and compiles for minutes. Here one class of it has a stand-in, the handle
that reads and writes a tensor from and to a file; DeepSpeed's swapper and our code run for real. With
TEZO_DS_REAL_AIO=1 in the environment the real op serves.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.swap_tensor import partitioned_param_swapper as swapper
from torch import Tensor

REAL = os.environ.get("TEZO_DS_REAL_AIO") == "1"
SWAPPABLE = (
    50  # elements of a shard from which on it goes to its file; DeepSpeed's own is a megabyte
)


class FileHandle:
    """A stand-in for `aio_handle` that does nothing before `wait`, which is as late as the real one may
    be."""

    def __init__(self, **options: object) -> None:
        self._pending: list[Callable[[], object]] = []

    def new_cpu_locked_tensor(self, numel: int, example: Tensor) -> Tensor:
        return torch.empty(numel, dtype=example.dtype)

    def async_pread(self, buffer: Tensor, path: str, offset: int) -> int:
        data = _bytes(buffer)
        assert os.path.getsize(path) == data.numel() and offset == 0
        data.fill_(0xFF)  # what comes before `wait` is no number

        def read() -> None:
            data.copy_(torch.from_file(path, size=data.numel(), dtype=torch.uint8))

        self._pending.append(read)
        return 0

    def async_pwrite(self, buffer: Tensor, path: str, offset: int) -> int:
        assert offset == 0
        self._pending.append(lambda: Path(path).write_bytes(_bytes(buffer).numpy().tobytes()))
        return 0

    def wait(self) -> int:
        """Makes the pending reads and writes; returns how many there were."""
        pending, self._pending = self._pending, []
        for run in pending:
            run()
        return len(pending)


def _bytes(buffer: Tensor) -> Tensor:
    data = buffer.view(torch.uint8)
    assert data.data_ptr() == buffer.data_ptr() and data.numel() % 512 == 0  # what O_DIRECT asks
    return data


class FileTraffic:
    """Counts of the elements that went through files, those that fill up a block included."""

    read = written = 0


@contextlib.contextmanager
def toy_nvme() -> Iterator[FileTraffic]:
    """Context manager: offload to NVMe works at toy size inside; yields counts of the elements read and
    written."""
    traffic = FileTraffic()
    read, write = swapper.swap_in_tensors, swapper.swap_out_tensors

    def swap_in(handle: object, buffers: list[Tensor], paths: list[str]) -> None:
        traffic.read += sum(buffer.numel() for buffer in buffers)
        read(handle, buffers, paths)

    def swap_out(handle: object, buffers: list[Tensor], paths: list[str]) -> None:
        traffic.written += sum(buffer.numel() for buffer in buffers)
        write(handle, buffers, paths)

    def swappable(self: object, param: object = None, numel: int = 0) -> bool:
        return numel >= SWAPPABLE

    def load(self: object, verbose: bool) -> SimpleNamespace:
        return SimpleNamespace(aio_handle=FileHandle)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(swapper, "swap_in_tensors", swap_in))
        stack.enter_context(mock.patch.object(swapper, "swap_out_tensors", swap_out))
        owner = swapper.AsyncPartitionedParameterSwapper
        stack.enter_context(mock.patch.object(owner, "swappable_tensor", swappable))
        if not REAL:
            stack.enter_context(mock.patch.object(type(AsyncIOBuilder()), "load", load))
        yield traffic
