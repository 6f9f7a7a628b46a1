"""Patterns of include and exclude: globs, and layers by number, of models of many kinds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from command_line import Given, call
from tiny import tiny
from torch import nn

import tezo_ds
from tezo_ds.config import TezoConfig
from tezo_ds.engine.selection import select
from tezo_ds.errors import ConfigError
from tezo_ds.intake.patterns import check_patterns
from tezo_ds.patterns import matching, numbered_layers
from tezo_ds.sharding.replicated import alone

pytest_plugins = ("cli_fixtures",)

FEW = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 9, "num_hidden_layers": 3}


def stack(count: int, prefix: str = "model.layers") -> list[str]:
    """Names the parameters of a decoder of `count` blocks."""
    inside = [f"{prefix}.{i}.{part}.weight" for i in range(count) for part in ("q", "mlp.up")]
    return ["model.embed.weight", *inside, "model.norm.weight", "lm_head.weight"]


def indices(patterns: Sequence[str], count: int = 30) -> list[int]:
    """Returns the layers, by index, that all of whose parameters match."""
    found, layers = matching(patterns, stack(count)), numbered_layers(stack(count))
    assert len(layers) == count and found <= set(stack(count)[1:-2])
    return [i for i, at in enumerate(layers) if {f"{at}.q.weight", f"{at}.mlp.up.weight"} <= found]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["last:6"], range(24, 30)),
        (["last: 1"], [29]),
        (["last:30"], range(30)),
        (["layers:24-29"], range(24, 30)),
        (["layers: 24-29"], range(24, 30)),
        (["layers: 24 - 29 "], range(24, 30)),
        (["layers:3"], [3]),
        (["layers:0-2,7"], [0, 1, 2, 7]),
        (["layers:7, 0 - 2"], [0, 1, 2, 7]),
        (["layers:5-5"], [5]),
        (["layers:1", "last:2"], [1, 28, 29]),
        (["model.layers.3.*"], [3]),
        (["no such name"], []),
        ([], []),
    ],
)
def test_layers_by_number(patterns: list[str], expected: Sequence[int]) -> None:
    assert indices(patterns) == list(expected)


def test_globs_and_layers_go_together() -> None:
    names = stack(3)
    assert matching(["last:1", "*embed*"], names) == {names[0], *names[5:7]}
    assert matching(["*.q.*"], names) == set(names[1:7:2])


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("last:0", "the model has 30 layers, model.layers.0 to model.layers.29; use last:1 to last:30"),
        ("last:40", "the model has 30 layers, model.layers.0 to model.layers.29; use last:1 to last:30"),
        ("last:", "is not of the form last:6; the model has 30 layers"),
        ("last:x", "is not of the form last:6; the model has 30 layers"),
        ("last:-1", "is not of the form last:6; the model has 30 layers"),
        ("last:1-2", "is not of the form last:6; the model has 30 layers"),
        ("last:1,2", "is not of the form last:6; the model has 30 layers"),
        ("layers:5-3", "5 is above 3; the model has 30 layers"),
        ("layers:30", "the model has 30 layers, model.layers.0 to model.layers.29; their indices are 0 to"),
        ("layers:28-30", "their indices are 0 to 29"),
        ("layers:1,40", "their indices are 0 to 29"),
        ("layers:", "is not of the form layers:24-29, layers:3 or layers:0-2,7; the model has 30 layers"),
        ("layers:1,", "is not of the form layers:24-29"),
        ("layers:-3", "is not of the form layers:24-29"),
        ("layers:a-b", "is not of the form layers:24-29"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("field", ["include", "exclude"])
def test_layers_that_are_not_there(pattern: str, said: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        matching([pattern], stack(30), field)
    line = str(caught.value)
    assert line.startswith(f"{field}: {pattern!r}") and said in line and "\n" not in line


@pytest.mark.parametrize("pattern", ["last:1", "layers:0"])
def test_a_model_without_numbered_layers(pattern: str) -> None:
    with pytest.raises(ConfigError, match="the model has none that are numbered; use a glob"):
        matching([pattern], ["embed.weight", "head.weight", "scales.3"])


def made(kind: str) -> nn.Module:
    """Makes a model of three blocks (of each half) without values."""
    with torch.device("meta"):
        if kind == "bert":
            config = transformers.BertConfig(vocab_size=11, **FEW)
            return transformers.BertForSequenceClassification(config)
        if kind == "t5":
            sizes = {
                "vocab_size": 11,
                "d_model": 8,
                "d_kv": 4,
                "d_ff": 9,
                "num_heads": 2,
                "num_layers": 3,
            }
            return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
        if kind == "bart":
            sizes = {"encoder_layers": 2, "decoder_layers": 3, "d_model": 8, "vocab_size": 11}
            heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
            config = transformers.BartConfig(**sizes, **heads, encoder_ffn_dim=9, decoder_ffn_dim=9)
            return transformers.BartForConditionalGeneration(config)
        if kind == "clip":
            text = {"vocab_size": 11, **FEW}
            vision = {**FEW, "num_hidden_layers": 5, "image_size": 4, "patch_size": 2}
            return transformers.CLIPModel(
                transformers.CLIPConfig(text_config=text, vision_config=vision)
            )
        if kind == "bert-to-bert":
            config = transformers.BertConfig(vocab_size=11, **FEW)
            return transformers.EncoderDecoderModel(
                transformers.EncoderDecoderConfig.from_encoder_decoder_configs(config, config)
            )
        if kind == "vit":
            config = transformers.ViTConfig(**FEW, image_size=4, patch_size=2)
            return nn.ModuleDict(
                {"vision": transformers.ViTModel(config), "head": nn.Sequential(nn.Linear(8, 2))}
            )
        if kind == "head":  # more modules than blocks
            head = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(5)))
            return nn.ModuleDict({"classifier": head, "base": made("bert")})
        return tiny(kind)


@pytest.mark.parametrize(
    ("kind", "prefixes"),
    [
        ("llama", ["model.layers."] * 2),
        ("opt", ["model.decoder.layers."] * 2),
        ("neox", ["gpt_neox.layers."] * 2),
        ("gpt2", ["transformer.h."] * 2),
        ("mixtral", ["model.layers."] * 2),
        ("roberta", ["roberta.encoder.layer."] * 2),
        ("bert", ["bert.encoder.layer."] * 3),
        ("t5", ["encoder.block."] * 3 + ["decoder.block."] * 3),
        ("bart", ["model.encoder.layers."] * 2 + ["model.decoder.layers."] * 3),
        ("clip", ["text_model.encoder.layers."] * 3),
        ("bert-to-bert", ["encoder.encoder.layer."] * 3 + ["decoder.bert.encoder.layer."] * 3),
        ("vit", ["vision.layers."] * 3),
        ("head", ["base.bert.encoder.layer."] * 3),
    ],
)
def test_the_blocks_of_many_models(kind: str, prefixes: list[str]) -> None:
    names = [name for name, _ in made(kind).named_parameters()]
    counts = [prefixes[:i].count(prefix) for i, prefix in enumerate(prefixes)]
    expected = [f"{prefix}{i}" for prefix, i in zip(prefixes, counts, strict=True)]
    assert numbered_layers(names) == expected
    last = matching(["last:1"], names)
    assert last == {name for name in names if name.startswith(f"{expected[-1]}.")} != set()


def test_experts_and_towers_by_name() -> None:
    experts = [f"model.layers.{i}.mlp.experts.{e}.w.weight" for i in range(2) for e in range(64)]
    assert numbered_layers(experts) == ["model.layers.0", "model.layers.1"]
    one = matching(["layers:1"], experts)
    assert one == set(experts[64:])
    seen = [name.replace("model.", "visual.") for name in stack(32, "visual.blocks")]
    assert len(numbered_layers([*seen, *stack(28)])) == 28
    assert numbered_layers(["0.weight", "2.weight"]) == ["0", "2"]


def trained(config: TezoConfig, kind: str = "llama") -> list[str]:
    sharding = alone(tiny(kind))
    check_patterns(sharding, config)
    chosen = select(sharding, config)
    return [each.name for each in (*chosen.matrices, *chosen.vectors)]


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "roberta"])
def test_matrices_of_the_last_layer_train(kind: str) -> None:
    found = trained(TezoConfig(include=("last:1",)), kind)
    both = trained(TezoConfig(include=("last:1",), train_vectors=True), kind)
    sizes = {name: p.dim() for name, p in tiny(kind).named_parameters() if ".1." in name}
    assert sorted(found) == sorted(name for name, dims in sizes.items() if dims > 1) != []
    assert set(both) == set(sizes)


def test_excluded_layers_stay_frozen() -> None:
    found = trained(TezoConfig(include=("*proj*",), exclude=("layers:0", "*mlp*")))
    assert found and all(".1.self_attn." in name for name in found)
    with pytest.raises(ConfigError, match="exclude: 'last:3': the model has 2 layers"):
        trained(TezoConfig(exclude=("last:3",)))


def test_an_engine_of_the_last_layer() -> None:
    engine = tezo_ds.initialize(tiny(), {"rank": 2, "include": ["last:1"]})
    assert {m.name.split(".")[2] for m in engine.selection.matrices} == {"1"}


def test_a_runs_identity_is_what_it_was() -> None:
    assert TezoConfig().identity == "01e7b720ff566d53"
    assert TezoConfig(include=("*q*",), exclude=("*k*",)).identity == "e167f5b10ae4f43a"


def test_on_the_command_line(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for include, code in (("last:2", 0), ("layers: 0-1", 0), ("last:9", 2)):
        arguments = given.train(tmp_path / include[:6], include=include)
        capsys.readouterr()
        assert call(*arguments) == code, include
        error = capsys.readouterr().err
    assert error.count("tezo-ds: error") == 1 and "'last:9': the model has " in error
