"""Weights that stay in their files while late layers train: what a cached step has read of them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import larger_than_memory
import pytest
import torch
from larger_than_memory import train
from parts.larger_than_memory import mapped_weights
from parts.larger_than_memory.mapped_weights import give_back, pages_of, read_ahead
from parts.larger_than_memory.random_checkpoint import write_random
from tiny import make_batch
from transformers import LlamaConfig

import tezo_ds
from tezo_ds.models.loading import load_model
from tezo_ds.models.structure import blocks
from tezo_ds.plan.shapes import skeleton
from tezo_ds.trunk.trunk import EXAMPLE_IDS

LAYERS, LATE = 5, 2
KINDS = ["plain", "first", "cached"]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def weights(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a checkpoint whose embedding, output layer and blocks are of many pages each, a file each."""
    folder = tmp_path_factory.mktemp("shape")
    LlamaConfig(
        vocab_size=701, hidden_size=208, intermediate_size=515, num_hidden_layers=LAYERS,
        num_attention_heads=4, tie_word_embeddings=request.param, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    write_random(skeleton(str(folder), "auto"), folder / "random")  # type: ignore[arg-type]
    return folder / "random"


@pytest.fixture(autouse=True)
def nothing_left_mapped() -> Iterator[None]:
    """Frees the models of earlier tests, which refer to themselves."""
    yield
    gc.collect()


def batch() -> dict[str, Any]:
    return {**make_batch(3), EXAMPLE_IDS: torch.arange(3)}


def resident(folder: Path) -> dict[str, float]:
    """Returns the share of each file's pages that is in this process's memory, in the weights' order."""
    files = sorted(folder.glob("*.safetensors"))
    shares = [pages_of(file, "Rss") / file.stat().st_size for file in files]
    names = ["embedding", *range(LAYERS), "norm", "head"]
    return {str(name): share for name, share in zip(names, shares, strict=False)}


def test_a_cached_step_reads_late_blocks_and_what_follows(weights: Path) -> None:
    """The output layer needs all of a tied embedding; of an untied one a cached step needs no page."""
    model = load_model(str(weights))
    early = [str(number) for number in range(LAYERS - LATE)]
    late = [str(number) for number in range(LAYERS - LATE, LAYERS)]
    tied = model.config.tie_word_embeddings  # type: ignore[union-attr]
    fields = {"rho": 1e-2, "include": [f"last:{LATE}"], "rank": 2}
    cached = tezo_ds.initialize(model, {**fields, "trunk_cache": "memory"})
    plain = tezo_ds.initialize(model, fields)
    for engine in (cached, plain):
        engine.step(batch())
        give_back(model)
        assert sum(resident(weights).values()) == 0
        engine.step(batch())
        found = resident(weights)
        everything = [*late, "norm", "embedding" if tied else "head"]
        everything += early if engine is plain else []
        assert min(found[name] for name in everything) > 0.9, found
        if engine is cached:
            assert {found[name] for name in early} == {0.0}, found
            assert tied or found["embedding"] == 0, found
        else:
            assert found["embedding"] > 0, found


def test_reading_ahead_asks_for_the_block_that_comes_next(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(weights))
    addresses = {
        mapped_weights.extents(block)[0].address: n for n, block in enumerate(blocks(model))
    }
    asked: list[int] = []
    monkeypatch.setattr(
        mapped_weights, "_ask", lambda its, _: asked.append(addresses[its[0].address])
    )
    fields = {"rho": 1e-2, "include": [f"last:{LATE}"], "trunk_cache": "memory", "rank": 2}
    engine = tezo_ds.initialize(model, fields)
    engine.objective.first = None  # the forward that compares losses, once a run, is no step's
    engine.settle(batch())
    with read_ahead(engine):
        for _ in range(3):
            engine.step(batch())
    # the first cached step shows, at its beginning, that after the last block comes the first late one
    assert asked == [1, 2, 3, 4, 0, 4, 3, 4, 3], asked


def test_the_benchmark_of_visits(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {
        way: train(weights, way, 2, "3x7", 2, f"last:{LATE}") for way in larger_than_memory.PAGES
    }
    for run in runs.values():
        assert [step["kind"] for step in run["steps"]] == KINDS
        first = [(step["loss"], step["kappa"]) for step in run["steps"]]
        assert first == [(s["loss"], s["kappa"]) for s in runs["memory"]["steps"]]
    plain, filling, cached = (step["pages"] for step in runs["kernel"]["steps"])
    blocks_share = (LAYERS - LATE) / LAYERS
    assert plain == filling and 0.5 * blocks_share < 1 - cached / plain < blocks_share
    words = ["larger_than_memory.py", "--folder", str(weights), "--include", f"last:{LATE}"]
    monkeypatch.setattr(sys, "argv", [*words, "--pages", "kernel", "ahead"])
    monkeypatch.setattr(larger_than_memory, "in_new_process", lambda _, way: runs[way])
    larger_than_memory.main()
    printed = capsys.readouterr().out
    assert all(f"| {way} | {kind} | " in printed for way in ("kernel", "ahead") for kind in KINDS)
