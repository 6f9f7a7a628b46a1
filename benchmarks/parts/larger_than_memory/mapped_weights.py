"""Weights that are mapped from their files: where each lies, which of its pages are in memory, and reading
ahead of a forward.

`load_model` maps safetensors files whose dtype is the wanted one: its parameters are views of the files, of
which the kernel reads a page when it is first touched and which it may drop at any time. `read_ahead`
chooses: the next block's pages are read while a block computes, and a block's are dropped behind it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from tezo_ds import Engine
from tezo_ds.errors import ConfigError
from tezo_ds.models.structure import blocks

CHUNK = 1 << 20  # bytes asked for at once: the kernel cuts what exceeds its own limit

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass(frozen=True)
class Extent:
    """Whole pages of a file, mapped.

    Attributes:
        address: address of the first page.
        length: bytes.
        file: path of the file.
        offset: bytes before the first page in the file.
    """

    address: int
    length: int
    file: str
    offset: int


Extents = Sequence[Extent]
Files = dict[str, int]  # descriptors by path


def extents(module: nn.Module) -> list[Extent]:
    """Returns the pages that each parameter of a module lies on.

    Raises:
        ConfigError: a parameter is not mapped from a file.
    """
    mappings = list(_mappings())
    return [
        _extent(name, p.data_ptr(), p.nbytes, mappings) for name, p in module.named_parameters()
    ]


def _extent(name: str, address: int, length: int, mappings: list[Extent]) -> Extent:
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    stop = -(-(address + length) // mmap.PAGESIZE) * mmap.PAGESIZE
    for m in mappings:
        if m.address <= start and stop <= m.address + m.length:
            return Extent(start, stop - start, m.file, m.offset + start - m.address)
    raise ConfigError(
        f"{name} is in memory and not mapped from a safetensors file; leave its dtype as it is on disk, "
        "and the model on the CPU"
    )


def _mappings() -> Iterator[Extent]:
    """Yields this process's mappings of safetensors files."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, offset, _, _, *file = line.split(maxsplit=5)
        if file and file[0].endswith(".safetensors"):
            start, stop = (int(number, 16) for number in addresses.split("-"))
            yield Extent(start, stop - start, file[0], int(offset, 16))


def pages_of(place: Path, field: str) -> int:
    """Returns bytes of one field of /proc/self/smaps, over the mappings of a file, or a folder's files: "Rss"
    are pages that this process has in memory, "Anonymous" those of them that it has written and so copied."""
    total, within, place = 0, False, place.resolve()
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *rest = line.split(maxsplit=5)
        if not key.endswith(":"):
            within = len(rest) == 5 and Path(rest[4]).is_relative_to(place)
        elif within and key == f"{field}:":
            total += int(rest[0]) * 1024
    return total


def give_back(module: nn.Module) -> None:
    """Drops all pages of a module's weights from this process, and from the page cache.

    Raises:
        ConfigError: a parameter is not mapped from a file.
    """
    pages = extents(module)
    with ExitStack() as stack:
        _drop(pages, _opened(stack, pages))


def _opened(stack: ExitStack, pages: Extents) -> Files:
    names = {extent.file for extent in pages}
    return {name: stack.enter_context(open(name, "rb")).fileno() for name in names}


@contextmanager
def read_ahead(engine: Engine) -> Iterator[None]:
    """Context manager: forwards inside, of a model whose weights are mapped, have about two blocks in memory,
    and what lies outside of blocks. The block that is read ahead is the one that came next the last time, as
    a cached trunk's are left out.

    Raises:
        ConfigError: a parameter is not mapped, or training would write it: what is dropped is read
            again, without what was written.
    """
    if engine.method.writes or engine.probe.name != "fused":
        raise ConfigError(
            f"method {engine.config.method} by the {engine.probe.name} probe writes weights, which are "
            "mapped from files; take tezo and the fused probe"
        )
    found = blocks(engine.sharding.module)
    pages = [extents(block) for block in found]
    count, ran = len(found), [len(found) - 1]
    following = [(number + 1) % count for number in range(count)]
    with ExitStack() as stack:
        files = _opened(stack, [extent for block in pages for extent in block])
        worker = stack.enter_context(ThreadPoolExecutor(1))  # in turn, so few blocks are asked for

        def ask(number: int, *_: object) -> None:
            following[ran.pop()] = number
            ran.append(number)
            worker.submit(_ask, pages[following[number]], files)

        def drop(number: int, *_: object) -> None:
            worker.submit(_drop, pages[number], files)

        for number, block in enumerate(found):
            stack.callback(block.register_forward_pre_hook(partial(ask, number)).remove)
            stack.callback(block.register_forward_hook(partial(drop, number)).remove)
        yield


def _ask(wanted: Extents, files: Files) -> None:
    for extent in wanted:
        for start in range(extent.offset, extent.offset + extent.length, CHUNK):
            os.posix_fadvise(files[extent.file], start, CHUNK, os.POSIX_FADV_WILLNEED)


def _drop(done: Extents, files: Files) -> None:
    for extent in done:  # the page cache keeps what is mapped
        _libc.madvise(extent.address, extent.length, mmap.MADV_DONTNEED)
    for extent in done:
        os.posix_fadvise(files[extent.file], extent.offset, extent.length, os.POSIX_FADV_DONTNEED)
