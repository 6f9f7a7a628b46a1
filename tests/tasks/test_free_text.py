"""Answers in free text: an evaluation measures their loss alone, and says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Run, call, flags
from tiny import tiny
from tiny_tokenizer import save_tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tezo_ds.config import TezoConfig
from tezo_ds.settings import Settings
from tezo_ds.tasks import spec
from tezo_ds.training.session import Session, open_session

NOTE = (
    "evaluations measure the loss alone: 300 different answers are taken for free text (above 256)"
)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Returns the settings of 300 questions, each with an answer of its own."""
    folder = tmp_path_factory.mktemp("free")
    rows = [{"prompt": f"Q {i}?", "completion": f"there are {i} films"} for i in range(300)]
    (folder / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_tiny_llama(folder / "model", [f"{row['prompt']} {row['completion']}" for row in rows])
    named = {"model": str(folder / "model"), "task": str(folder / "r.jsonl")}
    return {**named, "template": "{prompt}", "label_field": "completion"}


def opened(given: dict[str, Any], **more: Any) -> Session:
    return open_session(Settings(**{**given, **more}), TezoConfig(rank=2), None)


def test_a_sequence_an_example_and_the_same_loss(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = opened(given, test_examples=6)
    evaluator = session.evaluator()
    assert evaluator is not None and (evaluator.loss_alone or "").startswith(NOTE)
    assert len(evaluator.encoded) == 6
    score = evaluator()
    assert score.accuracy is None and score.examples == 6
    monkeypatch.setattr(spec, "MOST_CHOICES", 300)
    picking = session.evaluator()
    assert picking is not None and picking.loss_alone is None
    assert len(picking.encoded) == 6 * 300
    compared = picking()
    assert compared.accuracy is not None
    assert compared.loss == pytest.approx(score.loss, rel=1e-4)


def test_words_that_were_given_are_picked_from(given: dict[str, Any]) -> None:
    words = {f"there are {i} films": f"exactly {i}" for i in range(300)}
    evaluator = opened(given, verbalizers=words, test_examples=2).evaluator()
    assert evaluator is not None and evaluator.loss_alone is None
    assert len(evaluator.encoded) == 2 * 300


def test_labels_of_one_token_are_picked_from(given: dict[str, Any], tmp_path: Path) -> None:
    """However many there are, an example is one sequence."""
    names = ["[PAD]", "Q", *(f"w{i}" for i in range(300))]
    inner = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="Q"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="Q")
    rows = [{"prompt": f"Q w{i}", "completion": f"w{i}"} for i in range(300)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny().config
    config.vocab_size = len(names)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    named = {"model": str(tmp_path / "model"), "task": str(tmp_path / "r.jsonl")}
    evaluator = opened(given, **named, test_examples=5).evaluator()
    assert evaluator is not None and evaluator.loss_alone is None
    assert len(evaluator.encoded) == 5 and evaluator().accuracy is not None


def test_run_and_evaluation_from_the_command_line(
    given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"steps": 2, "batch_size": 4, "rank": 2, "eval_every": 1, "output": tmp_path / "run"}
    assert call("train", *flags({**given, **more})) == 0
    assert capsys.readouterr().out.count(NOTE) == 1
    run = Run(tmp_path / "run")
    assert run.summary["accuracy_after"] is None and run.summary["test_loss_after"] > 0
    scores = [line for line in run.lines if "test_loss" in line]
    assert len(scores) == 3 and {line["test_accuracy"] for line in scores} == {None}
    assert call("evaluate", "--run", tmp_path / "run") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["accuracy"] is None and err.count(NOTE) == 1
    assert json.loads(out)["loss"] == pytest.approx(run.summary["test_loss_after"], rel=1e-5)


def test_choices_among_free_text_are_refused_in_a_short_line(
    given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {
        "objective": "choices",
        "rank": 2,
        "steps": 2,
        "batch_size": 4,
        "output": tmp_path / "run",
    }
    assert call("train", *flags({**given, **more})) == 2
    err = capsys.readouterr().err
    assert "all different; the 300 words ['there are 0 films', " in err and len(err) < 400
