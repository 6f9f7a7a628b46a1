"""The benchmarks of what a run learns: their command lines, budgets and tables, and the fits by depth."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import depth
import learning
import pytest
import torch
from command_line import WORDS, Given
from parts.learning import first_order
from parts.learning.arguments import DEFAULT_ARMS, arguments, command, of_arm
from parts.learning.arms import OTHERS, Arm, arms_of
from parts.learning.clocked import run_for
from parts.learning.report import markdown, markers
from parts.methods.report import Results
from rich.console import Console
from tiny import tiny

from tezo_ds.cli import app

pytest_plugins = ("cli_fixtures",)


class Told(learning.Benchmark):
    """The benchmark with runs that take 10 processor seconds, 2 more a step, and 30 more with a fit."""

    calls: ClassVar[list[tuple[str, str, int, float, str, int]]] = []

    def _call(
        self, task: str, arm: Arm, seed: int, factor: float, split: str, steps: int, most: int
    ) -> dict[str, Any]:
        self.calls.append((task, arm.name, seed, factor, split, steps))
        seconds = 10.0 + 2 * max(1, steps) + 30 * (arm.head == "fit")
        loss = abs(factor - 1000) + 1  # the second rate is the best
        return {
            "accuracy": 0.5 + seed / (50 if steps else 100), "loss": loss, "zero_shot": 0.2, "majority": 0.3,
            "head": None,
            "steps_made": steps,
            "seconds": seconds, "machine": f"here, 2 cores; commit {seed}",
        }  # fmt: skip


def benchmark_of(tmp_path: Path, *words: str) -> Told:
    Told.calls = []
    out = tmp_path / "learning.jsonl"
    args = arguments("").parse_args(["--out", str(out), "--cache", str(tmp_path), *words])
    return Told(args, Results(out), Console(quiet=True))


def test_budgets_count_what_a_fit_takes_and_finished_runs_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "load_splits", lambda *_: None)
    words = ["--tasks", "sms", "--arms", "fit+mezo", "fit", "--budget", "130", "--seeds", "2"]
    told = benchmark_of(tmp_path, *words)
    told.run()
    finals = [c for c in told.calls if c[4] == "test"]
    # (130 - 30) / 2 steps behind the fit, at the second of five rates, tuned on another task.
    assert finals == [
        ("sms", "fit + mezo", 1, 1000.0, "test", 50), ("sms", "fit", 1, 1.0, "test", 0),
        ("sms", "fit + mezo", 2, 1000.0, "test", 50), ("sms", "fit", 2, 1.0, "test", 0),
    ]  # fmt: skip
    assert sum(c[0] == "trec" and c[4] == "valid" and c[5] == 50 for c in told.calls) == 5
    again = benchmark_of(tmp_path, *words)
    again.run()
    assert again.calls == []
    page = tmp_path / "page.md"
    page.write_text("\n".join(["before", *markers("late"), "after"]))
    out = ["--out", str(tmp_path / "learning.jsonl"), "--page", str(page), "--part", "late"]
    learning.main([*words, *out, "--report"])
    text = page.read_text()
    assert (
        "| fit + mezo | 53.0 | 12.7 | +1.5 ± 6.4 | 1.000 ± 0.000 | -999.000 ± 0.000 | 2 |" in text
    )
    assert "| most frequent class | 30.0 |" in text and "| zero-shot | 20.0 | 0.0 |" in text
    assert "| fit | 51.5 | 6.4 |  | " in text and "Machine: here, 2 cores; commits 1, 2." in text
    assert text.startswith("before") and text.endswith("after")
    learning.main([*words, *out, "--report", "--compact"])
    assert "| sms |\n| --- | --- |\n| most frequent class | 30.0 |" in (text := page.read_text())
    assert "| zero-shot | 20.0 ± 0.0 |\n| fit + mezo | 53.0 ± 12.7; 1.000 |\n" in text
    assert page.with_name("page-late.png").stat().st_size > 1000 and "(page-late.png)" in text


def test_a_table_of_all_tasks_keeps_the_order_of_the_arms() -> None:
    run = {
        "accuracy": 0.5, "loss": 1.0, "zero_shot": None, "seed": 1, "steps_made": 1, "seconds": 1.0,
        "machine": "here",
    }  # fmt: skip
    arms = {
        "sms": ["frozen+mezo", "frozen+lozo"],
        "trec": ["bias", "frozen+mezo", "fit", "frozen+lozo"],
    }
    lines = [(task, arm, [run]) for task, words in arms.items() for arm in arms_of(words)]
    table = markdown(lines, "command", "picture.png", "", compact=True).split("\n\n")[2]
    head, _, *rows = table.splitlines()
    assert head == "| accuracy, %; loss | sms | trec |"
    assert [row.split(" | ")[0] for row in rows] == ["| bias", "| mezo", "| fit", "| lozo"]


def test_rates_are_tried_until_the_best_has_a_worse_one_on_either_side() -> None:
    def tried(loss_of: Callable[[float], float]) -> list[float]:
        losses: dict[float, float] = {}
        while (factor := learning.next_factor(losses)) is not None and len(losses) < 9:
            losses[factor] = loss_of(factor)
        return list(losses)

    assert tried(lambda f: abs(f - 1000)) == [100, 1000, 10000, 3000, 333]
    assert tried(lambda f: abs(f - 300)) == [100, 1000, 10, 300, 33.3]
    assert tried(lambda f: math.inf if f >= 100 else abs(f - 10)) == [100, 1000, 10, 1, 30, 3.33]


def test_every_arm_is_a_command_line_that_train_takes() -> None:
    (train,) = (c for c in app.registered_commands if c.callback and c.callback.__name__ == "train")
    for arm in arms_of([*DEFAULT_ARMS, *(f"frozen+{steps}" for steps in OTHERS)]):
        flags = arm.flags(10.0, {"seed": 1, "output_layer_examples": 5})
        names = [word for word in flags if word.startswith("--")]
        assert len(set(names)) == len(names)
        fields = {name[2:].replace("-", "_") for name in names}
        assert fields <= set(train.callback.__signature__.parameters), fields
    assert Arm("frozen", "none").name == "zero-shot"


def test_fits_by_depth_find_where_words_can_be_told_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(300) % 3
    noise = torch.randn(300, 12, generator=generator)
    clear = noise + 4 * torch.nn.functional.one_hot(truth, 12)
    clear[:, 5] *= 1e3  # whose size says nothing
    seen = [
        depth.Seen({"1": noise[p], "2": clear[p]}, truth[p]) for p in (range(200), range(200, 300))
    ]
    (_, _, _, chance), (_, _, loss, right) = (depth.judged(*seen, place, 3) for place in ("1", "2"))
    assert chance < 0.6 and right > 0.95 and loss < 0.2


def test_places_are_what_enters_the_last_linear_map_of_a_block() -> None:
    model = tiny("llama")
    with depth.watching(depth.places_of(model, [0, 1])) as last, torch.no_grad():
        hidden = model.model(input_ids=torch.arange(5, 12)[None]).last_hidden_state
        model(input_ids=torch.arange(5, 12)[None])
    assert {name: x.shape[-1] for name, x in last.items()} == {"0": 37, "1": 37, depth.OUTPUT: 22}
    torch.testing.assert_close(last[depth.OUTPUT], hidden)


@pytest.mark.parametrize("way", first_order.WAYS)
def test_backpropagation_is_compared_with(
    given: Given, way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it reports is of the model as it was trained, so a longer budget has a lower loss."""
    for name, lines in (("train", slice(20, None)), ("test", slice(0, 20))):
        films = given.data.read_text().splitlines()[lines]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(films))
    data = ["--task", str(tmp_path / "train.jsonl"), "--test-data", str(tmp_path / "test.jsonl")]
    data += ["--template", "{text} It was"]
    words = ["--way", way, "--lr", "3e-3", "--model", str(given.model), *data]
    words += ["--verbalizers", json.dumps(WORDS), "--test-examples", "20"]
    found = []
    for budget in ("0", "0.3"):
        first_order.main([*words, "--budget", budget])
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    before, after = found
    assert before["steps_made"] == 0 < after["steps_made"] and after["loss"] < before["loss"] - 0.1
    assert 0.3 <= after["seconds"] < 5 and before["majority"] == after["majority"] <= 0.6


def test_a_run_by_the_clock_is_stopped_when_its_steps_have_had_the_budget(tmp_path: Path) -> None:
    busy = (
        "import signal, sys, time\n"
        "def stop(*_): print('stopped by SIGTERM after step 7', flush=True); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "while time.process_time() < 0.3: pass\n"  # before the steps, so no part of the budget
        "print('after 0 steps', flush=True)\n"
        "while time.process_time() < 20: pass\n"
    )
    words = [sys.executable, "-c", busy]
    seconds = run_for(words, 0.4, tmp_path / "log", dict(os.environ))
    assert 0.5 <= seconds < 10  # the clock is read a little before what was printed
    by_another = busy.replace(
        "while time.process_time() < 20: pass", "time.sleep(0.5); signal.raise_signal(15)"
    )
    with pytest.raises(RuntimeError, match="stopped by SIGTERM"):
        run_for([sys.executable, "-c", by_another], 5, tmp_path / "log", dict(os.environ))
    with pytest.raises(RuntimeError, match="no model here"):
        run_for(
            [sys.executable, "-c", "raise SystemExit('no model here')"],
            1,
            tmp_path / "log",
            dict(os.environ),
        )


def test_runs_by_the_clock_and_at_a_given_rate_have_lines_of_their_own(tmp_path: Path) -> None:
    finals: list[dict[str, Any]] = []
    common = {
        "role": "final",
        "budget": 60.0,
        "examples": 400,
        "test_examples": 200,
        "include": ["last:3"],
    }
    for factor, cached in ((1000.0, True), (333.0, True), (1000.0, None)):
        finals.append({"task": "trec", "arm": "mezo", "seed": 1, **common, "factor": factor})
        finals[-1] |= {"trunk_cache": cached} if cached else {}
    words = ["--tasks", "trec", "--arms", "frozen+mezo", "--budget", "60", "--examples", "400"]
    words += ["--test-examples", "200"]
    for more, wanted in (
        (["--trunk-cache", "--factor", "333"], finals[1]), (["--factor", "1000"], finals[2]),
        (["--trunk-cache"], finals[0]), ([], None),
    ):  # fmt: skip
        told = benchmark_of(tmp_path, *words, *more)
        tuned = {**finals[0], "role": "tune", "loss": 1.5}
        told._results.records = [*finals, tuned, {**tuned, "factor": 333.0, "loss": 1.6}]
        assert [run for _, _, runs in told.finished() for run in runs] == (
            [wanted] if wanted else []
        )
    for more in ([], ["--trunk-cache"]):  # a fit beside them is to what they train on
        told = benchmark_of(tmp_path, *words, *more)
        flags = told._words("trec", Arm("fit", "none"), 1, 1.0, "test", 0, 9, tmp_path)
        assert ("--train-examples" in flags) == bool(more)
        assert told._common("trec", Arm("fit", "none"))["trunk_cache"] == (bool(more) or None)
    parsed = arguments("").parse_args(["--trunk-cache", "--budget", "60"])
    assert command(parsed).endswith("--budget 60.0 --trunk-cache")


def test_rates_and_batch_sizes_are_of_all_methods_or_of_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--factor", "lozo=100", "333", "--batch-size", "tezo-gn=256"]
    parsed = arguments("").parse_args(words)
    lozo, mezo, solved, fitted = arms_of(["fit+lozo", "frozen+mezo", "frozen+tezo-gn", "fit"])
    assert [of_arm(parsed.factor, arm) for arm in (lozo, mezo, fitted)] == [100, 333, 333]
    assert [of_arm(parsed.batch_size, arm) for arm in (lozo, solved, fitted)] == [None, 256, None]
    assert command(parsed).endswith("--batch-size tezo-gn=256 --factor lozo=100 333")
    for wrong, told in (("adam=3", "adam is none of mezo, "), ("mezo=", "mezo=: 100, or mezo=100")):
        with pytest.raises(SystemExit):
            arguments("").parse_args(["--factor", wrong])
        assert told in capsys.readouterr().err
