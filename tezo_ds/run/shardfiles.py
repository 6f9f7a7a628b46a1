"""Shards in safetensors files: each tensor with its range of elements, so that a rank that holds another
range of the parameter can read what both have in common."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from tezo_ds.directions.lowrank import BLOCK_NUMEL
from tezo_ds.sharding.view import ShardKey, ShardView, place_in

WEIGHT = "weight"  # among the kinds of numbers that are stored; the others are moments
_AT_ONCE = 1 << 24  # bytes read or elements written at a time
_METADATA = "shards"

Put = Callable[[ShardKey, str, Tensor], None]


@dataclass(frozen=True)
class Stored:
    """A tensor of a shard file.

    Attributes:
        kind: `WEIGHT`, or the kind of moments.
        view: the tensor's range of elements; `local` is on the meta device and has but numel and dtype.
        file: the file that has the tensor, or is to have it.
    """

    kind: str
    view: ShardView
    file: Path

    @property
    def key(self) -> str:
        """The tensor's name in the file, where each parameter has one range."""
        return f"{self.view.name}:{self.kind}"

    def about(self) -> dict[str, Any]:
        """Returns the tensor's geometry, as plain values."""
        view = self.view
        return {
            "parameter": view.name, "kind": self.kind, "shape": view.shape, "start": view.start,
            "numel": view.numel, "columns": [view.span.start, view.span.stop],
        }  # fmt: skip


def write_file(file: Path, tensors: Sequence[Stored], fill: Callable[[Put], None]) -> None:
    """Writes a new file, tensor by tensor: safetensors' own functions want all tensors in memory at once.

    Args:
        file: the file's path; on disk when this returns.
        tensors: what the file is to hold.
        fill: calls its argument once or more for each tensor, with the key of its range, its kind and
            the numbers, in any order.

    Raises:
        OSError: the file cannot be written, or is there already.
    """
    # Wider numbers first, as safetensors has it, so that each lies where its width divides.
    tensors = sorted(tensors, key=lambda stored: -stored.view.local.itemsize)
    geometry = {stored.key: stored.about() for stored in tensors}
    header: dict[str, Any] = {"__metadata__": {_METADATA: json.dumps(geometry)}}
    places: dict[tuple[ShardKey, str], int] = {}
    end = 0
    for stored in tensors:
        start, end = end, end + stored.view.local.nbytes
        places[stored.view.key, stored.kind] = start
        dtype = _code(stored.view.local.dtype)
        header[stored.key] = {
            "dtype": dtype,
            "shape": [stored.view.numel],
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("xb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        first = out.tell()

        def put(key: ShardKey, kind: str, tensor: Tensor) -> None:
            out.seek(first + places[key, kind])
            _write(out, tensor)

        fill(put)
        out.flush()
        os.fsync(out.fileno())


@functools.cache
def _code(dtype: torch.dtype) -> str:
    """Returns safetensors' name of a dtype."""
    content = save({"x": torch.empty(0, dtype=dtype)})
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return str(header["x"]["dtype"])


def _write(out: BinaryIO, tensor: Tensor) -> None:
    for part in tensor.split(_AT_ONCE):
        out.write(memoryview(part.cpu().view(torch.uint8).numpy()))


def file_digest(file: Path) -> str:
    """Returns BLAKE2b of what a file holds, in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    hashed = hashlib.blake2b(digest_size=32)
    with file.open("rb") as content:
        while part := content.read(_AT_ONCE):
            hashed.update(part)
    return hashed.hexdigest()


def stored_in(file: Path) -> Iterator[Stored]:
    """Yields the tensors of a file that `write_file` wrote; reads the header alone.

    Raises:
        OSError, SafetensorError: the file cannot be read.
    """
    with safe_open(file, framework="pt") as opened:
        for key, about in json.loads(opened.metadata()[_METADATA]).items():
            dtype = opened.get_slice(key)[:0].dtype
            local = torch.empty(about["numel"], dtype=dtype, device="meta")
            m, n = about["shape"]
            columns = range(*about["columns"])
            view = ShardView(about["parameter"], (m, n), about["start"], local, columns)
            yield Stored(about["kind"], view, file)


def common_numel(one: ShardView, other: ShardView) -> int:
    """Returns how many elements two ranges of a parameter have in common."""
    return sum(
        len(_common(a.rows, b.rows)) * len(_common(a.columns, b.columns))
        for a in one.pieces(max(1, one.numel))
        for b in other.pieces(max(1, other.numel))
    )


def copy_common(content: Any, stored: ShardView, mine: ShardView) -> None:
    """Copies the elements that two ranges of a parameter have in common.

    Args:
        content: the slice, as safetensors calls it, of a file's tensor: (stored.numel,).
        stored: the range of elements that `content` is of.
        mine: the range to write to; `local` may be on any device.
    """
    start = 0  # of a piece in what is stored
    for theirs in stored.pieces(BLOCK_NUMEL):
        width = len(theirs.columns)
        for ours in mine.pieces(BLOCK_NUMEL):
            rows, columns = _common(theirs.rows, ours.rows), _common(theirs.columns, ours.columns)
            if not rows or not columns:
                continue
            skipped = start + (rows.start - theirs.rows.start) * width
            read = content[skipped : skipped + len(rows) * width].view(len(rows), width)
            target = ours.values[place_in(ours.rows, rows), place_in(ours.columns, columns)]
            target.copy_(read[:, place_in(theirs.columns, columns)])
        start += theirs.values.numel()


def _common(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))
