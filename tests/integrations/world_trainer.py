"""`TezoTrainer` under a launcher: ZeRO-3 by its JSON, a model under FSDP2, whole weights on every rank."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from once import once
from tiny import make_batch, tiny
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from world_fsdp2 import shard
from world_zero3 import ZERO3
from worlds import World, case

import tezo_ds
from tezo_ds.errors import ConfigError
from tezo_ds.integrations import sharded
from tezo_ds.integrations.transformers import TezoTrainer

TEZO = {"rank": 3, "rho": 1e-2, "lr": 3e-4, "seed": 11}
STEPS, ROWS = 3, 3  # rows of a step, one on each rank
ZERO = {"zero_optimization": {**ZERO3["zero_optimization"], "stage": 3}}
AUTO = {**ZERO3, **ZERO, "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Rows of the batches of all steps, one after another."""

    def __len__(self) -> int:
        return STEPS * ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        batch = make_batch(ROWS, seed=index // ROWS)
        return {name: part[index % ROWS] for name, part in batch.items()}


@once
def of_one() -> tuple[list[tuple[float, ...]], float]:
    """Returns κ of the steps of one process, and its loss on the first step's rows in the end."""
    engine = tezo_ds.initialize(tiny(), TEZO)
    engine.sharding.world_size = 1
    kappas = [engine.step(make_batch(ROWS, seed=step)).kappa for step in range(STEPS)]
    engine.objective.first = None
    return kappas, engine.loss(make_batch(ROWS))


def forget() -> None:
    """Lets accelerate and transformers begin anew, as a process of its own would."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    for variable in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[variable]


def trained(folder: Path, model: Any, **more: Any) -> TezoTrainer:
    args = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=1, per_device_eval_batch_size=1,
        train_sampling_strategy="sequential", save_strategy="steps", save_steps=2, report_to="none",
        use_cpu=True, disable_tqdm=True, **more,
    )  # fmt: skip
    rows = Rows()
    trainer = TezoTrainer(model, args, tezo=TEZO, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    return trainer


@case(worlds=(ROWS,))
def runs_of_all_shardings_are_those_of_one_process(world: World) -> None:
    kappas, loss = of_one()
    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        "Replicated": (tiny(), {}), "Zero3": (tiny(), {"deepspeed": AUTO}), "Fsdp2": (shard(tiny()), {}),
    }  # fmt: skip
    for name, (model, more) in ways.items():
        forget()
        folder = world.folder / f"trainer-{name}"
        trainer = trained(folder, model, **more)
        assert trainer.engine is not None
        assert type(trainer.engine.sharding).__name__ == name
        steps = tezo_ds.run.journal.read_journal(folder / "journal.jsonl").steps
        for line, kappa in zip(steps, kappas, strict=True):
            assert line["kappa"] == pytest.approx(kappa, rel=1e-3), name
        found = trainer.predict(torch.utils.data.Subset(trainer.eval_dataset, range(ROWS)))
        mean = found.metrics["test_loss"]
        assert found.predictions.shape[0] == ROWS and mean == pytest.approx(loss, rel=1e-4), name
        assert (folder / "checkpoint-2" / "adapter_config.json").exists()
        written = tezo_ds.files.text.read_json(folder / "config.json")
        assert written["settings"]["fsdp"] == (name == "Fsdp2")
        assert (written["deepspeed"] is None) == (name != "Zero3")
    forget()


@case(worlds=(ROWS,))
def accelerates_choices_of_fsdp_are_taken_or_refused(world: World) -> None:
    def engine(**plugin: Any) -> tezo_ds.Engine:
        known = {
            "fsdp_version": 2, "reshard_after_forward": True, "cpu_ram_efficient_loading": False,
            "cpu_offload": False, "transformer_cls_names_to_wrap": ["LlamaDecoderLayer"],
        }  # fmt: skip
        state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**{**known, **plugin}))
        accelerator: Any = SimpleNamespace(
            state=state, parallelism_config=None, mixed_precision="bf16"
        )
        return sharded.engine_of(tiny(), accelerator, None, dict(TEZO), None)  # type: ignore[arg-type]

    made = engine()
    assert type(made.sharding).__name__ == "Fsdp2"
    parameter = made.sharding.module.lm_head.weight
    assert made.sharding.compute_dtype(parameter) == torch.bfloat16
    assert made.step(make_batch(1, seed=world.rank)).loss > 0
    for name, value in (
        ("fsdp_version", 1), ("reshard_after_forward", False), ("cpu_ram_efficient_loading", True),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"accelerate's .*{name.removeprefix('fsdp_')}"):
            engine(**{name: value})
