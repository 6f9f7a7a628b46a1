"""examples/: each is short, is named, and runs at toy size. two_shardings.py runs in world_examples.py."""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_tokenizer import save_tiny_llama
from transformers import AutoModelForCausalLM

from tezo_ds.config.registry import METHODS

REPO = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((REPO / "examples").glob("*.py"))
Script = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_llama(folder, ["The film was a delight. It was great", "I left. It was terrible"])
    return folder


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    """Runs a script by its name as `python examples/…` does, in this process; gives its names."""
    before = dict(METHODS)

    def run(name: str, *words: object) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        return runpy.run_path(str(REPO / "examples" / name), run_name="__main__")

    yield run
    METHODS.clear()
    METHODS.update(before)


def test_own_loop_resumes_and_its_adapter_is_the_engine(
    script: Script, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script("own_loop.py", model, tmp_path / "out", 3)
    names = script("own_loop.py", model, tmp_path / "out", 5)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == list("01234")
    script("own_loop.py", model, tmp_path / "whole", 5)
    weights = Path("adapter", "adapter_model.safetensors")
    resumed, whole = (tmp_path / name / weights for name in ("out", "whole"))
    assert resumed.read_bytes() == whole.read_bytes()
    batch = names["batch_of"](names["AutoTokenizer"].from_pretrained(model), names["TEXTS"])
    assert 0 < int((batch["labels"] != -100).sum()) < int(batch["attention_mask"].sum())
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        plain = base(batch["input_ids"]).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
        assert not torch.equal(adapted(batch["input_ids"]).logits, plain)


def test_a_custom_method_steps_by_signs(
    script: Script, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(REPO / "examples"))
    engine = importlib.import_module("custom_method").main(str(model), 3)
    moved = engine.method.coefficients / 1e-4
    torch.testing.assert_close(moved, moved.round())
    assert set(engine.method.state) == {"coefficients", "average"} and moved.abs().max() == 3
    METHODS.pop("lion-tezo")
    script("custom_method.py", model, 2)  # by its other name
    assert capsys.readouterr().out.count("loss") == 5


def test_a_reward_moves_the_model(
    script: Script, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(REPO / "examples"))
    reward = importlib.import_module("reward")
    monkeypatch.setitem(reward.TEZO, "rho", 1.0)  # so that branches answer in other words
    assert len(set(reward.main(str(model), 3))) > 1
    assert reward.reward([""], ["Yes it is"], ["yes"]) == [1 - 0.09]
    script("reward.py", model, 1)
    assert capsys.readouterr().out.count("reward") == 4


def test_the_trainer_steps_evaluates_and_leaves_an_adapter(model: Path, tmp_path: Path) -> None:
    names = runpy.run_path(str(REPO / "examples" / "trainer.py"))
    trainer = names["main"](str(model), str(tmp_path), 5)
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert trainer.state.global_step == 5 and len(set(losses)) > 1
    peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter"
    )


def test_each_is_short_named_and_run() -> None:
    readmes = [(REPO / name).read_text() for name in ("examples/README.md", "README.md")]
    code = Path(__file__).read_text() + Path(__file__).with_name("world_examples.py").read_text()
    for path in SCRIPTS:
        assert len(path.read_text().splitlines()) < 60, path.name
        assert path.name in readmes[0] and f'"{path.name}"' in code, path.name
    assert "examples/README.md" in readmes[1]
