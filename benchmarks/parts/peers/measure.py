"""One run of `benchmarks/peers.py` on every rank of its world: memory, pace, then training."""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from step_overhead import ROOT, random_llama
from torch import Tensor, nn

from parts.common.backends import settle
from parts.methods.report import Record
from parts.peers.job import Job, inference
from parts.peers.loops import Batch
from parts.peers.ways import WAYS, Started
from parts.scaling.measure import gathered

sys.path.append(str(ROOT / "tests" / "helpers"))
from process_memory import process_peak

NO_RATE = 1e-12  # memory and pace are those of training, and nothing moves
ROUNDS, STEPS = 3, 2  # of the pace
RECORD, WEIGHTS = "record.json", "changed.safetensors"


def run(rank: int, job: Job, folder: str) -> None:
    """Makes one run; rank 0 writes RECORD into the folder and, after a training, WEIGHTS.

    Args:
        job: the run.
        folder: a folder that exists.
    """
    found: Record = {}
    started: list[Started] = []

    def prepare(model: nn.Module) -> Callable[[], object]:
        vocabulary: int = cast(Any, model).config.vocab_size
        batch, tried = _within(vocabulary, job.batch(0, rank), replace(job, lr=NO_RATE))
        if job.way is None:
            forward = inference(model, tried)
            return lambda: forward(batch)
        started[:] = [WAYS[job.way].start(model, tried)]
        return lambda: started[0].train([batch])

    give_back_freed(True)
    small = random_llama(128).to(getattr(torch, job.settings.dtype))
    found["peak_bytes"] = max(gathered(process_peak(small, job.load, prepare)))
    give_back_freed(False)
    if job.way is not None:
        found |= pace(started.pop(), job, rank)
        if job.settings.budget:
            found |= train(job, rank, found["step_seconds"], folder)
    if rank == 0:
        Path(folder, RECORD).write_text(json.dumps(found))


def _within(vocabulary: int, batch: Batch, job: Job) -> tuple[Batch, Job]:
    """Returns the same batch and words for a model that knows fewer tokens."""
    ids, labels = batch["input_ids"] % vocabulary, batch["labels"]
    labels = torch.where(labels < 0, labels, labels % vocabulary)
    choices = job.choices % vocabulary
    return {**batch, "input_ids": ids, "labels": labels}, replace(job, choices=choices)


def give_back_freed(at_once: bool) -> None:
    """Sets whether glibc gives freed tensors back to the kernel at once, so that a process has what it needs
    and no more, or keeps what it can, which is faster. Does nothing without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_threshold, trim_threshold = -3, -1  # of malloc.h
        mallopt(mmap_threshold, 2**17 if at_once else 2**25)
        mallopt(trim_threshold, 2**17 if at_once else 2**30)


def pace(started: Started, job: Job, rank: int) -> Record:
    """Times a step and plain inference of the same sequences in the same process, in turns; each time is that
    of the slowest rank. The first of each turn is not timed, as ZeRO-3 learns the order of the layers in
    it."""
    seconds: dict[str, list[float]] = {"plain": [], "step": []}
    for turn in range(ROUNDS):
        batches = [job.batch(turn * STEPS + index, rank) for index in range(STEPS)]
        for name, go in (("plain", started.plain), ("step", started.train)):
            go(batches[:1])
            settle()
            start = time.perf_counter()
            go(batches)
            settle()
            seconds[name].append(max(gathered(time.perf_counter() - start)) / STEPS)
    ratios = [step / plain for step, plain in zip(seconds["step"], seconds["plain"], strict=True)]
    return {
        "step_seconds": statistics.median(seconds["step"]),
        "plain_seconds": statistics.median(seconds["plain"]),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def train(job: Job, rank: int, step_seconds: float, folder: str) -> Record:
    """Trains from the weights as loaded, as many steps as fit into the budget at `step_seconds` each."""
    assert job.way is not None
    gc.collect()
    steps = max(1, round(job.settings.budget / step_seconds))
    started = WAYS[job.way].start(job.load(), job)
    settle()
    start = time.perf_counter()
    started.train([job.batch(step, rank) for step in range(steps)])
    settle()
    seconds = time.perf_counter() - start
    changed = dict(started.changed())
    whole: dict[str, Tensor] = {
        name: tensor.contiguous() for name, tensor in changed.items() if tensor is not None
    }
    if rank == 0:
        save_file(whole, Path(folder, WEIGHTS))
    return {"steps": steps, "seconds": seconds}
