"""Runs of adapters from the command line: evaluated, replayed, exported, and loaded into a plain model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import STEPS, Given, Run, call
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import tiny
from trained import logits
from transformers import AutoModelForCausalLM

import tezo_ds
from tezo_ds.adapters.loading import CONFIG, TENSORS
from tezo_ds.export.adapter import save_adapter
from tezo_ds.run.folder import ADAPTER

pytest_plugins = ("cli_fixtures",)

Captured = pytest.CaptureFixture[str]
TT = {"adapter": "tt", "bottleneck": 6, "tt_init": "published", "lr": 3e-2, "rank": None}
LORA = {"adapter": "lora", "rank": 3, "lr": 3e-2}
KINDS = {"tt": {**TT, "method": "tezo-m"}, "lora": {**LORA, "method": "tezo-adam-coef"}}


@pytest.fixture(scope="module")
def runs(given: Given, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A finished run of each kind."""
    made = {}
    for kind, options in KINDS.items():
        path = tmp_path_factory.mktemp("adapters") / kind
        assert call(*given.train(path, check_every=2, **options)) == 0
        made[kind] = Run(path)
    return made


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 16)[None]).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_evaluated_and_replayed(
    runs: dict[str, Run], kind: str, tmp_path: Path, capsys: Captured
) -> None:
    run, made = runs[kind], tmp_path / "made.safetensors"
    assert call("evaluate", "--run", run.path) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == pytest.approx(run.summary["test_loss_after"], abs=1e-6)
    assert found["loss"] != pytest.approx(run.summary["test_loss_before"], abs=1e-6)
    assert call("replay", run.path, "--verify", "--coefficients", made) == 0
    assert "3 digests agree" in capsys.readouterr().out
    ours, theirs = load_file(made), run.coefficients
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_in_a_plain_model_is_what_the_run_reached(
    given: Given, runs: dict[str, Run], kind: str, tmp_path: Path, capsys: Captured
) -> None:
    run, exported = runs[kind], tmp_path / "exported"
    assert call("export", "--run", run.path, "--adapter", exported) == 0
    assert ("warning: tensor trains with a nonlinearity" in capsys.readouterr().out) == (
        kind == "tt"
    )
    engine = tezo_ds.initialize(
        AutoModelForCausalLM.from_pretrained(given.model), Run(run.path).config["tezo"]
    )
    engine.load_coefficients(run.coefficients)
    with engine.applied():
        expected = logits_of(engine.sharding.module)
    for folder in (run.path / ADAPTER, exported):
        model = AutoModelForCausalLM.from_pretrained(given.model)
        before = logits_of(model)
        if kind == "tt":
            assert tezo_ds.adapters.load(model, folder) is model
        else:
            model = PeftModel.from_pretrained(model, folder)
        torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-5)
        assert (before - expected).abs().max() > 1e-3
        card = (folder / "README.md").read_text()
        assert ("tensor-train adapter" in card) == (kind == "tt")
        assert f"library_name: {'tezo_ds' if kind == 'tt' else 'peft'}" in card


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_merged_is_said_at_once(
    given: Given, runs: dict[str, Run], kind: str, tmp_path: Path, capsys: Captured
) -> None:
    path, merged = runs[kind].path, tmp_path / "merged"
    for arguments in (
        ("export", "--run", path, "--merged", merged),
        ("replay", path, "--merged", merged),
        given.train(tmp_path / "run", save_model=True, **KINDS[kind]),
    ):
        assert call(*arguments) == 2
        error = capsys.readouterr().err
        assert "merge" in error and error.count("\n") == 1, error
    assert not merged.exists()


@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
@pytest.mark.parametrize(
    "fields", [{"adapter": "tt", "adapter_sites": "mlp", "tt_act": "tanh"}, {"adapter": "lora"}]
)
def test_other_architectures(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    engine = tezo_ds.initialize(tiny(kind), {**fields, "tt_init": "published", "bottleneck": 6})
    generator = torch.Generator().manual_seed(0)
    learnt = {k: torch.randn(len(v), generator=generator) for k, v in engine.coefficients().items()}
    engine.load_coefficients(learnt)
    with engine.applied():
        expected = logits(engine.sharding.module)
    save_adapter(engine, tmp_path / "adapter", "the base")
    if fields["adapter"] == "tt":
        model = tezo_ds.adapters.load(tiny(kind), tmp_path / "adapter")
    else:
        model = PeftModel.from_pretrained(tiny(kind), tmp_path / "adapter")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    with_grad = logits.__wrapped__(
        model
    )  # hazard: parts of a result may not be written where grad is on
    torch.testing.assert_close(with_grad.detach(), expected, rtol=1e-4, atol=1e-4)
    if fields["adapter"] == "tt":
        with_grad.square().sum().backward()
        assert model.get_input_embeddings().weight.grad.any()
        half = tiny(kind).to(torch.bfloat16)
        assert logits(tezo_ds.adapters.load(half, tmp_path / "adapter")).dtype == torch.bfloat16


def test_what_cannot_be_loaded_is_said(runs: dict[str, Run], tmp_path: Path) -> None:
    written, copy = runs["tt"].path / ADAPTER, tmp_path / "copy"
    with pytest.raises(tezo_ds.ConfigError, match="which this one lacks"):
        tezo_ds.adapters.load(tiny("opt"), written)
    with pytest.raises(tezo_ds.ConfigError, match=f"no {CONFIG}"):
        tezo_ds.adapters.load(tiny(), runs["lora"].path / ADAPTER)
    shutil.copytree(written, copy)
    tensors = load_file(copy / TENSORS)
    next(iter(tensors.values()))[0] += 1
    save_file(tensors, copy / TENSORS)
    with pytest.raises(tezo_ds.StorageError, match="does not have its checksum"):
        tezo_ds.adapters.load(tiny(), copy)
    other = json.loads((copy / CONFIG).read_text()) | {"format": "another"}
    (copy / CONFIG).write_text(json.dumps(other))
    with pytest.raises(tezo_ds.ConfigError, match="is not of"):
        tezo_ds.adapters.load(tiny(), copy)


def test_vectors_beside_have_no_place_in_the_file(given: Given, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert call(*given.train(run, steps=1, train_vectors=True, **KINDS["tt"])) == 0
    assert "leave train_vectors off" in Run(run).summary["adapter"] and STEPS > 1
    assert not (run / ADAPTER).exists()
    assert any(name.endswith("norm.weight") for name in Run(run).coefficients)
