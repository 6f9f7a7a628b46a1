"""A hostfile: what is wrong in it, and whether its hosts can be reached as the launcher will."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tezo_ds.doctor.report import Row

CHECK = "hostfile"
LINE = re.compile(r"^(\S+)\s+slots=(\d+)\s*(#.*)?$")  # as DeepSpeed reads it
CONNECT, ANSWER = 5, 20.0  # seconds
_NO_SUCH_COMMAND, _SSH_FAILED = 127, 255


@dataclass(frozen=True)
class Host:
    """Facts about one host.

    Attributes:
        wrong: why the host cannot be reached; empty where it can.
        gpus: number of its GPUs; None where that is not known.
    """

    wrong: str = ""
    gpus: int | None = None


def read_hostfile(text: str) -> tuple[dict[str, int], list[str]]:
    """Returns slots by host, and what is wrong in which line."""
    slots: dict[str, int] = {}
    wrong = []
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if not line or line.startswith("#"):
            continue
        found = LINE.match(line)
        if found is None:
            wrong.append(f"line {number} is no 'host slots=N': {line!r}")
        elif found[1] in slots:
            wrong.append(f"line {number}: {found[1]} is there twice")
        elif int(found[2]) == 0:
            wrong.append(f"line {number}: {found[1]} has no slots")
        else:
            slots[found[1]] = int(found[2])
    return slots, wrong if slots or wrong else ["there is no line 'host slots=N'"]


def ask(host: str) -> Host:
    """Asks a host for its GPUs, by ssh as pdsh uses it: without a password or a question."""
    try:
        socket.getaddrinfo(host, 22)
    except OSError as error:
        return Host(f"the name does not resolve ({error.strerror})")
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT}"]
    options += shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    try:
        found = subprocess.run(
            ["ssh", *options, host, "nvidia-smi -L"], capture_output=True, text=True,
            stdin=subprocess.DEVNULL, timeout=ANSWER, errors="replace",
        )  # fmt: skip
    except FileNotFoundError:
        return Host("ssh is not installed here")
    except subprocess.TimeoutExpired:
        return Host(f"ssh gives no answer within {ANSWER:.0f} s")
    if found.returncode == _SSH_FAILED:
        *_, last = found.stderr.strip().splitlines() or ["ssh failed"]
        return Host(last)
    gpus = sum(line.startswith("GPU ") for line in found.stdout.splitlines())
    return Host(gpus=gpus if found.returncode == 0 else None)


def check_hostfile(path: Path | None, world_size: int, ask: Callable[[str], Host] = ask) -> Row:
    """Returns the row of a hostfile; with a single host, which launchers start without ssh, the file alone is
    checked.

    Args:
        path: path of the hostfile; None: there is none.
        world_size: ranks that a launcher has started; 1: none has.
        ask: function that returns facts about a host.
    """
    if path is None:
        return Row(CHECK, "unchecked", "no --hostfile")
    try:
        slots, wrong = read_hostfile(path.read_text(errors="replace"))
    except OSError as error:
        return Row(CHECK, "red", f"{path}: cannot be read ({error.strerror})", "check the path")
    if wrong:
        return Row(
            CHECK, "red", f"{path}: {'; '.join(wrong)}", "write a line 'host slots=N' a host"
        )
    if len(slots) == 1:
        return Row(CHECK, "green", f"one host, {next(iter(slots.values()))} slots; ssh not needed")
    with ThreadPoolExecutor(32) as pool:
        hosts = dict(zip(slots, pool.map(ask, slots), strict=True))
    return judge(slots, hosts, world_size, shutil.which("pdsh") is not None)


def judge(slots: Mapping[str, int], hosts: Mapping[str, Host], world_size: int, pdsh: bool) -> Row:
    """Returns the row of a hostfile that is well written.

    Args:
        slots: slots by host.
        hosts: facts by host.
        world_size: ranks that a launcher has started.
        pdsh: whether pdsh is installed.
    """
    total = sum(slots.values())
    found = f"{len(slots)} hosts, {total} slots"
    if lost := {name: host.wrong for name, host in hosts.items() if host.wrong}:
        said = _some([f"{name}: {why}" for name, why in lost.items()])
        return Row(
            CHECK, "red", said,
            "make `ssh -o BatchMode=yes HOST true` work for each: its name, its key, its sshd",
        )  # fmt: skip
    gpus = {name: host.gpus for name, host in hosts.items() if host.gpus is not None}
    if few := [
        f"{name}: {slots[name]} slots, {gpus[name]} GPUs"
        for name in gpus
        if slots[name] > gpus[name]
    ]:
        return Row(CHECK, "red", _some(few), "write no more slots than GPUs")
    warnings = [
        f"{name}: {slots[name]} slots, {gpus[name]} GPUs"
        for name in gpus
        if slots[name] < gpus[name]
    ]
    advice = ["more slots would use all GPUs"] if warnings else []
    if not pdsh:
        warnings.append("pdsh is not installed")
        advice.append("install pdsh for `deepspeed --hostfile`, or choose another --launcher")
    if 1 < world_size != total:
        warnings.append(f"{world_size} ranks were started")
        advice.append(
            "look at --include, --num_gpus and the launcher, if that is not what you meant"
        )
    unknown = len(slots) - len(gpus)
    found += ", all answer ssh" + (
        f"; GPUs of {unknown} not known (no nvidia-smi)" if unknown else ""
    )
    if warnings:
        return Row(CHECK, "yellow", f"{found}; {_some(warnings)}", "; ".join(advice))
    return Row(CHECK, "green", found)


def _some(lines: Sequence[str]) -> str:
    more = f" (and {len(lines) - 4} more)" if len(lines) > 4 else ""
    return "; ".join(lines[:4]) + more
