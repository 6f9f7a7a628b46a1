"""The ready DeepSpeed configs, and what is refused of offload; world_configs.py runs each of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from command_line import Given, call
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.ops.op_builder.pin_memory import PinMemoryBuilder

import tezo_ds
from tezo_ds.sharding import zero3

pytest_plugins = ("cli_fixtures",)
CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
NAMES = sorted(path.name for path in CONFIGS.glob("*.json"))
NVME = json.loads((CONFIGS / "zero3_nvme_offload.json").read_text())


def nvme(zero: dict[str, Any], **offload: object) -> dict[str, Any]:
    """Returns the NVMe config with other fields in its zero_optimization block and its offload_param."""
    block = NVME["zero_optimization"]
    block = {**block, **zero, "offload_param": {**block["offload_param"], **offload}}
    return {**NVME, "zero_optimization": block}


@pytest.mark.parametrize("name", NAMES)
def test_each_config_has_its_row(name: str) -> None:
    assert f"| `{name}` |" in (CONFIGS / "README.md").read_text()


def test_nvme_where_the_op_cannot_be_built_is_one_line(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = given.train(tmp_path / "run", deepspeed=CONFIGS / "zero3_nvme_offload.json")
    builder = type(AsyncIOBuilder())
    with (
        mock.patch.object(builder, "is_compatible", lambda self, verbose=False: False),
        mock.patch.object(PinMemoryBuilder, "load"),  # loaded first, and compiled for a minute
    ):
        with pytest.raises(RuntimeError, match="async_io"):  # DeepSpeed's own words
            AsyncIOBuilder().load(verbose=False)
        capsys.readouterr()
        assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("tezo-ds: error: offload_param to nvme") and error.count("\n") == 1
    assert "libaio-dev" in error and "g++" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (nvme({}, nvme_path=None), "no nvme_path"),
        (nvme({"zero_hpz_partition_size": 2}), "zero_hpz_partition_size does not go with"),
    ],
)
def test_offload_that_cannot_be_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(tezo_ds.ConfigError, match=words) as caught:
        zero3.prepare(config)
    assert "\n" not in str(caught.value)
