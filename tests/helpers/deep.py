"""Tiny models of several blocks, of which the late ones train."""

from __future__ import annotations

from unittest import mock

import tiny as shapes
import torch
from tiny import make_batch, tiny
from torch import Tensor, nn

import tezo_ds

LAYERS = 4
LATE = ("*.2.*", "*.3.*")  # the last two of four blocks
FIELDS = {"rank": 3, "rho": 1e-2, "lr": 1e-3, "queries": 2, "seed": 5, "include": LATE}

WHOLE = {"shared_trunk": False}  # forwards that are not split
BEHIND = {  # what follows the last block's attention, from its last map on
    "llama": ("*.3.self_attn.o_proj*", "*.3.mlp*", "*.3.post*", "model.norm*", "lm_head*"),
    "opt": ("*.3.self_attn.out_proj*", "*.3.fc*", "*.3.final*", "*decoder.final*"),
    "neox": ("*.3.attention.dense*", "*.3.mlp*", "*.3.post*", "*final*", "embed_out*"),
    "gpt2": ("*.h.1.attn.c_proj*", "*.h.1.mlp*", "*.h.1.ln_2*", "*ln_f*"),
    "qwen-moe": ("*.3.self_attn.o_proj*",),
}


def deep(kind: str = "llama", tied: bool = True, layers: int = LAYERS) -> nn.Module:
    """Makes a tiny model of several blocks."""
    with mock.patch.dict(shapes.SIZES, num_hidden_layers=layers):
        return tiny(kind, tied)


def engine_of(model: nn.Module, **fields: object) -> tezo_ds.Engine:
    """Makes an engine that trains a model's late blocks."""
    engine = tezo_ds.initialize(model, {**FIELDS, **fields})
    engine.objective.first = None  # the forward that compares losses, once a run, is no step's
    return engine


def data(examples: int = 9, length: int = 11) -> dict[str, Tensor]:
    """Makes a data set, padded on the right, few of whose positions carry a label."""
    batch = make_batch(examples, length=length)
    batch["labels"][:, :4] = -100
    return batch


def numbered(rows: list[int], everything: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Returns a batch of some examples of `data`, cut to their longest and with their numbers."""
    everything = everything or data()
    longest = int(everything["attention_mask"][rows].sum(dim=1).max())
    batch = {name: tensor[rows, :longest] for name, tensor in everything.items()}
    return {**batch, "example_ids": torch.tensor(rows)}


# Twice each, in other company but at the same place of their steps, and so on the same rank.
VISITS = ([0, 1, 2], [3, 4, 5], [6, 7, 8], [3, 1, 8], [0, 7, 2], [6, 4, 5])


def steps(engine: tezo_ds.Engine, numbers: bool = False) -> list[tezo_ds.StepReport]:
    """Returns the reports of six steps, which visit each example twice."""
    batches = [numbered(rows) for rows in VISITS]
    if not numbers:
        batches = [{k: v for k, v in b.items() if k != "example_ids"} for b in batches]
    return [engine.step(batch) for batch in batches]


def assert_alike(ours: list[tezo_ds.StepReport], theirs: list[tezo_ds.StepReport]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(a.kappa, b.kappa, rtol=5e-3, atol=5e-3)
