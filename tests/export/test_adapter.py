"""The adapter of a run: loaded by peft, it is the very model that the run reached."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from command_line import Given, Run, call
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from tiny import make_batch, tiny
from trained import logits, trained
from transformers import AutoTokenizer

import tezo_ds
from tezo_ds.export.adapter import CHECKSUMS, not_to_merge, save_adapter
from tezo_ds.sharding import sharding_of

pytest_plugins = ("cli_fixtures",)


@pytest.mark.parametrize(
    ("kind", "tied", "exclude"),
    [
        ("llama", True, []),
        ("llama", False, []),
        ("llama", False, ["*embed*", "*lm_head*"]),
        ("opt", True, ["*embed_positions*"]),
        ("neox", False, []),
        ("gpt2", True, []),  # whose Conv1D keep their weights the other way round
        ("gpt2", False, []),
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


def with_ranks(ranks: dict[str, int]) -> tezo_ds.Engine:
    """Makes an engine at a result, some matrices of which have ranks of their own."""
    engine = tezo_ds.initialize(tiny(tied=False), {"rank": 1})
    chosen = {matrix.name: ranks.get(matrix.name, 2) for matrix in engine.space.matrices}
    config = tezo_ds.TezoConfig(rank="auto")
    engine = tezo_ds.Engine(sharding_of(tiny(tied=False)), config, None, ranks=chosen)
    engine.method.coefficients.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    return engine


def test_matrices_of_different_ranks_are_padded_to_one(tmp_path: Path) -> None:
    ranks = {"lm_head.weight": 5, "model.layers.1.mlp.up_proj.weight": 3}
    engine = with_ranks(ranks)
    save_adapter(engine, tmp_path / "adapter", "the base")
    merged = tiny(tied=False)
    merged.load_state_dict(engine.state_dict())
    adapted = PeftModel.from_pretrained(tiny(tied=False), tmp_path / "adapter")
    layers = {n: m for n, m in adapted.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    assert {layer.r["default"] for layer in layers.values()} == {5}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    alpha_over_rank = {  # llama.cpp's scale of each pair: one alpha, over its own rank
        config["lora_alpha"] / (part.shape[0] if "_A" in name else part.shape[1])
        for name, part in tensors.items()
    }
    assert alpha_over_rank == {1.0}
    assert {layer.scaling["default"] for layer in layers.values()} == {1.0}
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=0, atol=1e-5)


def test_ended_periods_lie_side_by_side(tmp_path: Path) -> None:
    """Hazard: an adapter with the last period's factors alone would forget what earlier periods learnt."""
    fields = {"rank": 3, "lr": 3e-3, "refresh_every": 2, "seed": 5}
    engine = tezo_ds.initialize(tiny(), fields)
    for step in range(5):
        engine.step(make_batch(3, seed=step))
    save_adapter(engine, tmp_path / "adapter", "the base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 9
    reached = tiny()
    reached.load_state_dict(engine.state_dict())
    adapted = PeftModel.from_pretrained(tiny(), tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted), logits(reached), rtol=0, atol=1e-5)
    last = tezo_ds.initialize(tiny(), {**fields, "seed": 7})
    last.load_coefficients({name: rows[-1] for name, rows in engine.coefficients().items()})
    alone = tiny()
    alone.load_state_dict(last.state_dict())
    assert float((logits(alone) - logits(reached)).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("kind", "fields", "telling"),
    [
        # It looks up positions, not its first input.
        (
            "opt",
            {},
            "model.decoder.embed_positions.weight (weight of OPTLearnedPositionalEmbedding)",
        ),
        ("llama", {"train_vectors": True}, "layernorm.weight (5 such) is a vector, which has no"),
        ("llama", {"method": "tezo-adam"}, "what tezo-adam learns is no low-rank change"),
        ("llama", {"method": "lozo-m"}, "what lozo-m learns is no low-rank change"),
        ("llama", {"method": "mezo", "probe": "inplace"}, "what mezo learns is no low-rank change"),
    ],
)
def test_what_is_no_adapter_is_refused(
    kind: str, fields: dict, telling: str, tmp_path: Path
) -> None:
    engine = tezo_ds.initialize(tiny(kind), {"rank": 2, **fields})
    with pytest.raises(tezo_ds.ConfigError) as refused:
        save_adapter(engine, tmp_path / "adapter", "the base")
    assert telling in str(refused.value) and "\n" not in str(refused.value)
    assert "write the merged model (tezo-ds export --merged)" in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "old").touch()
    save_adapter(trained(tiny()), tmp_path / "adapter", "the base")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", CHECKSUMS}


def test_checksums_tell_what_peft_does_not(tmp_path: Path) -> None:
    save_adapter(trained(tiny()), tmp_path / "adapter", "the base")
    check = ["sha256sum", "--check", "--strict", "--quiet", CHECKSUMS]
    assert subprocess.run(check, cwd=tmp_path / "adapter").returncode == 0
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    bits = bytearray(file.read_bytes())
    bits[-3] ^= 4
    file.write_bytes(bits)
    PeftModel.from_pretrained(tiny(), tmp_path / "adapter")  # without a word
    assert subprocess.run(check, cwd=tmp_path / "adapter").returncode == 1


def test_what_is_tied_is_said_not_to_merge() -> None:
    for kind, tied, exclude, expected in (
        ("llama", True, [], "model.embed_tokens and lm_head are tied"),
        ("gpt2", True, [], "transformer.wte and lm_head are tied"),
        ("llama", True, ["*embed*"], None),
        ("llama", False, [], None),
    ):
        found = not_to_merge(trained(tiny(kind, tied), exclude))
        assert (found or "").startswith(expected or "") and bool(found) == bool(expected), kind


@pytest.mark.parametrize("tied", [True, False])
def test_pefts_merge_is_right_unless_it_is_warned_of(tied: bool, tmp_path: Path) -> None:
    engine = trained(tiny("llama", tied))
    save_adapter(engine, tmp_path / "adapter", "the base")
    reached = tiny("llama", tied, seed=1)
    reached.load_state_dict(engine.state_dict())
    merged = PeftModel.from_pretrained(tiny("llama", tied), tmp_path / "adapter").merge_and_unload()
    off = float((logits(merged) - logits(reached)).abs().max())
    assert (off > 0.01) == bool(not_to_merge(engine)) == tied


def test_a_folder_is_named_in_full_and_a_hubs_name_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    for given, expected in (("base", str(tmp_path / "base")), ("owner/base", "owner/base")):
        save_adapter(trained(tiny()), tmp_path / "adapter", given)
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == expected


def test_a_run_puts_its_tokenizer_and_a_warning_beside_the_adapter(
    given: Given, plain: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call("export", "--run", plain.path, "--adapter", tmp_path / "adapter") == 0
    assert "warning: model.embed_tokens and lm_head are tied" in capfd.readouterr().out
    base = AutoTokenizer.from_pretrained(given.model)
    for folder in (plain.path / "adapter", tmp_path / "adapter"):
        found = AutoTokenizer.from_pretrained(folder)
        assert found("film 3 felt odd") == base("film 3 felt odd")
        assert "merge_and_unload" in (folder / "README.md").read_text()
    assert call(*given.train(tmp_path / "run", steps=1)) == 0
    assert "the adapter: model.embed_tokens and lm_head are tied" in capfd.readouterr().out
    assert call(*given.train(tmp_path / "free", steps=1, exclude="*embed*")) == 0
    assert "merge" not in capfd.readouterr().out
    assert "merge" not in (tmp_path / "free" / "adapter" / "README.md").read_text()
