"""Checkpoints that are quantised already load as they are, or unpacked, which is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_batch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import tezo_ds
from tezo_ds.models.loading import load_model
from tezo_ds.quantised import loading

CONFIG = {"rank": 3, "rho": 1e-2, "lr": 1e-3}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of sizes that formats need."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.1, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("plain")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(make_batch(3)["input_ids"]).logits
    return found


@pytest.mark.parametrize("load_in", ["int8", "4bit", "8bit"])
def test_a_quantised_checkpoint_loads_as_it_is(plain: Path, tmp_path: Path, load_in: str) -> None:
    pytest.importorskip(loading.PACKAGES[load_in])
    model: Any = load_model(str(plain), "float32", load_in=load_in)
    model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    assert torch.equal(logits(again), logits(model))
    engine = tezo_ds.initialize(again, CONFIG)
    assert len(engine.sharding.packed) == 7
    assert engine.step(make_batch(4)).loss > 0
    with pytest.raises(
        tezo_ds.ConfigError, match=r"quantised already .* contradicts; leave --load-in out"
    ):
        load_model(str(tmp_path), load_in="int8")


def packed_in_fours(plain: Path, folder: Path) -> None:
    """Writes a checkpoint of compressed-tensors: 8 numbers of 4 bits in an int32, a scale for 32."""
    shutil.copytree(plain, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        weight, path = tensors.pop(name), name.removesuffix(".weight")
        groups = weight.view(len(weight), -1, 32)
        scale = groups.abs().amax(-1) / 7
        numbers = (groups / scale[..., None]).round().view(len(weight), -1, 8).to(torch.int64) + 8
        words = (numbers << torch.arange(0, 32, 4)).sum(-1)
        tensors[f"{path}.weight_packed"] = words.to(torch.int32)
        tensors[f"{path}.weight_scale"] = scale
        tensors[f"{path}.weight_shape"] = torch.tensor(weight.shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    numbers = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
    }
    group = {"targets": ["Linear"], "weights": numbers, "format": "pack-quantized"}
    with_form(folder, {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "quantization_status": "compressed", "config_groups": {"group_0": group},
    })  # fmt: skip


def with_form(folder: Path, about: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": about}))


def test_what_no_layer_keeps_packed_is_unpacked(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("compressed_tensors")
    packed_in_fours(plain, tmp_path / "packed")
    model = load_model(str(tmp_path / "packed"))
    assert "(compressed-tensors) were unpacked as they loaded" in caplog.text
    engine = tezo_ds.initialize(model, {**CONFIG, "method": "lozo"})  # plain weights may be written
    assert not engine.sharding.packed and engine.step(make_batch(4)).loss > 0
    base = AutoModelForCausalLM.from_pretrained(plain)
    for name, weight in base.named_parameters():
        if "_proj" in name:
            error = (model.get_parameter(name) - weight).abs().amax()
            assert 0 < error < weight.abs().max() / 12  # half a step of 4 bits


BAD: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "fbgemm_fp8"}, "requires a GPU"),
    ({"quant_method": "spqr"}, "GPU is required"),
    (
        {"quant_method": "gptq"},
        "its config.json is not whole",
    ),  # as without its quantize_config.json
    ({"bits": 4}, "quant_method"),
    ({"quant_method": "awq", "bits": 4}, "pip install gptqmodel"),
]


@pytest.mark.parametrize(("about", "why"), BAD, ids=str)
def test_what_cannot_be_loaded_is_said_in_one_line(
    plain: Path, tmp_path: Path, about: dict[str, Any], why: str
) -> None:
    shutil.copytree(plain, tmp_path / "odd")
    with_form(tmp_path / "odd", about)
    with pytest.raises(tezo_ds.ConfigError, match=why) as caught:
        load_model(str(tmp_path / "odd"))
    assert "damaged" not in str(caught.value) and "\n" not in str(caught.value)
    assert "package is missing" not in str(caught.value) or "pip install" in why


def test_a_gguf_file_is_made_a_folder_of_first() -> None:
    with pytest.raises(tezo_ds.ConfigError, match="a GGUF file; make a folder of it first"):
        load_model("models/tiny.Q4_K_M.gguf")


def test_forms_that_cannot_be_asked_for(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    with pytest.raises(tezo_ds.ConfigError, match="--dtype float64 contradicts --load-in int8"):
        load_model(str(plain), "float64", load_in="int8")
    block = {"zero_optimization": {"stage": 3}}
    with pytest.raises(tezo_ds.ConfigError, match="quantised, which ZeRO-3 does not shard"):
        load_model(str(plain), "float32", block, load_in="int8")
    config, gpu = LlamaConfig(), torch.device("cuda:0")
    with pytest.raises(ValueError, match="--dtype float32 contradicts --load-in int4"):
        loading.quantised_arguments("int4", config, torch.float32, gpu)
    with (
        pytest.raises(ValueError, match="does not load its form: HQQ"),
        loading.explained_forms(config),
    ):
        raise NotImplementedError("HQQ is not available yet")  # as transformers 5.23 says
    monkeypatch.setattr(loading, "find_spec", lambda _: None)
    with pytest.raises(tezo_ds.ConfigError, match="needs torchao, which is missing; pip install"):
        load_model(str(plain), load_in="int8")
