"""Seconds of a step by how its forward is made: compiled, recorded, and of rows without padding."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from step_overhead import make_batch
from transformers.utils import is_flash_attn_2_available

import tezo_ds
from parts.common.backends import settle
from parts.gpu_check.rows import Found, Options, Rows, Skip
from parts.gpu_check.speed import build
from tezo_ds.compiling import blocks
from tezo_ds.tasks.encoded import Encoded, collate, end_to_end

MODEL, ROUNDS = "llama-7b", 5
SHAPES = ("1x32", "16x32")  # the first so small that launching kernels may be what takes time
FORMS: dict[str, Found] = {
    "eager": {}, "compiled": {"compile": True}, "CUDA graphs": {"compile": True, "cuda_graphs": True},
}  # fmt: skip
EXAMPLES, LONGEST = 32, 120
ATTENTION = (
    "padded, sdpa",
    "end to end, sdpa",
    "end to end, flash_attention_2",
    "end to end, flex_attention",
)


def run(rows: Rows, options: Options) -> None:
    """Measures each way on one model."""
    model: Any = build(MODEL, options.toy)
    seconds: dict[str, float] = {}
    with _small(options.toy):
        for shape in SHAPES:
            batch = make_batch("1x5" if options.toy else shape, 300, "last")
            for form, fields in FORMS.items():
                act = partial(step, model, batch, fields, seconds, shape)
                rows.measure(f"{shape}: {form}", act)
    for way in ATTENTION:
        rows.measure(
            f"{EXAMPLES} of {LONGEST} tokens at most: {way}", partial(ragged, model, way, seconds)
        )


@contextmanager
def _small(toy: bool) -> Iterator[None]:
    """Context manager: a toy's blocks are traced, but not compiled, which takes most of the time."""
    with mock.patch.object(blocks, "BACKEND", "eager" if toy else blocks.BACKEND):
        yield


def _timed(model: Any, batch: dict[str, torch.Tensor], fields: Found) -> tuple[float, float, float]:
    """Returns the seconds of the first step and the median of the next, and the loss of the first."""
    engine = tezo_ds.initialize(model, {"rank": 16, "lr": 1e-9, "check_every": 0, **fields})
    taken, losses = [], []
    for _ in range(1 + ROUNDS):
        settle()
        start = time.perf_counter()
        losses.append(engine.step(batch).loss)
        settle()
        taken.append(time.perf_counter() - start)
    return taken[0], statistics.median(taken[1:]), losses[0]


def step(
    model: Any, batch: dict[str, torch.Tensor], fields: Found, seconds: dict[str, float], shape: str
) -> tuple[str, Found]:
    """Times steps in one form, beside the eager ones."""
    if "cuda_graphs" in fields and not torch.cuda.is_available():
        raise Skip("needs a CUDA GPU")
    first, usual, loss = _timed(model, batch, fields)
    eager = seconds.setdefault(shape, usual)
    told = (
        f"{usual:.4g} s, {usual / eager:.3f} × eager, the first step {first:.3g} s, loss {loss:.6f}"
    )
    return told, {"seconds": usual, "first": first, "ratio": usual / eager, "loss": loss}


def ragged(model: Any, way: str, seconds: dict[str, float]) -> tuple[str, Found]:
    """Times steps of examples of many lengths, beside padded ones."""
    layout, kind = way.split(", ")
    if kind == "flash_attention_2" and not is_flash_attn_2_available():
        raise Skip("flash_attn is not there")
    if kind == "flex_attention" and model.device.type == "cpu":
        raise Skip("does not compile for a CPU once lengths change")
    drawn = torch.Generator().manual_seed(0)
    lengths = torch.randint(LONGEST // 8, LONGEST, (EXAMPLES,), generator=drawn)
    examples = [
        Encoded(torch.randint(0, 300, (int(n),), generator=drawn).tolist(), int(n) - 1, None)
        for n in lengths
    ]
    batch = collate(examples, 0) if layout == "padded" else end_to_end(examples, 0, examples[0])
    before = model.config._attn_implementation
    model.set_attn_implementation(kind)
    try:
        _, usual, loss = _timed(model, batch, {})
    finally:
        model.set_attn_implementation(before)
    padded = seconds.setdefault("padded", usual)
    tokens = batch["input_ids"].numel()
    told = f"{usual:.4g} s, {usual / padded:.3f} × padded, {tokens} tokens, loss {loss:.6f}"
    return told, {"seconds": usual, "ratio": usual / padded, "loss": loss}
