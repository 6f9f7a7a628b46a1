"""Wrong input of every kind: exit code 2 and one line that names the fix."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from command_line import Given, Run, call, finish, start

from tezo_ds.run.folder import COEFFICIENTS, LOCK

pytest_plugins = ("cli_fixtures",)

ZERO3 = {"zero_optimization": {"stage": 3}}


class Refusal:
    """A call of the command line, which must refuse in one line of stderr."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, arguments: Sequence[object], *telling: str) -> None:
        self._capfd.readouterr()
        code = call(*arguments)
        assert_one_line(code, self._capfd.readouterr().err, telling)


def assert_one_line(code: int, err: str, telling: Sequence[str]) -> None:
    assert code == 2, err
    assert err.startswith("tezo-ds: error: ")
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    assert "Traceback" not in err
    for words in telling:
        assert words in err


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refusal:
    return Refusal(capfd)


@pytest.mark.parametrize(
    ("content", "telling"),
    [
        (ZERO3, ['"tezo" block is missing; add one, e.g. "tezo": {"rank": 16}']),
        (
            {**ZERO3, "tezo": {"rnak": 4}},
            ["unknown field 'rnak'", "one of: method, rank, rank_threshold"],
        ),
        ({**ZERO3, "tezo": {"rho": 0}}, ["rho: Input should be greater than 0 (got 0)"]),
        ({**ZERO3, "tezo": 4}, ["must be an object, is a int"]),
        ('{"tezo": {},}', ["not valid JSON", "line 1"]),
        ("[]", ["must hold a JSON object, holds a list"]),
        ({"zero_optimization": {"stage": 1}, "tezo": {}}, ["stage is 1", "set it to 3"]),
        ({"zero_optimization": {"stage": 2}, "tezo": {}}, ["stage is 2", "set it to 3"]),
        ({"tezo": {}}, ["stage is 0", "set it to 3"]),
    ],
)
def test_deepspeed_json(
    given: Given, tmp_path: Path, refused: Refusal, content: Any, telling: list[str]
) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "ds.json").write_text(text)
    arguments = given.train(tmp_path / "run", deepspeed=tmp_path / "ds.json")
    refused(arguments, *telling)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "telling"),
    [
        (
            {"schedule": "cosin"},
            ["schedule: ", "must be one of constant, linear, cosine (got 'cosin')"],
        ),
        ({"warmup_steps": 9}, ["warmup_steps: 9 is more than total_steps 6"]),
        ({"include": "*nothing*"}, ["no parameter trains", "*nothing*"]),
        ({"output": None}, ["--output is missing; add it, e.g."]),
        ({"dtype": "int3"}, ["--dtype: ", "'bfloat16'", "(got 'int3')"]),
        ({"max_length": 1}, ["--max-length: ", "greater than or equal to 2 (got 1)"]),
        ({"verbalizers": "terrible"}, ["--verbalizers is not valid JSON"]),
        ({"verbalizers": '["a", "b"]'}, ["--verbalizers must be a JSON object, e.g. {"]),
        ({"verbalizers": '{"bad": "x", "good": "y"}'}, ["label 'mixed' has no word", "bad, good"]),
        ({"label_field": "stars"}, ["label_field names column 'stars'; there are: text, label"]),
        ({"deepspeed": "no.json"}, ["no.json: cannot be read", "check the path"]),
    ],
)
def test_options(
    given: Given, tmp_path: Path, refused: Refusal, options: dict[str, Any], telling: list[str]
) -> None:
    output = tmp_path / "run"
    refused(given.train(**{"output": output, **options}), *telling)
    assert not output.exists()


def test_what_must_be_given(given: Given, tmp_path: Path, refused: Refusal) -> None:
    refused(["train", "--output", tmp_path / "run", "--task", given.data], "--model is missing")
    refused(["train", "--output", tmp_path / "run", "--model", given.model], "--task is missing")
    refused(["evaluate"], "--model is missing")
    refused(["evaluate", "--model", given.model], "--task is missing")


def test_model_and_data_files(given: Given, tmp_path: Path, refused: Refusal) -> None:
    missing = str(tmp_path / "no-model")
    refused(
        Given(Path(missing), given.data).train(tmp_path / "run"),
        f"cannot load a model from '{missing}'", "give a folder made by save_pretrained",
    )  # fmt: skip
    (tmp_path / "empty.jsonl").touch()
    refused(
        Given(given.model, tmp_path / "empty.jsonl").train(tmp_path / "run"),
        "empty.jsonl: the file is empty",
    )


def test_a_folder_without_weights(given: Given, tmp_path: Path, refused: Refusal) -> None:
    (tmp_path / "model").mkdir()
    for path in given.model.iterdir():
        if path.suffix == ".json":
            (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    broken = Given(tmp_path / "model", given.data)
    refused(broken.train(tmp_path / "run"), "cannot load a model", "model.safetensors")


def times(folder: Path) -> dict[str, int]:
    """Returns when each file was written, but for the lock file, which holds a process's number."""
    return {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.name != LOCK}


def test_run_folders(given: Given, plain: Run, tmp_path: Path, refused: Refusal) -> None:
    before = times(plain.path)
    again = given.train(plain.path, resume=False)
    refused(again, "holds a run already; choose another --output")
    assert times(plain.path) == before
    (tmp_path / "file").touch()
    refused(given.train(tmp_path / "file" / "run"), "cannot be written")
    refused(["evaluate", "--run", tmp_path], "config.json: cannot be read", "check the path")
    (tmp_path / "config.json").write_text("{}")
    refused(["evaluate", "--run", tmp_path], "is it a run folder?")
    (tmp_path / "config.json").write_text(json.dumps({**plain.config, "settings": {"modle": "x"}}))
    refused(["evaluate", "--run", tmp_path], "config.json", "modle")
    (tmp_path / "config.json").write_text(json.dumps(plain.config))
    refused(
        ["evaluate", "--run", tmp_path], f"{COEFFICIENTS} does not exist", "is it a run folder?"
    )


def test_no_test_examples(given: Given, refused: Refusal) -> None:
    arguments = ["evaluate", *given.task(), "--test-fraction", 0]
    refused(arguments, "no test examples; pass --test-data or a --test-fraction above 0")


@pytest.mark.slow
def test_a_real_process_says_no_more(given: Given, tmp_path: Path) -> None:
    arguments = Given(tmp_path / "no-model", given.data).train(tmp_path / "run")
    code, out, err = finish(start(sys.executable, "-m", "tezo_ds", *arguments))
    assert_one_line(code, err, ["cannot load a model", "hub name"])
    assert out == ""


def test_export(given: Given, plain: Run, tmp_path: Path, refused: Refusal) -> None:
    out, run = tmp_path / "out", ["--run", plain.path]
    refused(["export", "--merged", out], "--run is missing; name the folder of a run")
    refused(["export", *run], "--merged or --adapter is missing; name a folder to write")
    refused(["export", *run, "--merged", out, "--adapter", out], "choose two folders")
    refused(["export", *run, "--merged", out, "--dtype", "int3"], "--dtype: ", "(got 'int3')")
    for what in ("--merged", "--adapter"):
        refused(["export", *run, what, plain.path], "is not an empty folder; choose another")
    refused(["export", "--run", tmp_path, "--merged", out], "config.json: cannot be read")
    (tmp_path / "config.json").write_text(json.dumps(plain.config))
    refused(["export", "--run", tmp_path, "--merged", out], "does not exist", "is it a run folder?")
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "tezo": {}}))
    options = ["--merged", out, "--deepspeed", tmp_path / "ds.json"]
    refused(["export", *run, *options], "stage is 2", "set it to 3")
    (tmp_path / "file").touch()
    refused(["export", *run, "--merged", tmp_path / "file" / "out"], "file/out: cannot be written")
    refused(["export", *run, "--adapter", tmp_path / "file" / "out"], "cannot be written")
    assert not out.exists()
