"""`TezoTrainer`: a Trainer with stock callbacks, whose run is that of `tezo-ds train` on the same batches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import BATCH, BLOCK, STEPS, TEMPLATE, WORDS, Given, Run, call
from tiny import make_batch, tiny
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    TrainerCallback,
    TrainingArguments,
)

import tezo_ds
from tezo_ds.errors import ConfigError, DataError
from tezo_ds.integrations.arguments import GIVEN, REFUSED, block_of, refuse_unfit
from tezo_ds.integrations.joined import joined
from tezo_ds.integrations.transformers import TezoTrainer
from tezo_ds.tasks import batch_indices, collate, encode, load_task

pytest_plugins = ("cli_fixtures",)

MORE = 8  # steps that were asked for where an early stop comes after STEPS
QUIET = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no"}


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Examples in the order in which steps take them."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class Killed(TrainerCallback):
    """Ends the process, as it were, after some steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.after:
            raise KeyboardInterrupt


Make = Callable[..., TezoTrainer]


@pytest.fixture(scope="module")
def make(given: Given) -> Make:
    """Makes a trainer of a new model on the batches of the fixture `plain`."""
    task = load_task(str(given.data), template=TEMPLATE, verbalizers=WORDS, test_fraction=0.4)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    train, test = (encode(tokenizer, part, 512) for part in (task.train, task.test))
    chosen = [batch_indices(len(train), BATCH, s, BLOCK["seed"], 0, 1) for s in range(MORE)]
    rows = Rows([train[i] for step in chosen for i in step])

    def trainer(output: Path, **given_: Any) -> TezoTrainer:
        own = {name: given_.pop(name) for name in ("tezo", "callbacks") if name in given_}
        options = {**QUIET, "max_steps": STEPS, "per_device_train_batch_size": BATCH, **given_}
        args = TrainingArguments(
            str(output),
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            **options,
        )
        return TezoTrainer(
            AutoModelForCausalLM.from_pretrained(given.model), args, train_dataset=rows,
            data_collator=lambda batch: collate(batch, tokenizer.pad_token_id),
            eval_dataset=Rows(test), processing_class=tokenizer, **{"tezo": BLOCK, **own},
        )  # fmt: skip

    return trainer


@pytest.fixture(scope="module")
def stopped(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TezoTrainer]:
    """A run that stock callbacks have ended early, and whose best evaluation is its result."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    trainer = make(
        output, max_steps=MORE, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        logging_steps=1, load_best_model_at_end=True, metric_for_best_model="loss", report_to="tensorboard",
        callbacks=[EarlyStoppingCallback(1)],
    )  # fmt: skip
    trainer.train()
    yield trainer


def test_steps_are_those_of_the_command_bit_for_bit(stopped: TezoTrainer, plain: Run) -> None:
    run = Run(stopped.run_folder)
    assert stopped.state.global_step == STEPS < MORE
    for name in ("step", "kappa", "loss", "rho", "lr", "tokens"):
        assert [line[name] for line in run.steps] == [line[name] for line in plain.steps], name


def test_the_best_evaluation_is_the_result(
    stopped: TezoTrainer, plain: Run, tmp_path: Path
) -> None:
    run, best = Run(stopped.run_folder), stopped.state.best_global_step
    assert best == 4  # else the early stop came for another reason
    for path in (run.path, plain.path):
        file = tmp_path / f"{path.parent.name}.safetensors"
        assert call("replay", path, "--to-step", best, "--coefficients", file) == 0
        expected = dict(tezo_ds.files.tensors.read(file)[0])
        assert all(torch.equal(run.coefficients[name], part) for name, part in expected.items())
    scores = [line for line in run.lines if "validation_loss" in line]
    assert [line["step"] for line in scores] == [2, 4, 6]
    assert run.summary["status"] == "finished" and run.config["batch_size"] == BATCH
    for folder in ("adapter", "checkpoint-4"):
        config = json.loads((run.path / folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == plain.config["settings"]["model"]
        assert (run.path / folder / "tokenizer.json").exists()


def test_tensorboard_is_told_by_its_stock_callback(stopped: TezoTrainer) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (stopped.run_folder / "runs").iterdir()
    found = EventAccumulator(str(folder)).Reload()
    steps = Run(stopped.run_folder).steps
    for tag, field in (("loss", "loss"), ("kappa", "kappa_mean"), ("grad_norm", "gradient_norm")):
        points = [(point.step, point.value) for point in found.Scalars(f"train/{tag}")]
        assert points == [(s["step"] + 1, pytest.approx(s[field], rel=1e-5)) for s in steps]
    assert [point.step for point in found.Scalars("eval/loss")] == [2, 4, 6]


@pytest.fixture(scope="module")
def resumed(make: Make, tmp_path_factory: pytest.TempPathFactory) -> TezoTrainer:
    """A run that was killed between two snapshots, and has gone on."""
    output = tmp_path_factory.mktemp("resumed") / "run"
    saves = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        make(output, callbacks=[Killed(3)], **saves).train()
    assert len(Run(output).steps) == 3 and not (output / "summary.json").exists()
    trainer = make(output, **saves)
    trainer.train(resume_from_checkpoint=True)
    return trainer


def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(
    resumed: TezoTrainer, plain: Run
) -> None:
    found = Run(resumed.run_folder).coefficients
    assert all(torch.equal(found[name], part) for name, part in plain.coefficients.items())
    assert [line["step"] for line in Run(resumed.run_folder).steps] == list(range(STEPS))
    resumed.train()  # there is nothing left to do
    assert resumed.state.global_step == STEPS == len(Run(resumed.run_folder).steps)


def test_predictions_and_metrics_are_of_what_was_learnt(
    resumed: TezoTrainer, plain: Run, given: Given
) -> None:
    tokenizer = resumed.processing_class
    words = [tokenizer.encode(f" {word}", add_special_tokens=False)[-1] for word in WORDS.values()]

    def accuracy(prediction: Any) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        rows, places = np.nonzero(labels != -100)
        firsts = np.unique(rows, return_index=True)[1]
        rows, places = rows[firsts], places[firsts]
        guessed = np.array(words)[logits[rows, places - 1][:, words].argmax(axis=1)]
        return {"accuracy": float((guessed == labels[rows, places]).mean())}

    resumed.compute_metrics = accuracy
    metrics = resumed.evaluate()
    assert metrics["eval_accuracy"] == plain.summary["accuracy_after"]
    assert metrics["eval_accuracy"] != plain.summary["accuracy_before"]
    predicted = resumed.predict(resumed.eval_dataset)
    assert predicted.metrics["test_accuracy"] == metrics["eval_accuracy"]


def test_the_hub_gets_the_adapter_alone(
    resumed: TezoTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[tuple[str, set[str]]] = []

    class Hub:
        repo_id = "me/run"

        def create_repo(self, name: str, **_: Any) -> Hub:
            pushed.append((name, set()))
            return self

        def upload_folder(self, repo_id: str, folder_path: str, **_: Any) -> None:
            pushed.append((repo_id, {path.name for path in Path(folder_path).iterdir()}))

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    resumed.push_to_hub()
    assert pushed[0] == ("run", set()) and pushed[1][0] == "me/run"
    files = {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"}
    assert files <= pushed[1][1] and "journal.jsonl" not in pushed[1][1]
    card = (resumed.run_folder / "adapter" / "README.md").read_text()
    assert "zeroth-order" in card and f"| steps | {STEPS} |" in card


def test_weights_that_steps_write_go_on_too(make: Make, given: Given, tmp_path: Path) -> None:
    tezo = {"method": "mezo-m", "lr": 1e-4, "seed": 3}
    saves = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "run", tezo=tezo, callbacks=[Killed(3)], **saves).train()
    trainer = make(tmp_path / "run", tezo=tezo, **saves)
    trainer.train()
    engine = tezo_ds.initialize(AutoModelForCausalLM.from_pretrained(given.model), tezo)
    for step, batch in enumerate(trainer.get_train_dataloader()):
        if step < 4:
            engine.step(batch)
    found = dict(trainer.model.named_parameters())
    expected = dict(engine.sharding.module.named_parameters())
    assert all(torch.equal(found[name], part) for name, part in expected.items())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert torch.equal(saved.lm_head.weight, expected["model.embed_tokens.weight"])


def test_accumulated_batches_are_micro_batches_of_one_step(tmp_path: Path) -> None:
    """Batches of unequal lengths are padded to one, where nothing counts."""
    rows = [make_batch(2, seed=i, length=9 + 2 * (i % 2)) for i in range(4)]
    args = TrainingArguments(
        str(tmp_path), num_train_epochs=1, per_device_train_batch_size=1, gradient_accumulation_steps=2,
        train_sampling_strategy="sequential", **QUIET,
    )  # fmt: skip
    tezo = {"rank": 3, "lr": 1e-3, "seed": 5, "schedule": "linear"}
    trainer = TezoTrainer(
        tiny(), args, tezo=tezo, train_dataset=Rows(rows), eval_dataset=Rows(rows),
        data_collator=lambda batch: batch[0],
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]  # whose engine knows of no schedule
    assert trainer.train().global_step == 2
    assert trainer.evaluate()["eval_loss"] != before
    engine = tezo_ds.initialize(tiny(), {**tezo, "micro_batch": 1, "total_steps": 2})
    for step in range(2):
        short, long = rows[2 * step], rows[2 * step + 1]
        batch = {
            "input_ids": torch.cat([torch.nn.functional.pad(short["input_ids"], (0, 2)), long["input_ids"]]),
            "attention_mask": torch.cat(
                [torch.nn.functional.pad(short["attention_mask"], (0, 2)), long["attention_mask"]]
            ),
            "labels": torch.cat(
                [torch.nn.functional.pad(short["labels"], (0, 2), value=-100), long["labels"]]
            ),
        }  # fmt: skip
        engine.step(batch)
    assert trainer.engine is not None
    found, expected = trainer.engine.coefficients(), engine.coefficients()
    assert all(torch.equal(found[name], part) for name, part in expected.items())


def test_batches_that_are_no_one_batch_are_refused() -> None:
    short, long = make_batch(2, length=9), make_batch(2, length=11)
    with pytest.raises(DataError, match="different fields"):
        joined([short, {**long, "position_ids": long["labels"]}], 0)
    with pytest.raises(DataError, match="no attention_mask"):
        joined([{k: b[k] for k in ("input_ids", "labels")} for b in (short, long)], 0)
    with pytest.raises(DataError, match="names is no tensor"):
        joined([{**short, "names": ["a", "b"]}, {**short, "names": ["a", "b"]}], 0)


def test_arguments_set_what_the_block_leaves_open(tmp_path: Path) -> None:
    def args(**given: Any) -> TrainingArguments:
        return TrainingArguments(str(tmp_path), use_cpu=True, **given)

    assert block_of(args(), None, None) == {"seed": 42}
    set_ = {"learning_rate": 1e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.25, "seed": 7}
    expected = {"lr": 1e-4, "schedule": "cosine", "warmup_steps": 5, "total_steps": 20, "seed": 7}
    assert block_of(args(**set_), None, 20) == expected
    assert block_of(args(**set_), {"seed": 9, "lr": 1e-4}, 20) == {**expected, "seed": 9}
    assert block_of(args(), tezo_ds.TezoConfig(rank=4), 3) == {
        "seed": 42, "total_steps": 3, "rank": 4
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"learning_rate is .* and tezo's lr"):
        block_of(args(**set_), {"lr": 0.1}, 20)
    with pytest.raises(ConfigError, match="tezo must be a dict"):
        block_of(args(), "rank", 20)  # type: ignore[arg-type]
    accumulates = args(gradient_accumulation_steps=4, per_device_train_batch_size=3)
    assert block_of(accumulates, None, None)["micro_batch"] == 3


def test_arguments_of_gradients_are_named_where_they_were_set(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    assert refuse_unfit(args, {"optimizers": (None, None)}) == ""
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, weight_decay=0.1, optim="sgd", max_grad_norm=0.5
    )
    assert refuse_unfit(args, {}).endswith(
        "not used by forward passes: optim, weight_decay, max_grad_norm"
    )
    values = {"label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0}
    for name in REFUSED:
        args = TrainingArguments(str(tmp_path), use_cpu=True)
        if hasattr(args, name):
            setattr(args, name, values.get(name, True))
            with pytest.raises(ConfigError, match=f"{name} is not taken"):
                refuse_unfit(args, {})
    for name in GIVEN:
        with pytest.raises(ConfigError, match=f"{name} is not taken"):
            refuse_unfit(TrainingArguments(str(tmp_path), use_cpu=True), {name: object()})
    args = TrainingArguments(str(tmp_path), use_cpu=True, lr_scheduler_type="polynomial")
    with pytest.raises(ConfigError, match="polynomial is not taken; use constant"):
        refuse_unfit(args, {})


def test_a_folder_of_another_run_is_refused(
    stopped: TezoTrainer, make: Make, tmp_path: Path
) -> None:
    shutil.copytree(stopped.run_folder, tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a run of rank 4, not 5"):
        make(tmp_path / "run", tezo={**BLOCK, "rank": 5}, max_steps=MORE).train()
    with pytest.raises(ConfigError, match="holds a run already"):
        make(tmp_path / "run", max_steps=MORE).train(resume_from_checkpoint=False)
    trainer = make(tmp_path / "other")
    with pytest.raises(ConfigError, match="is not in output_dir"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="holds no run that has begun"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="use tezo-ds sweep"):
        trainer.hyperparameter_search()
    with pytest.raises(ConfigError, match="load_best_model_at_end: mezo writes weights"):
        make(
            tmp_path / "other", tezo={"method": "mezo"}, load_best_model_at_end=True, eval_strategy="steps",
            save_strategy="steps",
        )  # fmt: skip
