"""Seconds and memory of a step in bfloat16 at the sizes of real models, with random weights."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from step_overhead import make_batch, mezo_step
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

import tezo_ds
from parts.common.backends import settle
from parts.gpu_check.rows import Found, Options, Rows, Skip
from tezo_ds.engine.live_bytes import LiveBytes
from tezo_ds.plan.hardware import GPUS
from tezo_ds.plan.shapes import BUILT_IN
from tezo_ds.sharding.world import local_device

MODELS = ("llama-7b", "opt-13b", "llama-30b")
SHAPES = ("16x32", "16x400", "128x32")  # examples x tokens
MANY = "16x32"  # the shape at which many directions are timed, too
ROUNDS, BEFORE = 3, 1
# Seconds a step that others published, of one direction, on one GPU: MeZO's code on an A100 (MultiRC, batch
# 16, some 400 tokens; its 30B is OPT's) and zo-vllm (2605.28760; SST-2, batch 16, shorter than 32 tokens).
PUBLISHED = {
    ("opt-13b", "16x400"): (2.702, "MeZO, A100"),
    ("llama-30b", "16x400"): (5.896, "MeZO's OPT-30B, A100"),
    ("opt-13b", "16x32"): (0.088, "zo-vllm"),
}
TOY_SIZES: dict[type, dict[str, int]] = {
    LlamaConfig: {"vocab_size": 301, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    OPTConfig: {
        "vocab_size": 301, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 96, "num_hidden_layers": 2
    },
}  # fmt: skip
TOY_SHAPES = {"16x32": "2x5", "16x400": "2x9", "128x32": "3x5"}


def config_of(name: str, toy: bool) -> Any:
    """Returns a model's config; a toy's has its architecture."""
    config = BUILT_IN[name]()
    if toy:
        sizes = {**TOY_SIZES[type(config)], "num_attention_heads": 4, "max_position_embeddings": 64}
        if isinstance(config, LlamaConfig):
            sizes["num_key_value_heads"] = 4
        config = type(config)(**sizes)
    return config


def build(name: str, toy: bool) -> nn.Module:
    """Makes a model of random weights on the device.

    Raises:
        Skip: the weights would take more than nine tenths of the device's memory.
    """
    device, config = local_device(), config_of(name, toy)
    with torch.device("meta"):
        numel = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if device.type != "cpu":
        room = torch.accelerator.get_memory_info(device)[0]  # bytes that are free
        if 2 * numel > 0.9 * room:
            raise Skip(f"{2e-9 * numel:.0f} GB of weights, and {1e-9 * room:.0f} GB are free")
    with torch.device(device):
        module: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return module


def peak_flops() -> float | None:
    """Returns the dense bfloat16 rate of the device's data sheet; None where the name is not known."""
    if not torch.cuda.is_available():  # other makers' devices are not in the table
        return None
    name = torch.cuda.get_device_name().upper()
    if "H100" in name and "PCIE" in name:
        return GPUS["h100-pcie-80g"].flops
    known = {"H200": "h200-141g", "H100": "h100-80g", "A100": "a100-80g", "L40S": "l40s-48g"}
    return next((GPUS[gpu].flops for part, gpu in known.items() if part in name), None)


def run(rows: Rows, options: Options) -> None:
    """Measures each model, shape and step."""
    for name in MODELS:
        held: list[nn.Module] = []  # empty where the model could not be made
        rows.measure(f"{name}: weights", partial(hold, held, name, options.toy))
        for shape in SHAPES:
            batch = make_batch(TOY_SHAPES[shape] if options.toy else shape, 300, "last")
            for label, queries, fields in steps_of(shape):
                timed = partial(step_of, held, name, shape, batch, queries, fields)
                rows.measure(f"{name} {shape}: {label}", timed)
        held.clear()
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()


def hold(held: list[nn.Module], name: str, toy: bool) -> tuple[str, Found]:
    """Makes a model, and holds it for the steps to come."""
    held.append(build(name, toy))
    numel = sum(p.numel() for p in held[0].parameters())
    return f"{1e-9 * numel:.2f} G weights, made on the device", {"numel": numel}


def steps_of(shape: str) -> list[tuple[str, int, Found | None]]:
    """Returns the steps to time at a shape: label, Q and tezo fields; None: MeZO's loop."""
    return [
        *(
            (f"fused, r {rank}, Q {queries}", queries, {"rank": rank, "probe": "fused"})
            for queries in ((1, 8) if shape == MANY else (1,))
            for rank in (16, 64)
        ),
        ("in place, r 16, Q 1", 1, {"rank": 16, "probe": "inplace", "restore": "subtract"}),
        ("MeZO's loop, Q 1", 1, None),
        ("LOZO, r 2, Q 1", 1, {"method": "lozo"}),
    ]


def step_of(
    held: list[nn.Module], name: str, shape: str, batch: dict[str, torch.Tensor], queries: int,
    fields: Found | None,
) -> tuple[str, Found]:  # fmt: skip
    """Times the plain forward of as many sequences, and a step."""
    if not held:
        raise Skip("see its weights")
    (model,) = held
    engine = tezo_ds.initialize(
        model,
        {"lr": 1e-9, "queries": queries, "check_every": 0, **(fields or {"probe": "inplace"})},
    )
    engine.objective.first = None  # a forward more, once a run

    def step() -> None:
        if fields is None:
            mezo_step(engine, batch, queries, 1e-3, 0.0)
        else:
            engine.step(batch)

    def plain() -> object:
        return engine.objective(batch, 2 * queries)

    with torch.no_grad():
        found = {what: timing(run) for what, run in (("plain", plain), ("step", step))}
    (plain_s, plain_bytes), (step_s, step_bytes) = found["plain"], found["step"]
    tokens = batch["input_ids"].numel() * 2 * queries
    numel, peak = sum(p.numel() for p in model.parameters()), peak_flops()
    least = None if peak is None else 2 * numel * tokens / peak
    numbers: Found = {
        "seconds": step_s, "plain_seconds": plain_s, "ratio": step_s / plain_s, "tokens": tokens,
        "tokens_per_second": tokens / step_s, "physical_limit": least,
        "share_of_peak": None if least is None else least / step_s,
        "bytes_over_inference": step_bytes - plain_bytes, "published": PUBLISHED.get((name, shape)),
    }  # fmt: skip
    told = f"{step_s:.4g} s, {step_s / plain_s:.3f} × plain, {tokens / step_s:,.0f} tokens/s"
    if least is not None:
        told += f", {least / step_s:.0%} of peak"
    return f"{told}, {1e-6 * (step_bytes - plain_bytes):+,.0f} MB", numbers


def timing(run: Callable[[], object]) -> tuple[float, int]:
    """Returns the median of some runs' seconds, and the peak of allocated bytes; the first is not timed."""
    device = torch.accelerator.is_available()
    taken, live = [], LiveBytes()
    for turn in range(BEFORE + ROUNDS):
        if turn == BEFORE and device:
            torch.accelerator.reset_peak_memory_stats()
        settle()
        start = time.perf_counter()
        if not device and turn == 0:
            with live:  # which takes time
                run()
        else:
            run()
        settle()
        if turn >= BEFORE:
            taken.append(time.perf_counter() - start)
    peak = torch.accelerator.max_memory_allocated() if device else live.peak
    return statistics.median(taken), int(peak)
