"""Weights of 4 and 8 bits: slopes against the dequantised model's, and a step over a plain forward."""

from __future__ import annotations

import statistics
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from step_overhead import make_batch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tezo_ds
from parts.common.backends import settle
from parts.gpu_check.rows import Found, Options, Rows, Skip
from tezo_ds.models.loading import load_model
from tezo_ds.quantised.loading import PACKAGES
from tezo_ds.quantised.packed import packed_weights

LARGEST = 0.25  # error of bfloat16 slopes, in root mean square
ROUNDS = 3


def run(rows: Rows, options: Options) -> None:
    """Checks and measures each form whose library is there."""
    folder = options.work / "plain"
    _save(folder, options.toy)
    for form in PACKAGES:
        rows.check(f"{form}: slopes", partial(slopes, folder, form, options.toy))
        rows.measure(f"{form}: a step", partial(step, folder, form))


def _save(folder: Path, toy: bool) -> None:
    hidden = 64 if toy else 1024
    config = LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, initializer_range=0.05,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def _loaded(folder: Path, form: str) -> nn.Module:
    if find_spec(PACKAGES[form]) is None:
        raise Skip(f"{PACKAGES[form]} is not there")
    return load_model(str(folder), "bfloat16", load_in=form).eval()


def _engine(model: nn.Module) -> tezo_ds.Engine:
    return tezo_ds.initialize(model, {"rank": 16, "queries": 8, "rho": 1e-2, "lr": 1e-9})


def _batch(model: Any, shape: str) -> dict[str, torch.Tensor]:
    return {name: part.to(model.device) for name, part in make_batch(shape, 512, "all").items()}


def slopes(folder: Path, form: str, toy: bool) -> str:
    """Compares κ in bfloat16 beside packed weights with κ in float64 of a model that holds them unpacked."""
    model = _loaded(folder, form)
    batch = _batch(model, "2x9" if toy else "8x64")
    found = torch.tensor(_engine(model).step(batch).kappa)
    for weight in packed_weights(model).values():
        plain = nn.Linear(
            weight.shape[1], weight.shape[0], bias=False, device=batch["labels"].device
        )
        plain.weight.data = weight.dequantised()
        model.set_submodule(weight.path, plain)
    wanted = torch.tensor(_engine(model.double()).step(batch).kappa)
    error = float((found - wanted).norm() / wanted.norm())
    assert error < LARGEST, f"κ is {error:.1%} off"
    return f"κ within {error:.2%} of the dequantised model's in float64"


def step(folder: Path, form: str) -> tuple[str, Found]:
    """Times a step and a plain forward of as many sequences, in turn."""
    model = _loaded(folder, form)
    packed = packed_weights(model).values()
    bits = 8 * sum(w.nbytes for w in packed) / sum(w.shape.numel() for w in packed)
    engine, batch = _engine(model), _batch(model, "4x32")
    taken: list[list[float]] = [[], []]
    for _ in range(1 + ROUNDS):
        for seconds, act in zip(
            taken, (lambda: engine.objective(batch, 16), lambda: engine.step(batch)), strict=True
        ):
            settle()
            start = time.perf_counter()
            act()
            settle()
            seconds.append(time.perf_counter() - start)
    plain, ours = (statistics.median(seconds[1:]) for seconds in taken)
    told = f"{bits:.2f} bits a weight, {ours / plain:.3f} × a plain forward"
    return told, {"bits": bits, "seconds": ours, "plain": plain, "ratio": ours / plain}
