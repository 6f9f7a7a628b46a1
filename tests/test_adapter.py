"""The adapter of a run is, to peft, the very model that the run reached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from tiny import tiny
from trained import logits, trained

import tezo_ds
from tezo_ds.export import save_adapter


@pytest.mark.parametrize(
    ("kind", "tied", "exclude"),
    [
        ("llama", True, []),
        ("llama", False, []),
        ("llama", False, ["*embed*", "*lm_head*"]),
        ("opt", True, ["*embed_positions*"]),
        ("neox", False, []),
        ("roberta", True, ["*token_type*"]),
    ],
)
def test_peft_gives_the_logits_of_the_merged_model(
    kind: str, tied: bool, exclude: list[str], tmp_path: Path
) -> None:
    engine = trained(tiny(kind, tied), exclude)
    save_adapter(engine, tmp_path / "adapter", "the base")
    merged = tiny(kind, tied, seed=1)
    merged.load_state_dict(engine.state_dict())
    adapted = PeftModel.from_pretrained(tiny(kind, tied), tmp_path / "adapter")
    assert float((logits(merged) - logits(tiny(kind, tied))).abs().max()) > 0.3
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_adapter_covers_exactly_the_modules_that_train(tied: bool, tmp_path: Path) -> None:
    engine = trained(tiny("llama", tied), ["*mlp*"])
    save_adapter(engine, tmp_path / "adapter", "the base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    layers = [
        f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in ("q", "k", "v", "o")
    ]
    expected = {"model.embed_tokens", "lm_head", *layers}  # tied: one matrix, used by two modules
    assert set(config["target_modules"]) == expected
    assert len(config["target_modules"]) == len(expected)
    assert config["base_model_name_or_path"] == "the base"
    assert config["r"] == config["lora_alpha"] == 3
    adapted = PeftModel.from_pretrained(tiny("llama", tied), tmp_path / "adapter").base_model.model
    assert {n for n, m in adapted.named_modules() if isinstance(m, LoraLayer)} == expected


def test_a_masked_model_has_no_task_type(tmp_path: Path) -> None:
    for kind, expected in (("roberta", None), ("llama", "CAUSAL_LM")):
        save_adapter(trained(tiny(kind)), tmp_path / kind, "the base")
        config = json.loads((tmp_path / kind / "adapter_config.json").read_text())
        assert config["task_type"] == expected


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("opt", "model.decoder.embed_positions.weight"),  # looks up positions, not its first input
        ("gpt2", "transformer.h.0.attn.c_attn.weight"),  # a Conv1D
    ],
)
def test_what_peft_would_misread_is_refused(kind: str, name: str, tmp_path: Path) -> None:
    engine = trained(tiny(kind))
    with pytest.raises(tezo_ds.ConfigError) as refused:
        save_adapter(engine, tmp_path / "adapter", "the base")
    assert str(refused.value).startswith(f"{name} (")
    assert "has no place in a LoRA adapter; exclude it" in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "old").touch()
    save_adapter(trained(tiny()), tmp_path / "adapter", "the base")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
