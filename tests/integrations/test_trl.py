"""`TezoTrainer` before trl's SFTTrainer, which then prepares the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Given
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tezo_ds.integrations.arguments import refuse_unfit
from tezo_ds.integrations.transformers import TezoTrainer

trl = pytest.importorskip("trl")
pytest_plugins = ("cli_fixtures",)
QUIET = {
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "report_to": "none",
    "save_strategy": "no",
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of names between the two libraries
def test_its_formatting_and_collator_feed_the_steps(given: Given, tmp_path: Path) -> None:
    class Both(TezoTrainer, trl.SFTTrainer):  # type: ignore[misc,name-defined]
        """What docs/trainer.md shows."""

    rows = Dataset.from_list([json.loads(line) for line in given.data.read_text().splitlines()])
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    args = trl.SFTConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, max_length=16, **QUIET
    )
    assert refuse_unfit(args, {}) == ""  # of defaults of its own class, checkpoints of activations
    trainer = Both(
        AutoModelForCausalLM.from_pretrained(given.model), args, tezo={"rank": 4, "lr": 0.002},
        train_dataset=rows, eval_dataset=rows.select(range(6)), processing_class=tokenizer,
        formatting_func=lambda row: f"{row['text']} is {row['label']}",
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    text = tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True)
    assert "film" in text and " is " in text and batch["labels"].shape == batch["input_ids"].shape
    assert trainer.train().global_step == 3
    assert trainer.engine is not None and trainer.engine.config.lr == 0.002
    # Both see what is kept aside of the output layer, of which trl's own loss reads the weight alone.
    (few,) = trainer.get_eval_dataloader()
    expected = trainer.engine.loss(few)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    with trainer.engine.applied():
        without = trl.SFTTrainer.compute_loss(trainer, trainer.model, dict(few)).item()
    assert abs(without - expected) > 1e-3


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("accumulated", [1, 2])
def test_rows_without_padding_train_as_padded_ones(
    given: Given, accumulated: int, tmp_path: Path
) -> None:
    class Both(TezoTrainer, trl.SFTTrainer):  # type: ignore[misc,name-defined]
        """What docs/trainer.md shows."""

    lines = given.data.read_text().splitlines()
    rows = [{"text": json.loads(line)["text"] + " very" * (i % 7)} for i, line in enumerate(lines)]
    tokenizer = AutoTokenizer.from_pretrained(given.model)

    def losses(**options: bool) -> list[float]:
        folder = tmp_path / "-".join(["run", *options])
        args = trl.SFTConfig(
            str(folder), max_steps=3, per_device_train_batch_size=4, logging_steps=1,
            gradient_accumulation_steps=accumulated, max_length=64 if "packing" in options else None,
            **options, **QUIET,
        )  # fmt: skip
        trainer = Both(
            AutoModelForCausalLM.from_pretrained(given.model), args, tezo={"rank": 4, "lr": 1e-4},
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        )  # fmt: skip
        batch = next(iter(trainer.get_train_dataloader()))
        assert len(batch["input_ids"]) == (1 if options else 4)
        trainer.train()
        assert trainer.engine is not None
        assert trainer.engine.config.micro_batch == (accumulated > 1) * (1 if options else 4)
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    assert losses(padding_free=True) == pytest.approx(losses(), rel=1e-4)
    assert len(losses(packing=True)) == 3
