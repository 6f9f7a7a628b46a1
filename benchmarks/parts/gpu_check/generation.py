"""Pace of generation with the coefficients of a run applied, over that of the plain model."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tezo_ds
from parts.common.backends import settle
from parts.gpu_check.rows import Found, Options, Rows
from tezo_ds.sharding.world import local_device

BATCHES, ROUNDS = (1, 16), 3
PROMPT = "What is the capital of France? Answer in one word:"


def run(rows: Rows, options: Options) -> None:
    """Measures some batch sizes."""
    for batch in BATCHES:
        rows.measure(f"{batch} texts at a time", partial(ratio, options, batch))


def ratio(options: Options, batch: int) -> tuple[str, Found]:
    """Times greedy generation, plain and with terms of rank 16 on all matrices, in turn."""
    folder, new = options.small_model(), 4 if options.toy else 64
    dtype = torch.float32 if options.toy else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(local_device())
    ids = AutoTokenizer.from_pretrained(folder)([PROMPT] * batch, return_tensors="pt").input_ids
    engine = tezo_ds.initialize(model, {"rank": 16, "probe": "fused"})
    engine.method.coefficients.normal_(std=1e-4, generator=torch.Generator().manual_seed(0))
    length = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    inputs = {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
    }

    def taken() -> float:
        settle()
        start = time.perf_counter()
        model.generate(**inputs, **length)
        settle()
        return time.perf_counter() - start

    plain, ours = [], []
    with torch.no_grad():
        for _ in range(1 + ROUNDS):
            plain.append(taken())
            with engine.applied():
                ours.append(taken())
    each = [statistics.median(seconds[1:]) for seconds in (plain, ours)]
    pace = [batch * new / seconds for seconds in each]
    told = f"{pace[1]:,.0f} tokens/s, {each[1] / each[0]:.3f} × the plain model's seconds"
    return told, {"tokens_per_second": pace[1], "plain": pace[0], "ratio": each[1] / each[0]}
