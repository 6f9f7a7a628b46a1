"""Each file of ds_configs/, which trains a toy model by the real command line on two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import world_fsdp_runs
from cli_fixtures import make_given
from command_line import BLOCK, Given, Run
from deepspeed.utils import groups
from file_aio import FileTraffic, toy_nvme
from worlds import ROOT, World, case

from tezo_ds.models import loading

CONFIGS = ROOT / "ds_configs"
BATCH, STEPS = 4, 3
OWN = {"lr": None, "seed": None}  # no flags for these, so the file's own hold; its rank is too high


def at_hand(path: Path, folder: Path) -> dict[str, Any]:
    """Reads a config's content, with the one field that every machine must set for itself, and a bottleneck
    below the toy's size."""
    content: dict[str, Any] = json.loads(path.read_text())
    offload = content["zero_optimization"].get("offload_param", {})
    if "nvme_path" in offload:
        offload["nvme_path"] = str(folder / "nvme")
    if "bottleneck" in content["tezo"]:
        content["tezo"]["bottleneck"] = 8
    return content


def train(given: Given, content: dict[str, Any], folder: Path, world: World) -> None:
    """Runs `tezo-ds train --deepspeed FILE` on every rank."""
    file = folder / f"rank{world.rank}.json"
    file.write_text(json.dumps(content))
    options = {"deepspeed": file, "steps": STEPS, "batch_size": BATCH, **OWN}
    try:
        world_fsdp_runs.call(*given.train(folder / "run", **options))
    finally:
        loading._zero_configs.clear()
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def check_run(run: Run, content: dict[str, Any]) -> None:
    assert run.config["deepspeed"]["zero_optimization"] == content["zero_optimization"]
    assert run.config["tezo"].items() >= {**content["tezo"], "rank": BLOCK["rank"]}.items()
    bf16 = content.get("bf16", {}).get("enabled", False)
    assert run.config["weights_dtype"] == ("bfloat16" if bf16 else "float32")
    assert run.config["world_size"] == 2 and len(run.steps) == STEPS
    assert run.coefficients and all(bool(part.any()) for part in run.coefficients.values())


@case(worlds=(2,))
def every_config_trains(world: World) -> None:
    given = Given(world.folder / "given" / "model", world.folder / "given" / "films.jsonl")
    if world.rank == 0:
        (world.folder / "given").mkdir()
        assert make_given(world.folder / "given") == given
    dist.barrier()
    runs: dict[str, Run] = {}
    for path in sorted(CONFIGS.glob("*.json")):
        folder = world.folder / path.stem
        folder.mkdir(exist_ok=True)
        content = at_hand(path, folder)
        with toy_nvme() as files:
            train(given, content, folder, world)
        runs[path.stem] = Run(folder / "run")
        check_run(runs[path.stem], content)
        assert_nvme_was_used(files, folder, content)
    plain = runs["zero3_bf16"].coefficients  # where the weights live makes no difference
    for name in ("zero3_hpz", "zero3_cpu_offload", "zero3_nvme_offload"):
        assert all(torch.equal(part, plain[k]) for k, part in runs[name].coefficients.items()), name


def assert_nvme_was_used(files: FileTraffic, folder: Path, content: dict[str, Any]) -> None:
    device = content["zero_optimization"].get("offload_param", {}).get("device")
    stored = list(folder.glob("nvme/zero_stage_3/bfloat16params/rank*/*.swp"))
    assert bool(stored) == (files.read > 0) == (device == "nvme")
