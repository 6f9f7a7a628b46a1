"""Fingerprint of a model's weights: other weights give another, the same weights the same, however split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny
from torch import nn

from tezo_ds.intake import weights
from tezo_ds.intake.weights import fingerprint


@pytest.fixture
def model() -> nn.Module:
    return tiny("llama", tied=False)


def saved(folder: Path, model: nn.Module, **options: object) -> str:
    model.save_pretrained(folder, **options)
    found = fingerprint(str(folder))
    assert found is not None
    return found


def test_same_weights_split_otherwise_are_the_same(model: nn.Module, tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole", model)
    assert saved(tmp_path / "parts", model, max_shard_size="20KB") == whole
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    (tmp_path / "parts" / "consolidated.safetensors").write_bytes(b"not loaded")
    assert fingerprint(str(tmp_path / "parts")) == whole


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
def test_a_tensor_that_changed_shows(name: str, model: nn.Module, tmp_path: Path) -> None:
    before = saved(tmp_path / "model", model)
    with torch.no_grad():
        model.get_parameter(name).add_(1e-3)
    assert saved(tmp_path / "model", model) != before


@pytest.mark.parametrize("change", ["values", "dtype", "name", "shape"])
def test_files_that_differ_in_one_thing_show(change: str, model: nn.Module, tmp_path: Path) -> None:
    before = saved(tmp_path, model)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    same_bytes = {"dtype": head.view(torch.int32), "name": head, "shape": head.t().reshape(22, 61)}
    changed = same_bytes.get(change, head + 1)
    tensors["head.weight" if change == "name" else "lm_head.weight"] = changed.contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    assert fingerprint(str(tmp_path)) != before


def test_torch_files_show_one_element(model: nn.Module, tmp_path: Path) -> None:
    """Hazard: samples alone could miss it; torch's checksums of tensors, at the end of the file, do not."""
    big = {"weight": torch.zeros(4 << 20)}
    torch.save(big, tmp_path / "pytorch_model.bin")
    before = fingerprint(str(tmp_path))
    big["weight"][1234567] = 1
    torch.save(big, tmp_path / "pytorch_model.bin")
    assert before is not None and fingerprint(str(tmp_path)) != before
    index = {"weight_map": {"weight": "pytorch_model-1.bin"}}
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "pytorch_model-1.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert fingerprint(str(tmp_path)) not in (None, before)


def test_samples_alone_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"weight": torch.zeros(8 << 20)}, tmp_path / "model.safetensors")
    sizes: list[int] = []
    at = weights._at
    monkeypatch.setattr(weights, "_at", lambda *a: (sizes.append(a[2]), at(*a))[1])
    assert fingerprint(str(tmp_path)) is not None
    assert 0 < sum(sizes) <= 4096


def test_a_hubs_model_is_looked_up_in_the_cache(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = saved(tmp_path / "snapshots", model)
    config = str(tmp_path / "snapshots" / "config.json")
    monkeypatch.setattr(weights, "try_to_load_from_cache", lambda *_: config)
    assert fingerprint("owner/name") == expected


@pytest.mark.parametrize("name", ["no/such", "not/a/hub/name", "."])
def test_what_holds_no_weights_has_none(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fingerprint(name) is None
