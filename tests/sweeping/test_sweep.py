"""`tezo-ds sweep`: its runs are those of `tezo-ds train`, its choice goes by their losses, and it goes on."""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from command_line import Given, Run, call, flags
from PIL import Image

from tezo_ds.cli.several import trials_of
from tezo_ds.cli.train import train
from tezo_ds.errors import ConfigError, ProbeError
from tezo_ds.sweeping import halving, runs
from tezo_ds.sweeping.results import FILE, PICTURE

pytest_plugins = ("cli_fixtures",)
STEPS, RUNGS = 6, (3, 6)


def words_of(given: Given, output: Path, *more: object, **options: Any) -> list[object]:
    known = {"output": output, "batch_size": 4, "validation_examples": 8, **options}
    return [*given.task(), *flags(known), *more]


@dataclass(frozen=True)
class Swept:
    """A sweep that was stopped in its fourth run and has gone on."""

    path: Path
    out: str
    models: int  # that both processes have loaded
    asked: list[object]

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = json.loads((self.path / FILE).read_text())["results"]
        return found


@pytest.fixture(scope="module")
def swept(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    path = tmp_path_factory.mktemp("swept") / "rates"
    asked = words_of(
        given,
        path,
        "--lr",
        "1e-4",
        "2e-3",
        "--seed",
        "0",
        "1",
        steps=STEPS,
        rank=4,
        schedule="linear",
    )
    opened, made = [], []
    run, open_session = runs.running.run, runs.open_session

    def stop_in_the_fourth(*arguments: Any) -> Any:
        made.append(arguments)
        if len(made) == 4:
            raise KeyboardInterrupt
        return run(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr(
            runs, "open_session", lambda *a, **k: (opened.append(a), open_session(*a, **k))[1]
        )
        patch.setattr(
            "rich.console.Console.print", lambda self, text, **_: lines.append(_plain(text))
        )
        with patch.context() as stopping:
            stopping.setattr(runs.running, "run", stop_in_the_fourth)
            assert call("sweep", *asked) != 0
        assert len(list(path.iterdir())) == 4  # three runs, and sweep.json
        assert call("sweep", *asked) == 0
    return Swept(path, "\n".join(lines), len(opened), asked)


def _plain(thing: Any) -> str:
    """Returns a text as it is, and a table's cells."""
    if isinstance(thing, str):
        return thing
    columns = [[str(cell) for cell in column.cells] for column in thing.columns]
    rows = [" | ".join(row) for row in zip(*columns, strict=True)]
    return "\n".join([str(thing.title), *rows])


def test_the_best_run_is_that_of_the_command_it_prints(
    swept: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, though the model was loaded for another run, and the run was made in two pieces."""
    (command,) = re.findall(r"the same alone +(.*)", swept.out)
    (best,) = re.findall(r"best run +(.*)", swept.out)
    monkeypatch.chdir(tmp_path)
    assert call(*shlex.split(command)[1:]) == 0
    alone, run = Run(tmp_path / "runs" / "best"), Run(Path(best))
    for name in ("step", "kappa", "loss", "lr"):
        assert [line[name] for line in run.steps] == [line[name] for line in alone.steps]
    assert len(run.steps) == STEPS and run.config["tezo"] == alone.config["tezo"]
    found = run.coefficients
    assert all(torch.equal(found[name], part) for name, part in alone.coefficients.items())
    for name in ("validation_loss_after", "accuracy_after"):
        assert run.summary[name] == alone.summary[name]


def test_one_model_is_loaded_and_nothing_is_made_twice(swept: Swept) -> None:
    assert swept.models == 2  # one in each process
    lines = re.findall(r"^(lr=\S+): validation loss .* after (\d) steps$", swept.out, re.M)
    assert len(lines) == len(set(lines)) == 6
    assert (swept.path / "lr=1e-4,seed=0").is_dir()


def test_the_half_of_the_lower_loss_goes_on(swept: Swept) -> None:
    def mean(lr: str, steps: int) -> float:
        scores = [swept.results[f"lr={lr},seed={seed}"].get(str(steps)) for seed in (0, 1)]
        return sum(score["loss"] for score in scores if score) / 2

    rates = sorted(("1e-4", "2e-3"), key=lambda lr: mean(lr, 3))
    for lr, steps in ((rates[0], STEPS), (rates[1], 3)):
        for seed in (0, 1):
            run = Run(swept.path / f"lr={lr},seed={seed}")
            assert len(run.steps) == steps == max(map(int, swept.results[run.path.name]))
    rows = swept.out.split("mean validation loss after so many steps\n")[1].splitlines()[:2]
    by_rate = {row.split(" | ")[0]: row for row in rows}
    assert by_rate[rates[0]].endswith("best") and by_rate[rates[1]].endswith("dropped")
    assert f"{mean(rates[0], STEPS):.3f} ±" in by_rate[rates[0]]
    with Image.open(swept.path / PICTURE) as picture:
        assert picture.size[0] > 400


def test_a_sweep_of_other_options_is_refused(
    swept: Swept, given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("sweep", *swept.asked, "--rho", "1e-2") == 2
    assert "is of a sweep of other arguments" in capsys.readouterr().err
    assert call("sweep", *words_of(given, tmp_path, steps=2)) == 0  # of one run
    capsys.readouterr()
    (tmp_path / FILE).unlink()
    assert call("sweep", *words_of(given, tmp_path, steps=2)) == 2
    assert "and no sweep; choose another --output" in capsys.readouterr().err
    assert call("sweep", *words_of(given, tmp_path / "new"), "--steps", "2", "3") == 2
    assert "--steps has several values" in capsys.readouterr().err
    assert call("sweep", *words_of(given, tmp_path / "new"), "--keep", "last", "best") == 2
    assert "--keep best chooses among evaluations" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_weights_that_a_run_wrote_are_loaded_anew(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kappas(output: Path) -> list[Any]:
        options = {"steps": 2, "method": "mezo", "seed": 3, "save_model": False, "halvings": 0}
        rates = ("--lr", "1e-4", "1e-3")
        assert call("sweep", *words_of(given, output, *rates, **options)) == 0
        return [line["kappa"] for line in Run(output / "lr=1e-3").steps]

    options = {"steps": 2, "method": "mezo", "seed": 3, "save_model": False, "lr": 1e-3}
    assert call("train", *words_of(given, tmp_path / "alone", **options)) == 0
    expected = [line["kappa"] for line in Run(tmp_path / "alone").steps]
    assert kappas(tmp_path / "sweep") == expected
    monkeypatch.setattr(runs, "spoils", lambda engine: False)
    assert kappas(tmp_path / "spoilt") != expected


def test_a_run_that_fails_is_the_worst(
    given: Given,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = runs.running.run

    def fail(options: Any, settings: Any, config: Any, *rest: Any) -> Any:
        if config.lr == 1e-4:
            raise ProbeError("directions failed")
        return run(options, settings, config, *rest)

    monkeypatch.setattr(runs.running, "run", fail)
    asked = words_of(given, tmp_path, "--lr", "1e-4", "1e-3", steps=2, validation_examples=None)
    assert call("sweep", *asked) == 0
    out = capsys.readouterr().out
    assert "lr=1e-4: failed (directions failed) after 1 steps" in out
    assert f"best run           {tmp_path / 'lr=1e-3'}" in out.replace("\n", "")
    assert "by the test examples, as there are no validation examples" in out


def test_settings_are_compared_by_the_mean_of_their_seeds() -> None:
    a, b, c = ((("lr", rate),) for rate in "123")
    losses = {a: [1.0, 3.0], b: [0.5, 1.0], c: [0.1, None]}
    assert halving.ranked(losses) == [b, a, c] and halving.better_half(losses) == [a, b]
    assert halving.mean_of([1.0, math.nan]) == math.inf == halving.mean_of([])
    assert halving.better_half({a: [math.inf], b: [math.inf], c: [1.0]}) == [a, c]
    assert halving.rungs_of(1000, 2, 9) == [250, 500, 1000]
    assert halving.rungs_of(1000, 2, 2) == [500, 1000] and halving.rungs_of(1000, 2, 1) == [1000]
    assert halving.rungs_of(3, 4, 99) == [1, 3] and halving.rungs_of(7, 0, 9) == [7]


def test_several_values_of_every_kind_of_option() -> None:
    reader = typer.Typer()
    reader.command()(train)
    command = typer.main.get_command(reader)

    def values(text: str) -> list[dict[str, str]]:
        return [dict(trial.values) for trial in trials_of(shlex.split(text), command)]

    assert values("--model m --steps 5") == [{}]
    assert values("--lr 1 2 --seed 0 1") == [
        {"lr": lr, "seed": seed} for lr in "12" for seed in "01"
    ]
    assert values("--lr=1 --lr=2") == [{"lr": "1"}, {"lr": "2"}]
    pairs = trials_of(shlex.split("--betas 0.9 0.99 0.9 0.999 --rank 4"), command)
    assert [dict(trial.values) for trial in pairs] == [
        {"betas": "0.9 0.99"}, {"betas": "0.9 0.999"}
    ]  # fmt: skip
    assert pairs[1].words == ("--betas", "0.9", "0.999", "--rank", "4")
    (both,) = trials_of(shlex.split("--include a* --include b*"), command)
    assert both.words == ("--include", "a*", "--include", "b*")
    assert values("--include a* b*") == [{"include": "a*"}, {"include": "b*"}]
    assert values("--train-vectors --no-train-vectors") == [
        {"train_vectors": "on"}, {"train_vectors": "off"}
    ]  # fmt: skip
    assert trials_of(["--include", "model.*/x", "b"], command)[0].name == "include=model.__x"
    for text, message in (
        ("--lrr 1", "no such option: --lrr"), ("--output a", "no such option: --output"),
        ("--resume", "no such option: --resume"), ("lr 1", "no such option: lr"),
        ("--lr", "--lr takes a value .got none."), ("--betas 1 2 3", "--betas takes 2 values each time"),
        ("--train-vectors 1", "--train-vectors takes no value"), ("--lr 1 1", "a value is given twice"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            values(text)
