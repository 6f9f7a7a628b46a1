"""Whether what `trunk_cache` keeps has room, and anything to keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tezo_ds.doctor.machine import Space, existing
from tezo_ds.doctor.report import Row
from tezo_ds.doctor.verdicts import TIGHT, Asked
from tezo_ds.plan.needs import GIB
from tezo_ds.plan.trunk import Kept

CHECK = "trunk cache"


@dataclass(frozen=True)
class Wanted:
    """Cache that a run asks for.

    Attributes:
        first: ℓ, number of layers before the first that trains.
        kept: what a rank keeps at most.
    """

    first: int
    kept: Kept


def nothing_to_keep(wanted: Wanted) -> Row | None:
    """Returns the row of a run that has nothing to cache; None where it has."""
    if not wanted.first:
        return Row(
            CHECK, "red", "no trunk to keep: the first layer, or what stands before it, trains",
            "train late layers alone, e.g. --include last:6, or leave out trunk_cache",
        )  # fmt: skip
    return None


def in_memory(asked: Asked, wanted: Wanted, hosts: Mapping[int, Space], beside: int) -> Row:
    """Judges the memory of every host.

    Args:
        asked: where ranks are.
        wanted: the cache.
        hosts: memory of its host by rank.
        beside: bytes that a rank needs in its host's memory for all else.
    """
    rooms = []
    for host, ranks in asked.hosts.items():
        free = min(hosts[rank].free for rank in ranks) - len(ranks) * beside
        rooms.append((max(free, 0) // len(ranks), f"a rank of {host}"))
    room, of_what = min(rooms)
    return _judged(wanted.kept, room, of_what, "trunk_cache disk")


def on_disk(asked: Asked, wanted: Wanted, space: Space, output: Path, beside: int) -> Row:
    """Judges the disk of the run's folder, as rank 0 sees it; all ranks write there.

    Args:
        asked: where ranks are.
        wanted: the cache.
        space: space of the disk.
        output: the run's folder.
        beside: bytes that all else in the folder takes.
    """
    room = max(space.free - beside, 0) // len(asked.ranks)
    return _judged(wanted.kept, room, f"a rank at {existing(output)}", "another --output")


def _judged(kept: Kept, room: int, of_what: str, other: str) -> Row:
    text = f"at most {kept.each / 2**20:.3g} MiB an example"
    free = f"{room / GIB:.2f} GiB for {of_what}"
    needed = kept.nbytes
    if needed is None:
        return Row(
            CHECK, "yellow", f"{text}; {room // kept.each:,} examples fill the {free}",
            "bound it by trunk_cache_gib, or name train_examples",
        )  # fmt: skip
    many = (
        "" if kept.kept is None else f"{kept.kept:,} of a rank's {kept.examples:,} examples take "
    )
    text += f"; {many or 'a rank takes at most '}{needed / GIB:.2f} GiB, of {free}"
    if needed > room:
        return Row(CHECK, "red", text, f"a lower trunk_cache_gib, or {other}")
    if needed > TIGHT * room:
        return Row(CHECK, "yellow", text, "make room, or lower trunk_cache_gib")
    return Row(CHECK, "green", text)
