"""The most memory that a real process takes while it trains, and the bound of each method."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from tezo_ds.directions.lowrank import BLOCK_NUMEL

RUNS = 2  # the second is the first that finds moments
BLOCK = 4 * BLOCK_NUMEL  # bytes of a block in float32

Prepare = Callable[[nn.Module], Callable[[], object]]


def may_take(method: str, plain: int, weights: int) -> int:
    """Returns the bytes that a process may take which trains at hidden sizes of 1,024 or more in float32;
    U and V of the fused probe are r(m + n) numbers beside a matrix's mn.

    Args:
        method: of the run, r its default.
        plain: bytes of the process that runs plain forwards of the same sequences.
        weights: bytes of those that train.
    """
    family, _, kind = method.partition("-")
    if family == "mezo":  # moments, and blocks: Z and what else an update is made of
        moments = {"": 0, "m": 1, "adam": 2}[kind]
        return int(1.02 * (plain + moments * weights)) + (3 if kind == "adam" else 2) * BLOCK
    if family == "lozo":
        return int(1.06 * plain)
    return int(1.05 * plain) + (2 * BLOCK if kind == "adam" else 0)  # two parts of a quotient


def process_peak(small: nn.Module, make: Callable[[], nn.Module], prepare: Prepare) -> int:
    """Measures the bytes at the highest point while a model is prepared and run, the model included.

    On an accelerator what torch allocated. On the CPU resident memory, less what the process had
    before: by then a small model was prepared and run, so code that is loaded or compiled on the way
    is not in it. Nor is what making the model takes beside the model.
    """
    accelerator = torch.accelerator.is_available()
    if not accelerator:
        import tezo_ds.rng.compiled  # noqa: F401  a small model would not have it compiled
    _run(prepare(small))
    _give_back()
    before = 0 if accelerator else _status("VmRSS")
    model = make()
    _give_back()
    if accelerator:
        torch.accelerator.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of making it
    _run(prepare(model))
    return torch.accelerator.max_memory_allocated() if accelerator else _status("VmHWM") - before


def _run(run: Callable[[], object]) -> None:
    for _ in range(RUNS):
        run()


def _give_back() -> None:
    """Gives free memory back to the kernel, as reused memory would not show as growth."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    else:
        ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> int:
    """Reads one line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024
