"""Models that would see the answer: masked ones get a mask, others that are not causal are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import save
from command_line import WORDS, Given, Run, call
from tiny import tiny

import tezo_ds
from tezo_ds.intake.causality import looks_ahead

pytest_plugins = ("cli_fixtures",)

TEXTS = [f"film {i} felt odd It was {word}" for i in range(9) for word in WORDS.values()]


def given_model(given: Given, folder: Path, name: str, **more: object) -> Given:
    return Given(save(folder, name, TEXTS, **more), given.data)  # type: ignore[arg-type]


def assert_refused(capfd: pytest.CaptureFixture[str], command: list[object], *telling: str) -> None:
    capfd.readouterr()
    assert call(*command) == 2
    err = capfd.readouterr().err.splitlines()
    assert len([line for line in err if line.startswith("tezo-ds: error: ")]) == 1, err
    assert all(words in err[-1] for words in telling), err


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM", "DistilBertForMaskedLM"])
def test_a_masked_model_trains_on_masks(given: Given, tmp_path: Path, name: str) -> None:
    masked = given_model(given, tmp_path / "model", name)
    run = Run(tmp_path / "run")
    assert call(*masked.train(run.path, rank=1)) == 0
    assert run.summary["status"] == "finished"
    assert call(*masked.train(run.path, steps=9, rank=1)) == 0  # goes on, with the same examples
    assert call("evaluate", "--run", run.path) == 0
    assert (
        json.loads((run.path / "adapter" / "adapter_config.json").read_text())["task_type"] is None
    )


def test_choices_of_a_masked_model(given: Given, tmp_path: Path) -> None:
    masked = given_model(given, tmp_path / "model", "BertForMaskedLM")
    run = Run(tmp_path / "run")
    assert call(*masked.train(run.path, objective="choices", rank=1)) == 0
    assert run.steps[0]["loss"] < 3  # ln 3 of three words, not ln 400 of all


@pytest.mark.parametrize(
    ("name", "fields", "cure"),
    [
        ("BertForPreTraining", {}, '"architectures": ["BertForMaskedLM"]'),
        ("BertForMaskedLM", {"architectures": None}, '"architectures": ["BertForMaskedLM"]'),
        ("RobertaForMaskedLM", {"architectures": ["?"]}, '"architectures": ["RobertaForMaskedLM"]'),
        ("BertLMHeadModel", {}, "use a causal model, or write"),
        ("ElectraForCausalLM", {}, "use a causal model, or write"),
        ("XLNetLMHeadModel", {}, "use a causal model"),
    ],
)
def test_a_model_that_sees_ahead_is_refused(
    given: Given,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    fields: dict[str, object],
    cure: str,
) -> None:
    wrong = given_model(given, tmp_path / "model", name, fields=fields)
    for command in (wrong.train(tmp_path / "run", rank=1), ["evaluate", *wrong.task()]):
        assert_refused(capfd, command, "is not causal: it sees the answer", cure)
    if '"architectures"' in cure and name != "XLNetLMHeadModel":
        named = cure.split('["')[1].split('"')[0]
        config = json.loads((wrong.model / "config.json").read_text())
        (wrong.model / "config.json").write_text(json.dumps({**config, "architectures": [named]}))
        assert call(*wrong.train(tmp_path / "cured", rank=1)) == 0


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("GPT2LMHeadModel", {}),
        ("LlamaForCausalLM", {"architectures": None}),
        ("BertLMHeadModel", {"is_decoder": True}),
    ],
)
def test_a_causal_model_passes(
    given: Given, tmp_path: Path, name: str, fields: dict[str, object]
) -> None:
    right = given_model(given, tmp_path / "model", name, mask=False, fields=fields)
    assert call("evaluate", *right.task()) == 0


def test_a_masked_model_needs_a_mask_token(
    given: Given,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    masked = given_model(given, tmp_path / "model", "BertForMaskedLM", mask=False)
    said = "BertForMaskedLM is a masked model, and its tokenizer has no mask token"
    for command in (masked.train(tmp_path / "run", rank=1), ["evaluate", *masked.task()]):
        assert_refused(capfd, command, said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "opt", "neox", "gpt2", "mixtral", "qwen-moe"])
def test_rounding_is_not_taken_for_sight(kind: str, dtype: torch.dtype) -> None:
    engine = tezo_ds.initialize(
        tiny(kind).to(dtype), {"rank": 2, "include": ["*q_proj*", "*attn*", "*query*"]}
    )
    for ids in ([5, 6, 7, 8, 9, 10, 11, 12, 13], [5], [5, 5], [0]):
        assert not looks_ahead(engine, ids)


@pytest.mark.parametrize("ids", [[5, 6, 7, 8, 9, 10], [5], [5, 5], [0]])
def test_a_masked_model_would_be_seen_to_look_ahead(ids: list[int]) -> None:
    engine = tezo_ds.initialize(tiny("roberta"), {"rank": 2})
    assert looks_ahead(engine, ids)
