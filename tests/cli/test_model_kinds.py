"""Encoder-decoder and sequence-classification models by the command line: trained, resumed, evaluated,
exported, and what of it has no sense refused in a line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from command_line import WORDS, Given, Run, assert_found_again, call, flags
from kinds import ENCODER_DECODERS, NO_TABLE, save_kind
from tokenizers import normalizers

from tezo_ds.training.session import open_result, open_session

pytest_plugins = ("cli_fixtures",)

TEXTS = [f"film {i} felt odd It was" for i in range(9)] + [*WORDS.values()] * 5
BERT, LLAMA = "BertForSequenceClassification", "LlamaForSequenceClassification"
NAMES = (*ENCODER_DECODERS, BERT, LLAMA)
EXCLUDE = {
    "T5": NO_TABLE,
    "Bart": ("*embed_positions*",),
}  # of no place in the fused probe, or an adapter


def model_of(given: Given, folder: Path, name: str, **config: Any) -> Given:
    named = not name.endswith("Classification") or "id2label" in config
    classes = {} if named else {"num_labels": 3}
    return Given(save_kind(folder / "model", name, TEXTS, **{**classes, **config}), given.data)


def refusal(capfd: pytest.CaptureFixture[str], *command: object) -> str:
    """Returns the one line by which a command is refused."""
    capfd.readouterr()
    assert call(*command) == 2
    lines = capfd.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("tezo-ds: error: ")]
    return line


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    more = {}
    if model.config.is_encoder_decoder:
        more = {"decoder_input_ids": torch.tensor([[2, 7, 30]])}
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, **more).logits
    return logits


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_resumed_evaluated_and_exported(
    given: Given, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, run = model_of(given, tmp_path, name), Run(tmp_path / "run")
    options: dict[str, Any] = {
        "rank": 2,
        "lr": 0.05,
        "exclude": EXCLUDE.get(name.partition("For")[0]),
    }
    assert call(*mine.train(run.path, steps=3, **options)) == 0
    assert call(*mine.train(run.path, steps=6, **options)) == 0
    assert run.summary["probe"] == "fused" and "adapter" not in run.summary
    at_once = Run(tmp_path / "at once")
    assert call(*mine.train(at_once.path, steps=6, **options)) == 0
    assert all(torch.equal(at_once.coefficients[k], v) for k, v in run.coefficients.items())
    assert_found_again(run, capsys, 1e-6)
    assert call("export", "--run", run.path, "--merged", tmp_path / "merged") == 0
    loader = transformers.AutoModelForSequenceClassification
    if name in ENCODER_DECODERS:
        loader = transformers.AutoModelForSeq2SeqLM
    merged = loader.from_pretrained(tmp_path / "merged").eval()
    ids = torch.tensor([[5, 9, 30, 60, 33]])
    base = loader.from_pretrained(mine.model).eval()
    before = logits_of(base, ids)
    adapted = peft.PeftModel.from_pretrained(base, run.path / "adapter").eval()
    expected = logits_of(merged, ids)
    close = 1e-4 * float(expected.abs().max())
    assert float((logits_of(adapted, ids) - expected).abs().max()) < close
    assert float((before - expected).abs().max()) > 50 * close
    kind = json.loads((run.path / "adapter" / "adapter_config.json").read_text())["task_type"]
    assert kind == ("SEQ_2_SEQ_LM" if name in ENCODER_DECODERS else None)
    capsys.readouterr()
    assert call("evaluate", *Given(tmp_path / "merged", given.data).task()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == pytest.approx(run.summary["test_loss_after"], rel=1e-5)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_answers_are_measured_and_shown(
    given: Given, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = model_of(given, tmp_path, name)
    rows = [{"prompt": f"film {i} felt", "completion": "odd great"} for i in range(30)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Run(tmp_path / "run")
    options = {
        "metric": "exact",
        "max_new_tokens": 5,
        "exclude": EXCLUDE[name.partition("For")[0]],
        "rank": 2,
    }
    asked = {"model": mine.model, "task": data, "output": run.path, "steps": 2, "batch_size": 3}
    assert call("train", *flags({**asked, **options})) == 0
    assert run.summary["accuracy_after"] is None and run.summary["metric_after"] == 0.0
    capsys.readouterr()
    assert call("evaluate", "--run", run.path) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    prompts = [word for row in rows for word in ("--prompt", row["prompt"])]
    assert call("generate", "--run", run.path, *prompts, "--max-new-tokens", 5) == 0
    said = capsys.readouterr().out
    assert len(answers) == 2 and all(answers) and all(f"\n{answer}\n" in said for answer in answers)


def test_the_output_layer_of_a_decoder_is_fitted(given: Given, tmp_path: Path) -> None:
    mine = model_of(given, tmp_path, ENCODER_DECODERS[0])
    for objective in ("choices", "lm"):
        run = Run(tmp_path / objective)
        options = {"objective": objective, "output_layer": "fit", "rank": 2, "exclude": NO_TABLE}
        assert call(*mine.train(run.path, **options, steps=1, lr=1e-9)) == 0
        fit = run.summary["output_layer"]
        assert fit["held_out_loss_after"] < fit["held_out_loss_before"]
        assert fit["states"] == fit["examples"] * (1 if objective == "choices" else 2)  # EOS, too


def test_classes_go_by_names_and_the_head_trains_or_not(given: Given, tmp_path: Path) -> None:
    names = {"good": 0, "mixed": 1, "bad": 2}
    ids = {number: name for name, number in names.items()}
    mine = model_of(given, tmp_path, LLAMA, id2label=ids, label2id=names, pad_token_id=None)
    for head in ("*score*", "*q_proj*"):
        run = Run(tmp_path / head.strip("*"))
        assert call(*mine.train(run.path, include=head, rank=2, steps=3)) == 0
        assert ["score" in name for name in run.coefficients] == ["score" in head] * len(
            run.coefficients
        )
    asked = open_result(run.path)
    opened = open_session(asked.settings, asked.config, None, asked.result.ranks)
    assert opened.engine.sharding.module.config.pad_token_id == opened.pad_id == 2
    numbers = {
        (example.label, e.number)
        for example, e in zip(opened.task.train, opened.encoded(), strict=True)
    }
    assert numbers == set(names.items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "choices"}, "--objective choices: .* sequence classification, whose loss"),
        ({"metric": "exact"}, "--metric exact: .* sequence classification, which generates nothing"),
        ({"output_layer": "fit"}, "output_layer: .* sequence classification, whose head has no rows"),
        ({"output_layer": "fit", "inner_layers": "auto"}, "inner_layers: .* without label words"),
    ],
)  # fmt: skip
def test_what_classes_have_no_sense_for_is_refused(
    given: Given,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    options: dict[str, str],
    words: str,
) -> None:
    mine = model_of(given, tmp_path, BERT)
    line = refusal(capfd, *mine.train(tmp_path / "run", rank=1, **options))
    assert re.search(words, line), line


def test_data_of_other_kinds_is_refused(
    given: Given, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bert = model_of(given, tmp_path / "bert", BERT)
    t5 = model_of(given, tmp_path / "t5", ENCODER_DECODERS[0])
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    files = {
        "texts": [{"text": f"film {i}"} for i in range(30)],
        "pairs": [{"prompt": f"film {i}", "completion": "odd"} for i in range(30)],
        "chats": [{"messages": [{"role": "user", "content": f"{i}"}, chat[1]]} for i in range(30)],
    }
    for file, rows in files.items():
        path = tmp_path / f"{file}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        line = refusal(capfd, "evaluate", "--model", bert.model, "--task", path)
        assert "sequence classification, and the task has no labels; give a template" in line
        if file != "pairs":
            line = refusal(capfd, "evaluate", "--model", t5.model, "--task", path)
            assert "is no prompt with an answer, as an encoder-decoder model takes" in line
    two = model_of(given, tmp_path / "two", BERT, num_labels=2)
    line = refusal(capfd, "evaluate", *two.task())
    assert "films: has 3 labels (bad, good, mixed), and the model 2 classes" in line
    line = refusal(
        capfd,
        *t5.train(tmp_path / "run", output_layer="fit", objective="choices", inner_layers="1"),
    )
    assert "inner_layers: " in line and "is an encoder-decoder model" in line


def test_labels_need_no_words(
    given: Given, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Labels that a causal model could not tell apart by their tokens are classes all the same."""
    rows = [{"text": f"film {i}", "label": ("Ok", "OK", "no")[i % 3]} for i in range(12)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in (BERT, ENCODER_DECODERS[0]):
        mine, run = model_of(given, tmp_path / name, name), Run(tmp_path / name / "run")
        tokenizer = transformers.AutoTokenizer.from_pretrained(mine.model)
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.save_pretrained(mine.model)
        options = {"model": mine.model, "task": data, "template": "{text}", "output": run.path}
        command = ["train", *flags({**options, "steps": 2, "batch_size": 3, "rank": 1})]
        if name == BERT:
            assert call(*command) == 0 and run.summary["accuracy_before"] is not None
        else:
            assert "makes the same tokens" in refusal(capfd, *command)
