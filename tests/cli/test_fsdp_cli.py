"""`--fsdp` and the configs of `accelerate launch`: real launches, and what is refused;
tests/launch/test_launch_ends.py and tests/launch/test_elastic.py have `--fsdp` under torchrun."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command_line import Given, Run, assert_found_again, call, finish, flags, free_port, start
from only_ours import stray
from tiny import tiny
from torch import nn

from tezo_ds.cli.accelerate import launched
from tezo_ds.errors import ConfigError
from tezo_ds.models.structure import blocks

pytest_plugins = ("cli_fixtures",)

ROOT = Path(__file__).resolve().parents[2]
FP32, BF16 = "float32", "bfloat16"
ZERO3 = {"zero_optimization": {"stage": 3}, "tezo": {}}
FSDP2 = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
DEEPSPEED = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero3.json",
}


@dataclass(frozen=True)
class Start:
    """One way to start a run, and what it must come to."""

    launcher: tuple[object, ...]
    ranks: int
    shards: str  # class of tezo_ds.sharding
    weights: str  # dtype
    forward: str  # dtype


def starts() -> dict[str, Start]:
    """Returns a start for each config of accelerate's in ds_configs/."""

    def accelerate(name: str, ranks: int) -> tuple[object, ...]:
        config = ("--config_file", ROOT / "ds_configs" / f"{name}.yaml", "--num_processes", ranks)
        launcher = Path(sys.executable).with_name("accelerate")
        return launcher, "launch", *config, "--main_process_port", free_port()

    fsdp2, deepspeed = "accelerate_fsdp2", "accelerate_deepspeed"
    return {
        fsdp2: Start(accelerate(fsdp2, 2), 2, "Fsdp2", FP32, BF16),
        deepspeed: Start(accelerate(deepspeed, 1), 1, "Zero3", BF16, BF16),
    }


@pytest.mark.launches
def test_launchers_shard_and_one_process_evaluates(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.chdir(ROOT)  # from which a config names its DeepSpeed JSON
    ways = starts()
    assert ways.keys() == {path.stem for path in ROOT.glob("ds_configs/*.yaml")}
    processes = {}
    for name, way in ways.items():  # at the same time, as most of it is imports
        arguments = given.train(tmp_path / name, steps=3)
        processes[name] = start(*way.launcher, "-m", "tezo_ds", *arguments)
    ends = {name: finish(process) for name, process in processes.items()}
    for name, way in ways.items():
        code, out, err = ends[name]
        assert code == 0, err
        assert f"{way.shards} on {way.ranks} rank(s)" in out
        assert stray(out + err) == [], "a library's lines, from the processes' start on"
        run = Run(tmp_path / name)
        assert run.config["settings"]["fsdp"] == (way.shards == "Fsdp2")
        assert run.config["weights_dtype"] == way.weights
        assert run.config["factors_dtype"] == way.forward
        assert len(run.steps) == 3 and all(bool(a.any()) for a in run.coefficients.values())
        # One process pads other batches, which bfloat16 shows.
        assert_found_again(run, capsys, 0.02)


def test_without_a_launcher_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_VERSION", "1")
    asked = launched()
    assert (asked.deepspeed, asked.settings) == (None, {})


def test_accelerates_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        **FSDP2,
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "FSDP_OFFLOAD_PARAMS": "true",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaMLP,LlamaAttention",
        "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
        "PARALLELISM_CONFIG_DP_SHARD_SIZE": "3",
        "WORLD_SIZE": "6",
    }.items():
        monkeypatch.setenv(name, value)
    assert launched().settings == {
        "fsdp": True,
        "fsdp_replicas": 2,
        "fsdp_offload_params": True,
        "fsdp_layers": ("LlamaMLP", "LlamaAttention"),
        "compute_dtype": "bfloat16",
    }


@pytest.mark.parametrize(
    ("environment", "telling"),
    [
        ({**FSDP2, "FSDP_VERSION": "1"}, "fsdp_version is 1; set it to 2"),
        (
            {**FSDP2, "FSDP_RESHARD_AFTER_FORWARD": "false"},
            "after_forward is false; set it to true",
        ),
        ({**FSDP2, "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, "set it to transformer_based_wrap"),
        ({**FSDP2, "PARALLELISM_CONFIG_TP_SIZE": "2"}, "parallelism_config_tp_size is 2"),
        ({**FSDP2, "PARALLELISM_CONFIG_DP_SHARD_SIZE": "3"}, "is not the number of ranks, 1"),
        (
            {**FSDP2, "ACCELERATE_MIXED_PRECISION": "fp8"},
            "mixed_precision is fp8; use no, bf16, fp16",
        ),
        ({**FSDP2, "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend is INDUCTOR"),
        ({**DEEPSPEED, "ACCELERATE_MIXED_PRECISION": "bf16"}, "use --dtype instead, or the"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "zero_stage is not used; set what"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}, "zero3_init is false"),
        ({k: v for k, v in DEEPSPEED.items() if "FILE" not in k}, "no deepspeed_config_file; name"),
    ],
)
def test_accelerates_choices_that_are_not_served(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], telling: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        launched()
    assert telling in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("switches", "options", "telling"),
    [
        ([], {"fsdp_replicas": 2}, "--fsdp-replicas needs --fsdp"),
        ([], {"compute_dtype": "bfloat16"}, "--compute-dtype needs --fsdp"),
        (["--fsdp-offload-params"], {}, "--fsdp-offload-params needs --fsdp"),
        (["--fsdp"], {"compute_dtype": "int8"}, "--compute-dtype: "),
        (["--fsdp"], {"fsdp_replicas": 0}, "--fsdp-replicas: "),
        (["--fsdp"], {"deepspeed": "zero3.json"}, "zero3.json has zero_optimization; with --fsdp"),
    ],
)
def test_flags_that_contradict(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str], switches: list[str], options: dict[str, Any], telling: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("zero3.json").write_text(json.dumps(ZERO3))
    assert call(*given.train(tmp_path / "run"), *switches, *flags(options)) == 2
    err = capfd.readouterr().err
    assert err.startswith("tezo-ds: error: ") and err.count("\n") == 1
    assert telling in err
    assert not (tmp_path / "run").exists() and "MASTER_PORT" not in os.environ


def kinds(modules: list[nn.Module]) -> list[str]:
    return [type(module).__name__ for module in modules]


def test_blocks_are_the_transformers_layers() -> None:
    for kind, name in (("llama", "LlamaDecoderLayer"), ("opt", "OPTDecoderLayer")):
        assert kinds(blocks(tiny(kind))) == [name] * 2
    # RoBERTa says not to split its embeddings either; tied, they are the output layer's as well.
    assert kinds(blocks(tiny("roberta", tied=True))) == ["RobertaLayer"] * 2
    untied = kinds(blocks(tiny("roberta", tied=False)))
    assert untied == ["RobertaEmbeddings", "RobertaLayer", "RobertaLayer"]


def test_blocks_of_a_model_that_says_nothing() -> None:
    def layer() -> nn.Module:
        return nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})

    model = nn.ModuleDict({"layers": nn.ModuleList([layer(), layer()]), "head": nn.Linear(2, 3)})
    assert blocks(model) == list(model["layers"])
    assert blocks(model, ["Linear"]) == [m for m in model.modules() if isinstance(m, nn.Linear)]
    with pytest.raises(ConfigError, match="ModuleDict has no LlamaMLP"):
        blocks(model, ["Linear", "LlamaMLP"])
