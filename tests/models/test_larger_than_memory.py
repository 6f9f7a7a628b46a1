"""Weights that stay in their files: what is in memory, equal runs, and the benchmark."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import larger_than_memory
import pytest
import torch
from larger_than_memory import markers, train
from parts.larger_than_memory import mapped_weights, random_checkpoint
from parts.larger_than_memory.mapped_weights import extents, pages_of, read_ahead
from parts.larger_than_memory.random_checkpoint import write_random
from tiny import make_batch
from torch import nn
from transformers import LlamaConfig

import tezo_ds
from tezo_ds.errors import ConfigError, StorageError
from tezo_ds.models.loading import load_model
from tezo_ds.plan.shapes import skeleton

LAYERS = 5
STEPS = 3


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a folder with the config.json of a model: 5 MB of weights, nearly all in blocks of many pages."""
    folder = tmp_path_factory.mktemp("shape")
    LlamaConfig(
        vocab_size=71, hidden_size=208, intermediate_size=515, num_hidden_layers=LAYERS,
        num_attention_heads=4, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def weights(shape: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "random"
    write_random(skeleton(str(shape), "auto"), folder)  # type: ignore[arg-type]
    return folder


@pytest.fixture(autouse=True)
def nothing_left_mapped() -> Iterator[None]:
    """Frees the models of earlier tests, which refer to themselves, so that none of their files stays
    mapped."""
    yield
    gc.collect()


def engine_of(model: nn.Module, **fields: Any) -> tezo_ds.Engine:
    return tezo_ds.initialize(model, {"rho": 1e-2, **fields})


def take_steps(engine: tezo_ds.Engine) -> list[tuple[float, ...]]:
    reports = [engine.step(make_batch(3, seed=step)) for step in range(STEPS)]
    return [(report.loss, *report.kappa) for report in reports]


def bytes_of(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def test_a_checkpoint_of_random_weights(weights: Path) -> None:
    model = load_model(str(weights))
    named = dict(model.named_parameters())
    first, second = (named[f"model.layers.{n}.self_attn.q_proj.weight"] for n in (0, 1))
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    for name, parameter in named.items():
        if parameter.dim() > 1:
            assert abs(parameter.float().std().item() / 0.02 - 1) < 0.05, name
        else:
            assert bool((parameter == 1).all()), name
    assert len(list(weights.glob("*.safetensors"))) == LAYERS + 3  # embedding, norm, output layer


def test_no_room(shape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    little = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=2 << 30))
    monkeypatch.setattr(random_checkpoint, "shutil", little)
    with pytest.raises(StorageError, match="GB free, and the weights take"):
        write_random(skeleton(str(shape), "auto"), tmp_path / "w")  # type: ignore[arg-type]
    assert not (tmp_path / "w").exists()


def test_weights_stay_in_their_files(weights: Path) -> None:
    """Weights stay in their files by default, from `load_model` on; a probe that writes copies every page."""
    model = load_model(str(weights))
    extents(model)  # would raise
    take_steps(engine_of(model))
    assert pages_of(weights, "Rss") > 0.9 * bytes_of(model)
    assert pages_of(weights, "Anonymous") == 0
    take_steps(engine_of(model, probe="inplace"))
    assert pages_of(weights, "Anonymous") > 0.9 * bytes_of(model)


def test_weights_of_another_dtype_are_copied(weights: Path) -> None:
    with pytest.raises(ConfigError, match=r"embed_tokens\.weight is in memory and not mapped"):
        extents(load_model(str(weights), dtype="float32"))


def test_pages_are_given_back(weights: Path) -> None:
    model = load_model(str(weights))
    engine = engine_of(model)
    losses = []
    with read_ahead(engine):
        losses += take_steps(engine)
    assert pages_of(weights, "Rss") < 0.3 * bytes_of(model)
    engine = engine_of(model)
    assert take_steps(engine) == losses
    assert pages_of(weights, "Rss") > 0.9 * bytes_of(model)  # without


def test_writes_are_refused(weights: Path) -> None:
    """Methods that write are refused: their writes to mapped weights would be lost, as the second half
    shows."""
    model = load_model(str(weights))
    for fields in ({"method": "mezo"}, {"probe": "inplace"}, {"method": "tezo-adam"}):
        with (
            pytest.raises(ConfigError, match="writes weights, which are mapped"),
            read_ahead(engine_of(model, **fields)),
        ):
            pass
    layer: Any = model.model.layers[1].mlp  # type: ignore[union-attr]
    before = layer.up_proj.weight.clone()
    layer.up_proj.weight.data.add_(1)
    assert not torch.equal(layer.up_proj.weight, before)
    pages = extents(layer)
    with open(pages[0].file, "rb") as file:
        mapped_weights._drop(pages, {pages[0].file: file.fileno()})
    assert torch.equal(layer.up_proj.weight, before)


def test_the_same_run_as_in_memory(weights: Path) -> None:
    """Losses, slopes and coefficients equal those in memory to the bit."""
    runs = [train(weights, pages, STEPS, "3x7", 4) for pages in ("memory", "kernel", "ahead")]
    for run in runs:
        assert run["anonymous"] > 0 and run["file"] > 0 and run["total"] >= run["anonymous"]
        assert run["weights"] == 2 * run["numel"]
        for step in run["steps"]:
            assert step.pop("seconds") > 0 and step.pop("read") >= 0
            assert all(step["kappa"]) and step["tokens"] == 21
        largest = [step["largest"] for step in run["steps"]]
        assert len({0.0, *largest}) == STEPS + 1
    assert runs[0]["steps"] == runs[1]["steps"] == runs[2]["steps"]


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that runs the benchmark's command, but without new processes."""

    def run(*given: object) -> None:
        monkeypatch.setattr(sys, "argv", ["larger_than_memory.py", *map(str, given)])
        monkeypatch.setattr(
            larger_than_memory, "in_new_process", lambda a, way: train(a.folder, way, 1, a.shape, 2)
        )
        larger_than_memory.main()

    return run


def test_the_command_writes_tables_and_takes_its_weights_away(
    shape: Path, tmp_path: Path, run_main: Any
) -> None:
    page, folder = tmp_path / "page.md", tmp_path / "w"
    begin, end = markers(folder)
    page.write_text(f"above\n{begin}\n{end}\nbelow\n")
    arguments = ("--model", shape, "--folder", folder, "--page", page)
    run_main(*arguments, "--keep")
    assert folder.is_dir()
    run_main(*arguments, "--pages", "kernel", "ahead")
    assert folder.is_dir()  # found there, so not ours
    text = page.read_text()
    assert text.startswith("above") and text.endswith("below\n")
    assert "| kernel | 1 | " in text and "| ahead | 1 | " in text
    new = tmp_path / "new"
    run_main("--model", shape, "--folder", new)
    assert not new.exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, run_main: Any) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(SystemExit, match="is there, and is no checkpoint"):
        run_main("--folder", tmp_path)
    assert (tmp_path / "thesis.tex").exists()
