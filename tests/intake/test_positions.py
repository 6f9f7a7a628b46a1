"""Lengths of examples against tables of positions, of the models that have any."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import WORDS, Given, Run, call
from tiny import tiny
from torch import nn

from tezo_ds.intake.positions import fitting_length, position_tables

pytest_plugins = ("cli_fixtures",)

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 12, "max_position_embeddings": 20,
}  # fmt: skip
BOUNDED: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"n_positions": 20},
    "OPTForCausalLM": {"word_embed_proj_dim": 8, "ffn_dim": 12},
    "GPTNeoForCausalLM": {"num_layers": 1, "attention_types": [[["global"], 1]]},
    "GPTBigCodeForCausalLM": {"n_positions": 20},
    "GPTJForCausalLM": {"n_positions": 20, "rotary_dim": 2},
    "BioGptForCausalLM": {},
    "BertForMaskedLM": {},
    "RobertaForMaskedLM": {},
    "ElectraForMaskedLM": {"embedding_size": 8},
    "DistilBertForMaskedLM": {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 12},
    "MPNetForMaskedLM": {},
}


def made(name: str, more: dict[str, Any]) -> nn.Module:
    kind = getattr(transformers, name)
    names = kind.config_class().to_dict().keys() | set(kind.config_class.attribute_map)
    sizes = {key: value for key, value in SIZES.items() if key in names}
    model: nn.Module = kind(kind.config_class(**{**sizes, **more})).eval()
    return model


@pytest.mark.parametrize("name", BOUNDED)
def test_the_limit_is_the_longest_text_that_a_model_takes(name: str) -> None:
    model = made(name, BOUNDED[name])
    limit = fitting_length(model, 512)
    assert limit <= 20
    ids = torch.full((1, limit + 1), 7)
    with torch.no_grad():
        model(input_ids=ids[:, :-1], attention_mask=torch.ones_like(ids[:, :-1]))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("kind", ["llama", "neox", "mixtral"])
def test_models_without_a_table_have_no_limit(kind: str) -> None:
    assert not dict(position_tables(tiny(kind)))
    assert fitting_length(tiny(kind), 512) == 512


def test_positions_of_images_are_no_limit_to_texts() -> None:
    model = tiny()
    tables = {"GPT2LMHeadModel": {}, "GPTJForCausalLM": {"rotary_dim": 2}}  # a layer, a buffer
    for name, more in tables.items():
        model.vision_tower = made(name, {"n_positions": 20, **more})
        assert dict(position_tables(model.vision_tower)) and not dict(position_tables(model))


def test_a_length_that_fits_is_kept_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert [fitting_length(tiny("gpt2"), n) for n in (16, 64)] == [16, 64]
        assert not caplog.records
        assert fitting_length(tiny("gpt2"), 65) == 64
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "--max-length 65: the model has 64 positions (transformer.w"
    )


def test_long_prompts_are_cut_to_the_positions(
    given: Given,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A run with the default length gives what one with the model's own gives."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 24}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=len(tokenizer), **sizes)
    )
    for folder in (model, tokenizer):
        folder.save_pretrained(tmp_path / "model")
    rows = [
        {"text": f"film {i} " + "and so on " * 20, "label": list(WORDS)[i % 3]} for i in range(30)
    ]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    long = Given(tmp_path / "model", tmp_path / "long.jsonl")
    assert call(*long.train(tmp_path / "asked", max_length=24)) == 0
    capfd.readouterr()
    assert call(*long.train(tmp_path / "default")) == 0
    assert "the model has 24 positions" in caplog.text
    assert "training prompts cut to 24 tokens" in capfd.readouterr().out
    ours, theirs = Run(tmp_path / "default"), Run(tmp_path / "asked")
    assert [line["kappa"] for line in ours.steps] == [line["kappa"] for line in theirs.steps]
    assert ours.summary["test_loss_after"] == theirs.summary["test_loss_after"]
    assert call("evaluate", "--run", ours.path) == 0
    assert json.loads(capfd.readouterr().out)["loss"] == pytest.approx(
        ours.summary["test_loss_after"], rel=1e-6
    )
