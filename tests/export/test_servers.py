"""Adapters for vLLM and llama.cpp: by these servers' rules, restated here, they are the model of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Given, Run, call
from peft import PeftModel
from safetensors.torch import load_file
from tiny import tiny
from torch import nn
from trained import logits, trained

import tezo_ds
from tezo_ds.export import servers
from tezo_ds.export.adapter import save_adapter

pytest_plugins = ("cli_fixtures",)
RANKS = {1, 8, 16, 32, 64, 128, 256, 320, 512}  # vllm/config/lora.py, MaxLoRARanks
EMBEDDINGS = {"embed_tokens", "lm_head"}  # vllm/model_executor/models/llama.py, embedding_modules


def served(model: nn.Module, folder: Path, server: str) -> nn.Module:
    """Adds an adapter to a model as a server reads it: a key's last parts say what it is, and the module's
    name has to be a Linear's, or an embedding's that the architecture names. vLLM 0.33.0 has one scaling
    for all pairs, llama.cpp's file one alpha, over the rank that each pair is found to have."""
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    assert isinstance(config["r"], int) and config["bias"] == "none"
    assert config["r"] in RANKS or server != "vllm"
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    assert isinstance(config["target_modules"], list) and not config.get("modules_to_save")
    linear = {name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    pairs: dict[str, dict[bool, torch.Tensor]] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        parts = key.split(".")
        assert key.startswith("base_model.model.")
        if parts[-1] == "weight":
            assert parts[-2] in ("lora_A", "lora_B")
            path, is_inner = ".".join(parts[2:-2]), parts[-2] == "lora_A"
        else:
            assert parts[-1] in ("lora_embedding_A", "lora_embedding_B")
            path, is_inner = ".".join(parts[2:-1]), parts[-1] == "lora_embedding_A"
        assert path.split(".")[-1] in linear | EMBEDDINGS
        pairs.setdefault(path, {})[is_inner] = tensor
    tied = {}
    for path, pair in pairs.items():
        module = model.get_submodule(path)
        inner, outer = pair[True], pair[False]
        assert inner.shape[0] == outer.shape[1] <= config["r"]
        rank = config["r"] if server == "vllm" else inner.shape[0]
        change = (outer @ inner) * (config["lora_alpha"] / rank)
        is_lookup = isinstance(module, nn.Embedding)
        tied[path] = nn.Parameter(module.weight.data + (change.T if is_lookup else change))
    for path, weight in tied.items():  # each module its own, as vLLM adds on the side
        model.get_submodule(path).weight = weight
    return model


@pytest.mark.parametrize(
    ("kind", "tied", "config"),
    [
        ("llama", True, {"rank": 3}),
        ("llama", False, {"rank": 3, "exclude": ("*embed*", "*lm_head*")}),
        ("neox", False, {"rank": 9, "exclude": ("*embed*",)}),  # 16
        ("llama", False, {"adapter": "lora", "rank": 3}),  # whose alpha is not its rank
    ],
)
def test_padded_pairs_are_the_same_function(
    kind: str, tied: bool, config: dict[str, Any], tmp_path: Path
) -> None:
    engine = tezo_ds.initialize(tiny(kind, tied), config)
    engine.method.coefficients.add_(
        torch.randn(engine.space.numel, generator=torch.Generator().manual_seed(1)), alpha=0.02
    )
    save_adapter(engine, tmp_path / "peft", "the base")
    for server in servers.SERVERS if not tied else ("vllm",):
        save_adapter(engine, tmp_path / server, "the base", server=server, embeddings=True)
        plain, fitted = (
            PeftModel.from_pretrained(tiny(kind, tied), tmp_path / name)
            for name in ("peft", server)
        )
        assert float((logits(plain) - logits(tiny(kind, tied))).abs().max()) > 1e-2
        torch.testing.assert_close(logits(fitted), logits(plain), rtol=0, atol=1e-6)
        there = served(tiny(kind, tied), tmp_path / server, server)
        torch.testing.assert_close(logits(there), logits(plain), rtol=0, atol=1e-5)


def test_ranks() -> None:
    for rank, padded in ((1, 1), (2, 8), (8, 8), (9, 16), (257, 320), (321, 512)):
        pair = {"x.lora_A.weight": torch.ones(rank, 3), "x.lora_B.weight": torch.ones(5, rank)}
        config = {"r": rank, "lora_alpha": 2 * rank}
        tensors, made = servers.fitted(pair, config, "vllm")
        assert (made["r"], made["lora_alpha"]) == (padded, padded)
        inner, outer = tensors.values()
        assert inner.shape == (padded, 3) and outer.shape == (5, padded)
        assert torch.equal(outer @ inner, 2.0 * rank * torch.ones(5, 3))
        assert servers.fitted(pair, config, "llama.cpp")[1]["r"] == rank
    with pytest.raises(tezo_ds.ConfigError, match="rank 513 is above 512"):
        servers.fitted({}, {"r": 513, "lora_alpha": 513}, "vllm")


@pytest.mark.parametrize(
    ("kind", "server", "embeddings", "words"),
    [
        ("llama", "vllm", False, "lm_head and model.embed_tokens have learnt.*add --embeddings"),
        ("llama", "llama.cpp", True, "are tied, and its converter refuses"),
        ("gpt2", "vllm", True, "keeps its weight the other way round"),
        ("roberta", "llama.cpp", True, "causal models alone"),
    ],
)
def test_what_a_server_does_not_take_is_refused(
    kind: str, server: str, embeddings: bool, words: str, tmp_path: Path
) -> None:
    engine = trained(tiny(kind), ["*token_type*"])
    with pytest.raises(tezo_ds.ConfigError, match=words):
        save_adapter(engine, tmp_path / "a", "base", server=server, embeddings=embeddings)
    assert not (tmp_path / "a").exists()


def test_tensor_trains_are_refused(tmp_path: Path) -> None:
    engine = tezo_ds.initialize(tiny(), {"adapter": "tt", "bottleneck": 8})
    with pytest.raises(tezo_ds.ConfigError, match="reads no tensor trains"):
        save_adapter(engine, tmp_path / "a", "base", server="vllm")


def test_the_command(
    given: Given, plain: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "--run", plain.path, "--adapter", tmp_path / "a"]
    assert call(*words, "--for", "vllm") == 2
    assert "--exclude '*embed*'" in capsys.readouterr().err
    assert call(*words, "--for", "vllm", "--embeddings") == 0
    out = capsys.readouterr().out
    assert "vllm serve" in out and "--max-lora-rank 8" in out and str(tmp_path / "a") in out
    for wrong in (["--for", "ollama"], ["--embeddings"]):
        assert call("export", "--run", plain.path, "--adapter", tmp_path / "b", *wrong) == 2
    assert call("export", "--run", plain.path, "--merged", tmp_path / "b", "--for", "vllm") == 2
    assert "--adapter FOLDER --for SERVER" in capsys.readouterr().err
