"""Whether a run's model, its memory and its files have room: facts against `tezo_ds.plan.needs`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from tezo_ds.doctor.machine import Accelerator, Space, existing
from tezo_ds.doctor.report import Failed, Row
from tezo_ds.doctor.verdicts import TIGHT, Asked
from tezo_ds.plan.needs import GIB, Layout, Needs

SEEING = 10.0  # seconds until a file that one host wrote shows on others


class Model(NamedTuple):
    """What a rank sees of the model.

    Attributes:
        what: class, weights and dtype, in words.
        digest: of all names, shapes and dtypes.
        weights: whether weights lie in its folder; None for a hub name.
    """

    what: str
    digest: str
    weights: bool | None


def model(asked: Asked, found: Mapping[int, Model]) -> Row:
    """There, and the same on all ranks."""
    first = found[min(found)]
    if odd := [rank for rank, held in found.items() if held.digest != first.digest]:
        return Row(
            "model", "red", f"{asked.name(odd[0])} has {found[odd[0]].what}, rank 0: {first.what}",
            "copy the same folder to all hosts",
        )  # fmt: skip
    if bare := [rank for rank, held in found.items() if held.weights is False]:
        return Row(
            "model", "red", f"{asked.name(bare[0])}: no .safetensors or .bin file in its folder",
            "copy the whole folder to all hosts",
        )  # fmt: skip
    return Row("model", "green", first.what)


def memory(
    asked: Asked,
    need: Needs,
    layout: Layout,
    held: Mapping[int, Accelerator],
    hosts: Mapping[int, Space],
) -> Row:
    """On every rank's accelerator, and in every host's memory.

    Args:
        asked: where ranks are.
        need: of a rank.
        layout: of the weights.
        held: accelerator by rank.
        hosts: memory of its host by rank.
    """
    on_cpu = next(iter(held.values())).kind == "cpu"
    on_device = need.device - (need.shard if layout.offloaded else 0)
    on_host = bytes_on_host(need, layout, on_cpu)
    text = (
        f"{need.device / GIB:.2f} GiB a rank (shard {need.shard / GIB:.2f}, gathered "
        f"{need.gathered / GIB:.2f}, probe {need.probe / GIB:.2f}, state {need.state / GIB:.2f}); "
        "activations beside"
    )
    free: list[tuple[float, str, int]] = []  # part that is needed of what is free, of what, bytes
    for host, ranks in asked.hosts.items():
        least = min(hosts[rank].free for rank in ranks)
        free.append((len(ranks) * on_host / max(least, 1), f"{host}'s memory", least))
    if not on_cpu:
        for rank, accelerator in held.items():
            part = on_device / max(accelerator.free, 1)
            free.append((part, f"{asked.name(rank)}'s accelerator", accelerator.free))
    part, of_what, least = max(free)
    text += f"; {part:.0%} of {least / GIB:.1f} GiB free in {of_what}"
    advice = (
        "more ranks, bfloat16, offload, a method without moments, or less beside it on the machine"
    )
    if part > 1:
        return Row("memory", "red", text, advice)
    if part > TIGHT:
        return Row("memory", "yellow", text, f"little is left for activations: {advice}")
    return Row("memory", "green", text)


def bytes_on_host(need: Needs, layout: Layout, on_cpu: bool) -> int:
    """Returns the bytes of a rank's needs that lie in its host's memory."""
    return need.device if on_cpu else need.shard if layout.offloaded else 0


def room(
    asked: Asked, need: Needs, layout: Layout, machines: Mapping[int, Mapping[str, Any]]
) -> tuple[int, str] | Failed:
    """Returns the bytes that are free for a rank beside its needs, where its forwards run, at the place that
    has least, and that place."""
    rooms: list[tuple[int, str]] = []
    for host, ranks in asked.hosts.items():
        for rank in ranks:
            accelerator, memory = machines[rank]["accelerators"], machines[rank]["memory"]
            if isinstance(accelerator, Failed) or isinstance(memory, Failed):
                return accelerator if isinstance(accelerator, Failed) else memory
            if accelerator.kind == "cpu":
                beside = len(ranks) * bytes_on_host(need, layout, True)
                rooms.append(((memory.free - beside) // len(ranks), f"{host}'s memory"))
            else:
                beside = need.device - (need.shard if layout.offloaded else 0)
                rooms.append((accelerator.free - beside, f"{asked.name(rank)}'s accelerator"))
    return min(rooms)


class Token(NamedTuple):
    """A file that rank 0 wrote for others to see."""

    path: Path
    text: str


def leave_token(output: Path) -> Token:
    """Next to where the run folder would be, or in it if it is there.

    Raises:
        OSError: it cannot be written.
    """
    token = Token(existing(output) / f".tezo-doctor-{uuid4().hex}", uuid4().hex)
    token.path.write_text(token.text)
    return token


def sees(token: Token) -> bool:
    """Whether this rank reads it; a network file system may take a moment."""
    end = time.monotonic() + SEEING
    while True:
        try:
            if token.path.read_text() == token.text:
                return True
        except OSError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.2)


def disk(
    asked: Asked,
    space: Space,
    seen: Mapping[int, bool],
    output: Path,
    needed: int | None,
    writes: bool,
) -> Row:
    """Room in the run folder, and whether it is the same on all hosts.

    Args:
        asked: where ranks are.
        space: there, as rank 0 sees it.
        seen: by rank, whether it sees what rank 0 writes there.
        output: the run folder.
        needed: bytes; None: not known, as there is no model.
        writes: whether all ranks write their shards there.
    """
    check, text = "run folder", f"{space.free / GIB:.1f} GiB free at {existing(output)}"
    if needed is not None:
        text += f", {needed / GIB:.2f} GiB needed"
        if needed > space.free:
            advice = "fewer --snapshots, --no-save-model, or another disk"
            return Row(check, "red", text, advice)
    if blind := [rank for rank in asked.ranks if not seen[rank]]:
        text += f"; {asked.name(blind[0])} sees another folder"
        if writes:
            return Row(check, "red", text, "snapshots need a file system that all hosts share")
        text += ", where nothing is written (rank 0's host keeps the run)"
    elif len(asked.hosts) > 1:
        text += "; all hosts share it"
    if needed is not None and needed > TIGHT * space.free:
        return Row(check, "yellow", text, "make room")
    return Row(check, "green", text)
