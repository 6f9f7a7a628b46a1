"""Tokens without a row in the embedding, and tokenizers without tokens to pad and to end texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from command_line import Given, Run, call

from tezo_ds.intake.tokens import embedding_rows, padding_id

pytest_plugins = ("cli_fixtures",)

Change = Callable[[Any], None]


def changed(given: Given, folder: Path, change: Change) -> Given:
    """Returns a copy of what there is, with another tokenizer."""
    shutil.copytree(given.model, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return Given(folder, given.data)


def new_pad(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})


def no_specials(tokenizer: Any) -> None:
    tokenizer.pad_token = tokenizer.eos_token = None


def extra(tokenizer: Any) -> None:
    tokenizer.add_tokens(["<extra>", "<unused>"])


@pytest.mark.parametrize("change", [new_pad, no_specials])
def test_any_token_pads(
    given: Given, plain: Run, tmp_path: Path, change: Change, caplog: pytest.LogCaptureFixture
) -> None:
    """Losses and accuracies are those of a run that pads with a token of the model."""
    odd = changed(given, tmp_path / "model", change)
    assert call(*odd.train(tmp_path / "run", eval_every=4)) == 0
    said = "is outside of the model's embedding of" in caplog.text
    assert said == (change is new_pad)
    run = Run(tmp_path / "run")
    assert [line["kappa"] for line in run.steps] == [line["kappa"] for line in plain.steps]
    for field in ("accuracy_after", "test_loss_after"):
        assert run.summary[field] == plain.summary[field]
    assert call("evaluate", "--run", run.path) == 0
    assert call("evaluate", *odd.task()) == 0


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", {"template": "{text} <extra> It was"}),
        ("train", {"verbalizers": {"bad": "<extra>", "good": "great", "mixed": "okay"}}),
        ("evaluate", {"template": "{text} <extra> It was"}),
    ],
    ids=str,
)
def test_a_token_without_a_row(
    given: Given, tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str, options: Any
) -> None:
    odd = changed(given, tmp_path / "model", extra)
    words = [word for name, value in options.items() for word in
             (f"--{name}", value if isinstance(value, str) else json.dumps(value))]  # fmt: skip
    start = odd.train(tmp_path / "run") if command == "train" else ["evaluate", *odd.task()]
    assert call(*start, *words) == 2
    (line,) = [li for li in capfd.readouterr().err.splitlines() if li.startswith("tezo-ds: error")]
    assert "token '<extra>' (id " in line
    assert "embedding has" in line
    assert "resize_token_embeddings" in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_token_without_a_row_that_no_text_has(given: Given, tmp_path: Path) -> None:
    odd = changed(given, tmp_path / "model", extra)
    assert call(*odd.train(tmp_path / "run", steps=1)) == 0


def test_a_model_with_more_rows_than_tokens(given: Given) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(given.model)
    rows = embedding_rows(model)
    assert rows == len(tokenizer)
    model.resize_token_embeddings(rows + 9)
    assert embedding_rows(model) == rows + 9
    assert padding_id(tokenizer, rows) == tokenizer.pad_token_id
