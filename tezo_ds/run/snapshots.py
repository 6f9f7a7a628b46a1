"""The trained shards of a run on disk, and the moments beside them: what a method that writes weights has
changed, to resume from on any number of ranks and any sharding.

A snapshot is a folder with a file for each rank that had anything to write, and an index. The folder gets its
name when all is on disk; before that the name begins with a dot.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tezo_ds.engine.engine import Engine
from tezo_ds.engine.replicas import holders_of
from tezo_ds.errors import StorageError
from tezo_ds.files.text import sync_folder
from tezo_ds.run.shardfiles import (
    WEIGHT,
    Put,
    Stored,
    common_numel,
    copy_common,
    file_digest,
    stored_in,
    write_file,
)
from tezo_ds.sharding import Sharding, ShardView
from tezo_ds.sharding.view import ShardKey

FORMAT = 1
INDEX = "index.json"
_OPEN = 8  # files held open while shards are filled

Result = TypeVar("Result")
Dtypes = Mapping[str, torch.dtype]  # of moments, by kind


@torch.no_grad()
def save_shards(engine: Engine, folder: Path) -> None:
    """Writes the trained parameters as this world holds them, and the moments beside them.

    All ranks must call this, and see the same file system. Of replicas the lowest rank writes. Beside the
    run's own memory this takes the moments of one shard, and 64 MiB or so on their way from a device.

    Args:
        engine: an engine between two steps; stays as it is.
        folder: folder of the snapshot; must not exist.

    Raises:
        StorageError: a rank could not write; raised on all of them, and nothing is left.
    """
    sharding, first = engine.sharding, engine.sharding.place == 0
    partial = folder.with_name(f".{folder.name}.partial")
    file = partial / f"rank-{sharding.place:05d}-of-{sharding.everyone:05d}.safetensors"
    what = f"{folder}: snapshot not written"
    try:
        _together(sharding, what, lambda: _begin(partial, folder) if first else None)
        parameters, mine = _to_write(engine, file)
        entry = _together(sharding, what, lambda: _write(engine, mine, file))
        entries = [entry for entry in sharding.gather(entry) if entry]
        index = {"format": FORMAT, "files": entries, "parameters": parameters}
        _together(sharding, what, lambda: _finish(index, partial, folder) if first else None)
    except BaseException:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise


@torch.no_grad()
def checked_shards(engine: Engine, folder: Path) -> Callable[[], None]:
    """Checks what `save_shards` wrote, and returns the function that fills the trained shards and the moments
    beside them from it; nothing changes before that is called.

    All ranks must call both; their number and sharding need not be those of the snapshot. Beside the
    run's own memory this takes the moments of one shard; files are mapped, and only the parts that a rank
    needs are copied.

    Args:
        engine: an engine of the same model, trained parameters and method.
        folder: folder of the snapshot.

    Raises:
        StorageError: the snapshot is damaged or does not fit; raised on all ranks.
    """
    sharding, what = engine.sharding, f"{folder}: snapshot not loaded"
    index = _together(sharding, what, lambda: _read_index(folder))
    _together(sharding, what, lambda: _check_files(folder, index["files"], sharding))
    sources = _together(sharding, what, lambda: _sources(engine, folder, index))
    opened = functools.lru_cache(_OPEN)(lambda file: safe_open(file, framework="pt"))

    def fill(view: ShardView) -> None:
        parts: dict[str, Tensor] = {WEIGHT: view.local}
        for stored in sources[view.key]:
            if stored.kind not in parts:
                dtype = stored.view.local.dtype
                parts[stored.kind] = torch.empty_like(view.local, dtype=dtype)
            content = opened(stored.file).get_slice(stored.key)
            copy_common(content, stored.view, replace(view, local=parts[stored.kind]))
        del parts[WEIGHT]
        engine.method.set_moments(view, parts)

    @torch.no_grad()
    def fill_all() -> None:
        _together(sharding, what, lambda: sharding.each_shard(engine.space.slices.keys(), fill))

    return fill_all


def _together(sharding: Sharding, what: str, work: Callable[[], Result]) -> Result:
    """Returns what `work` gives, once `work` has ended on all ranks. Where it failed on any, all raise."""
    reason = ""
    try:
        result = work()
    except StorageError as error:
        reason = str(error)
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or str(error).split("\n")[0]
        file = getattr(error, "filename", None)
        reason = f"{said}{f', {file}' if file else ''}; see to that disk"
    if sharding.maxima([bool(reason)])[0]:
        reasons = sharding.gather(reason)
        rank = next(rank for rank, reason in enumerate(reasons) if reason)
        raise StorageError(f"{what}, by rank {rank}: {reasons[rank]}")
    return result


def _begin(partial: Path, folder: Path) -> None:
    if folder.exists():
        raise StorageError("the folder is there already; choose another")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    folder.parent.mkdir(exist_ok=True)
    partial.mkdir()


def _held(engine: Engine) -> list[tuple[ShardView, Dtypes]]:
    """Returns all shards of this rank, in order, on the meta device, with the dtypes of their moments."""
    found: list[tuple[ShardView, Dtypes]] = []

    def note(view: ShardView) -> None:
        dtypes = {kind: moment.dtype for kind, moment in engine.method.moments(view).items()}
        found.append((replace(view, local=torch.empty_like(view.local, device="meta")), dtypes))

    engine.sharding.each_shard(engine.space.slices.keys(), note)
    return found


def _to_write(engine: Engine, file: Path) -> tuple[dict[str, Any], list[Stored]]:
    """Returns what the index says of each parameter, and the tensors that this rank is to write.

    Where a rank holds several ranges of a parameter (hpZ), the last alone counts, which is the one that
    forwards use: the last ones of all ranks have every element, so the others have no more.
    """
    held = {view.name: (view, dtypes) for view, dtypes in _held(engine)}
    ranks, _ = holders_of(engine.sharding, [view.key for view, _ in held.values() if view.numel])
    mine: list[Stored] = []
    numels = dict.fromkeys(held, 0)
    for view, dtypes in held.values():
        if not view.numel or ranks[view.key][0] != engine.sharding.place:
            continue
        numels[view.name] = view.numel
        for kind, dtype in {WEIGHT: view.local.dtype, **dtypes}.items():
            mine.append(Stored(kind, replace(view, local=view.local.to(dtype)), file))
    total = torch.tensor(list(numels.values()), device=engine.sharding.device)
    parameters: dict[str, Any] = {}
    for (view, _), numel in zip(held.values(), engine.sharding.total(total).tolist(), strict=True):
        if numel != math.prod(view.shape):
            raise StorageError(
                f"{view.name} of shape {view.shape}: ranks hold {numel} elements, so no snapshot can be "
                "written; use a sharding of which each element is on some rank"
            )
        about = {"shape": list(view.shape), "dtype": str(view.local.dtype), "numel": numel}
        parameters[view.name] = about
    return parameters, mine


def _write(engine: Engine, mine: list[Stored], file: Path) -> dict[str, Any] | None:
    """Writes this rank's file, and returns its entry in the index; None where there is nothing to write."""
    if not mine:
        return None
    keys = {stored.view.key for stored in mine}

    def fill(put: Put) -> None:
        def write(view: ShardView) -> None:
            if view.key in keys:
                for kind, tensor in {WEIGHT: view.local, **engine.method.moments(view)}.items():
                    put(view.key, kind, tensor)

        engine.sharding.each_shard({stored.view.name for stored in mine}, write)

    write_file(file, mine, fill)
    return {"file": file.name, "size": file.stat().st_size, "digest": file_digest(file)}


def _sealed(index: Mapping[str, Any]) -> str:
    """Returns a digest of an index, less its field "digest"."""
    rest = {name: index[name] for name in index if name != "digest"}
    return hashlib.blake2b(json.dumps(rest, sort_keys=True).encode(), digest_size=32).hexdigest()


def _finish(index: dict[str, Any], partial: Path, folder: Path) -> None:
    with (partial / INDEX).open("x") as out:
        json.dump({**index, "digest": _sealed(index)}, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    sync_folder(partial)
    partial.rename(folder)
    sync_folder(folder.parent)


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX).read_bytes())
    except ValueError:
        index = None
    if not isinstance(index, dict) or index.get("digest") != _sealed(index):
        raise StorageError(f"{INDEX} is damaged; take another snapshot, or this from a copy")
    if index["format"] > FORMAT:
        raise StorageError(
            f"its format is {index['format']}, this tezo_ds reads up to {FORMAT}; update it"
        )
    return index


def _check_files(folder: Path, files: list[dict[str, Any]], sharding: Sharding) -> None:
    """Checks the files that fall to this rank."""
    for entry in files[sharding.place :: sharding.everyone]:
        file, wrong = folder / entry["file"], ""
        if not file.is_file():
            wrong = "is missing"
        elif (size := file.stat().st_size) != entry["size"]:
            wrong = f"has {size} bytes and not {entry['size']}"
        elif file_digest(file) != entry["digest"]:
            wrong = "does not have its digest"
        if wrong:
            raise StorageError(f"{file.name} {wrong}; take another snapshot, or this from a copy")


def _sources(engine: Engine, folder: Path, index: dict[str, Any]) -> dict[ShardKey, list[Stored]]:
    """Returns what each shard of this rank is to be filled from. Looks into as few files as will do, first
    into that of a rank in the same place."""
    held = {view.key: view for view, _ in _held(engine)}
    _check_parameters(held.values(), index["parameters"])
    by_name: dict[str, list[ShardView]] = {}
    for view in held.values():
        by_name.setdefault(view.name, []).append(view)
    sources: dict[ShardKey, list[Stored]] = {key: [] for key in held}
    numels: dict[ShardKey, Counter[str]] = {key: Counter() for key in held}  # found, by kind
    missing = sum(view.numel for view in held.values())
    files = [folder / entry["file"] for entry in index["files"]]
    same = engine.sharding.place * len(files) // engine.sharding.everyone
    for file in (*files[same:], *files[:same]):
        if not missing:
            break
        for stored in stored_in(file):
            for view in by_name.get(stored.view.name, ()):
                if numel := common_numel(stored.view, view):
                    sources[view.key].append(stored)
                    numels[view.key][stored.kind] += numel
                    missing -= numel if stored.kind == WEIGHT else 0
    for key, view in held.items():
        for kind in (WEIGHT, *numels[key]):
            if numels[key][kind] != view.numel:
                raise StorageError(
                    f"{view.name}: of {view.numel} elements held here {numels[key][kind]} have their "
                    f"{kind} in it; take another snapshot"
                )
    return sources


def _check_parameters(held: Iterable[ShardView], stored: Mapping[str, Any]) -> None:
    own = {view.name: view for view in held}
    if odd := sorted(own.keys() ^ stored.keys()):
        raise StorageError(
            f"the snapshot has other trained parameters than the run ({len(odd)} differ, e.g. {odd[0]}); "
            "use the run's own model, include and exclude"
        )
    for name, view in own.items():
        for item, mine in (("shape", list(view.shape)), ("dtype", str(view.local.dtype))):
            if stored[name][item] != mine:
                raise StorageError(
                    f"{name}: {item} is {stored[name][item]} in the snapshot and {mine} in the run; load "
                    "the model as the run that was saved did"
                )
