"""The benchmark of all methods: what it repeats, restores, chooses by, and writes into its page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import method_state
import methods
import pytest
import torch
from parts.methods import training as methods_training
from parts.methods.data import Splits, read_splits
from parts.methods.report import BEGIN, END, Results, best_rate, interval, put_between_markers
from parts.methods.training import LORA, Settings, Trainer, Weights
from task_files import WORDS, reviews, write
from tiny import make_batch, tiny
from tiny_tokenizer import save_tiny_llama
from torch import Tensor
from transformers import LlamaForCausalLM

import tezo_ds
from tezo_ds.config import TezoConfig
from tezo_ds.tasks import load_task

TASK = "rotten-tomatoes"
METHODS = ["tezo", "mezo", LORA]
SETTINGS = Settings(0.01, 3, 20, 7, 11)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a folder with a tiny model, its tokenizer, and films split in three that share some prompts."""
    made = tmp_path_factory.mktemp("benchmark")
    rows = reviews(60)
    (made / TASK).mkdir()
    for name, part in (("train", slice(0, 50)), ("valid", slice(34, 44)), ("test", slice(42, 60))):
        write(made / TASK / f"{name}.jsonl", rows[part])
    texts = [f"{row['text']} It was {word}" for row in rows for word in WORDS.values()]
    save_tiny_llama(made / "model", texts, num_key_value_heads=2, head_dim=16)
    return made


@pytest.fixture
def splits(folder: Path) -> Splits:
    return read_splits(TASK, folder / TASK, SETTINGS.valid_examples, SETTINGS.test_examples)


@pytest.fixture
def model(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder / "model")


@pytest.fixture
def trainer(folder: Path, model: LlamaForCausalLM, splits: Splits) -> Trainer:
    tokenizer = methods.AutoTokenizer.from_pretrained(folder / "model")
    return Trainer(model, tokenizer, splits, SETTINGS, Weights(model))


def bits(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_no_prompt_is_in_two_splits(folder: Path, splits: Splits) -> None:
    prompts = [{e.prompt for e in part} for part in (splits.train, splits.valid, splits.test)]
    assert not any(a & b for i, a in enumerate(prompts) for b in prompts[:i])
    raw = load_task(TASK, data=str(folder / TASK / "train.jsonl"), test_fraction=0)
    assert {e.prompt for e in raw.train} & prompts[2], "the files share prompts"
    assert min(map(len, prompts)) > 0


@pytest.mark.parametrize("method", ["mezo", "tezo-adam", "lozo", "tezo", LORA])
def test_every_run_begins_from_the_same_weights(
    model: LlamaForCausalLM, trainer: Trainer, method: str
) -> None:
    before = bits(model)
    first = trainer.run(method, 1e-2, seed=1, role="tune", steps=2)
    after = bits(model)
    assert same(before, after) == (method in ("tezo", "lozo", LORA)), (
        "who writes weights has written"
    )
    trainer.put_back()
    assert same(before, bits(model)) and all(p.requires_grad for p in model.parameters())
    assert first.steps == 2 and first.error is None


def test_weights_that_are_not_put_back_are_noticed(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Weights, "put_back", lambda self: None)
    trainer.run("mezo", 1e-1, seed=1, role="tune", steps=2)
    with pytest.raises(RuntimeError, match="left something in the model"):
        trainer.put_back()


def test_a_run_that_diverges_counts_as_wrong(trainer: Trainer) -> None:
    outcome = trainer.run("mezo", 3e38, seed=1, role="tune", steps=2)
    assert outcome.accuracy == 0 and outcome.error and "not finite" in outcome.error
    assert "Infinity" not in json.dumps(outcome.loss) and "NaN" not in json.dumps(outcome.loss)
    trainer.put_back()


def test_tuning_judges_by_validation_examples_and_the_final_run_by_those_of_the_test(
    trainer: Trainer, splits: Splits
) -> None:
    assert len(splits.valid) != len(splits.test)
    assert trainer.run("tezo", 1e-3, 0, "tune", 1).n == len(splits.valid)
    assert trainer.run("tezo", 1e-3, 1, "final", 1).n == len(splits.test)


def test_lora_descends_on_the_same_loss_as_the_others(trainer: Trainer) -> None:
    batch = trainer._batches(seed=1)(0)
    by_engine = trainer._plain.loss(batch)
    loss = methods_training.choice_loss(trainer._model, batch, trainer._choices)
    assert loss.item() == pytest.approx(by_engine, rel=1e-5)


def test_a_seed_has_its_own_examples_and_all_methods_share_them(trainer: Trainer) -> None:
    batches = [trainer._batches(seed)(0)["input_ids"] for seed in (1, 1, 2)]
    assert torch.equal(batches[0], batches[1])
    assert batches[0].shape != batches[2].shape or not torch.equal(batches[0], batches[2])


def test_a_pace_is_the_median_of_steps_made_in_turns(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow spell of the machine falls on all methods, and moves no median."""
    monkeypatch.setattr(methods_training, "PACE_ROUNDS", 3)
    per_round, clock = methods_training.PACE_STEPS * len(METHODS), [0.0, 0]

    def tick() -> float:
        clock[1] += 1
        steps = clock[1] // 2  # each takes two readings
        clock[0] += 50.0 if steps // per_round == 1 else 2.0
        return clock[0]

    monkeypatch.setattr(methods_training, "time", SimpleNamespace(perf_counter=tick))
    assert trainer.paces(METHODS) == dict.fromkeys(METHODS, 2.0)


def test_interval_is_students() -> None:
    assert interval([0.5]) == (0.5, None)
    mean, half = interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.303 / 3**0.5))
    assert interval([1.0, 3.0])[1] == pytest.approx(12.706)


def test_the_rate_is_chosen_by_validation_whatever_the_test_says(tmp_path: Path) -> None:
    results, key = Results(tmp_path / "results.jsonl"), {"task": "t", "method": "tezo"}
    for lr, accuracy, loss in ((1.0, 0.5, 3.0), (2.0, 0.6, 2.0), (3.0, 0.6, 1.0)):
        assert best_rate(results, key, (1.0, 2.0, 3.0)) is None, "not all were tried"
        tried = {"role": "tune", "lr": lr, "accuracy": accuracy, "loss": loss}
        results.add({**key, **tried})
    results.add({**key, "role": "final", "lr": 1.0, "accuracy": 0.99, "loss": 0.1})
    results.add({**key, "method": "mezo", "role": "tune", "lr": 1.0, "accuracy": 1, "loss": 0.1})
    assert best_rate(results, key, (1.0, 2.0, 3.0)) == 3.0


def test_a_line_that_was_cut_short_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    Results(path).add({"seed": 1})
    with path.open("a") as file:
        file.write('{"seed": 2, "accu')
    again = Results(path)
    assert again.find({"seed": 1}) and not again.find({"seed": 2})
    again.add({"seed": 3})
    assert Results(path).records == [{"seed": 1}, {"seed": 3}]


def test_only_what_is_between_the_markers_changes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"by hand\n{BEGIN}\nold\n{END}\nalso by hand\n")
    put_between_markers(page, "new")
    assert page.read_text() == f"by hand\n{BEGIN}\nnew\n{END}\nalso by hand\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="once each"):
        put_between_markers(page, "new")


@pytest.fixture
def call(folder: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Returns a function that runs the benchmark on the tiny model and returns the lines of results.jsonl."""
    page, out = tmp_path / "page.md", tmp_path / "out"
    page.write_text(f"by hand\n{BEGIN}\n{END}\n")

    def call(*more: object) -> list[dict[str, Any]]:
        sizes = ["--budget", 0.01, "--rates", 2, "--batch-size", 3, "--train-examples", 20]
        sizes += ["--valid-examples", 7, "--test-examples", 11]
        places = ["--model", folder / "model", "--cache", folder, "--out", out, "--page", page]
        words = ["--tasks", TASK, "--methods", *METHODS, *sizes, *places, *more]
        methods.main(list(map(str, words)))
        return Results(out / "results.jsonl").records

    return call


@pytest.mark.slow
def test_no_finished_run_is_repeated_and_seeds_are_added(
    call: Callable[..., list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, stop_at = Trainer.run, [4]

    def stopping(self: Trainer, *args: Any) -> Any:
        stop_at[0] -= 1
        if stop_at[0] == 0:
            raise KeyboardInterrupt
        return run(self, *args)

    monkeypatch.setattr(Trainer, "run", stopping)
    stopped = call("--seeds", 2)
    roles = [*["pace"] * 3, "final", *["memory"] * 3, *["tune"] * 3]
    assert [record["role"] for record in stopped] == roles
    stop_at[0] = -1
    whole = call("--seeds", 2)
    assert whole[: len(stopped)] == stopped and len(whole) == 1 + 3 * (1 + 1 + 2 + 2)
    for method in METHODS:
        of_it = [r for r in whole if r["method"] == method and "seed" in r]
        paces = [r["step_seconds"] for r in whole if (r["method"], r["role"]) == (method, "pace")]
        budget = of_it[0]["budget"]
        assert {r["steps"] for r in of_it} == {max(1, round(budget / pace)) for pace in paces}
        tuned = [r for r in of_it if r["role"] == "tune"]
        best = max(tuned, key=lambda r: (r["accuracy"], -r["loss"]))
        finals = [(r["lr"], r["seed"]) for r in of_it if r["role"] == "final"]
        assert finals == [(best["lr"], 1), (best["lr"], 2)] and {r["seed"] for r in tuned} == {0}
    more = call("--seeds", 3)
    assert [r["seed"] for r in more[len(whole) :]] == [3] * 3
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("by hand") and page.count("| tezo |") == 1 and "--seeds" not in page
    assert (tmp_path / "page.png").stat().st_size < 200_000
    monkeypatch.setattr(Trainer, "__init__", None)
    assert call("--seeds", 3, "--report") == more, "a report loads no model"


@pytest.mark.parametrize("method", methods.FORWARD_ONLY)
def test_state_bytes_are_those_of_a_run(method: str) -> None:
    model = tiny("opt").to(torch.bfloat16)
    fields = {"method": method, "lr": 1e-3, "rho": 1e-1}
    if method != "tezo-gn":  # which is for the fused probe
        fields["probe"] = "inplace"
    rank = {"rank": 5} if method.startswith("tezo") else {}
    engine = tezo_ds.initialize(model, {**fields, **rank})
    engine.step(make_batch(3))
    held = [packed.data for packed in engine.method.state.values()]
    for descent in getattr(engine.method, "_of_shards", {}).values():
        held += descent.state.values()
    shapes = {matrix.name: matrix.shape for matrix in engine.space.matrices}
    found = method_state.bytes_of(method, shapes, rank=5)
    assert found.state == sum(tensor.nbytes for tensor in held)
    assert found.weights == 2 * sum(m * n for m, n in shapes.values())
    assert TezoConfig(method=method).method in [row[0] for row in method_state.rows(shapes, 5)]
