"""Hidden states after the trunk in memory-mapped files, a pair for each rank of the run that wrote them.

    rank0.states    the states, one example after another
    rank0.index     a JSON line for each: example, offset, shape, dtype, checksums of tokens and of states

An example counts by its line, which is written after its states, and whose checksum of them is looked at
before their first use. So what a kill or a full disk left half written is not there.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tezo_ds.trunk.cache import Budget, Cache

STATES, INDEX = ".states", ".index"


@dataclass
class Entry:
    """One example in a file of states."""

    example: int
    offset: int
    shape: tuple[int, int]
    dtype: str
    tokens: int
    states: int

    @property
    def nbytes(self) -> int:
        """Bytes that the states take."""
        return self.shape[0] * self.shape[1] * getattr(torch, self.dtype).itemsize


class DiskCache(Cache):
    """Hidden states in a folder: written by this rank into its own file, read from those of all.

    Args:
        budget: shared by the caches of a rank.
        folder: made if it is not there; the files in it are of the same base model and data.
        rank: this process's rank in the whole world.
    """

    def __init__(self, budget: Budget, folder: Path, rank: int) -> None:
        super().__init__(budget)
        folder.mkdir(parents=True, exist_ok=True)
        self._own = folder / f"rank{rank}{STATES}"
        self._entries: dict[int, tuple[Path, Entry]] = {}
        self._unseen: set[int] = set()  # found here, with a checksum that was not looked at yet
        self._maps: dict[Path, np.memmap] = {}
        for path in sorted(folder.glob(f"*{INDEX}")):
            for entry in _lines(path):
                self._entries[entry.example] = path.with_suffix(STATES), entry
                self._unseen.add(entry.example)
        ours = [entry for path, entry in self._entries.values() if path == self._own]
        budget.taken += sum(entry.nbytes for entry in ours)
        self._states, self._index = _opened(self._own), _opened(self._own.with_suffix(INDEX))

    def tokens_of(self, example: int) -> int | None:
        if example in self._unseen:
            self._unseen.discard(example)
            if not self._is_whole(*self._entries[example]):
                del self._entries[example]
        return self._entries[example][1].tokens if example in self._entries else None

    def get(self, example: int) -> Tensor:
        path, entry = self._entries[example]
        flat = torch.from_numpy(np.array(self._bytes(path, entry)))
        return flat.view(getattr(torch, entry.dtype)).view(entry.shape)

    def _put(self, example: int, tokens: int, hidden: Tensor) -> None:
        raw = hidden.cpu().contiguous().view(torch.uint8).view(-1).numpy()
        offset = os.lseek(self._states, 0, os.SEEK_END)
        rows, width = hidden.shape
        dtype = str(hidden.dtype).removeprefix("torch.")
        entry = Entry(example, offset, (rows, width), dtype, tokens, zlib.crc32(raw.tobytes()))
        line = json.dumps(asdict(entry)) + "\n"
        end = os.lseek(self._index, 0, os.SEEK_END)
        try:
            _write(self._states, raw.tobytes())
            _write(self._index, line.encode())
        except OSError:  # no half of it stays
            os.ftruncate(self._states, offset)
            os.ftruncate(self._index, end)
            raise
        self._entries[example] = self._own, entry

    def _bytes(self, path: Path, entry: Entry) -> np.ndarray:
        """Returns the mapped bytes of an entry's states; fewer where the file ends before."""
        end = entry.offset + entry.nbytes
        if path not in self._maps or len(self._maps[path]) < end:  # or it has grown since
            self._maps[path] = np.memmap(path, dtype=np.uint8, mode="r")
        return self._maps[path][entry.offset : end]

    def _is_whole(self, path: Path, entry: Entry) -> bool:
        try:
            return zlib.crc32(self._bytes(path, entry).tobytes()) == entry.states
        except (OSError, ValueError):  # gone, or empty, which cannot be mapped
            return False


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _write(handle: int, data: bytes) -> None:
    """Writes all of the data at the end of a file, as the system may take less at a time."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def _lines(path: Path) -> Iterator[Entry]:
    """Yields the entries of an index, without a last line that a kill cut off."""
    for line in path.read_text(errors="replace").splitlines():
        try:
            fields = json.loads(line)
            yield Entry(**{**fields, "shape": tuple(fields["shape"])})
        except (ValueError, TypeError, KeyError):
            continue
