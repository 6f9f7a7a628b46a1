"""The command line on a quantised base: trained, evaluated, resumed in its own form; writers are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Given, Run, assert_found_again, call
from peft import PeftModel
from tiny import make_batch
from transformers import AutoModelForCausalLM

import tezo_ds
from tezo_ds.models.loading import load_model

pytest.importorskip("torchao")
pytest_plugins = ["cli_fixtures"]


@pytest.fixture(scope="module")
def run(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Run:
    output = tmp_path_factory.mktemp("int8") / "run"
    assert call(*given.train(output, load_in="int8", steps=3)) == 0
    return Run(output)


def test_a_run_remembers_its_form(run: Run, given: Given, capsys: pytest.CaptureFixture) -> None:
    assert run.config["settings"]["load_in"] == "int8"
    assert_found_again(run, capsys, 1e-6)
    for other in ("int4", None):
        assert call(*given.train(run.path, load_in=other, steps=7)) == 2
        assert "holds a run of load_in 'int8'" in capsys.readouterr().err


def test_lozo_within_one_period(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lozo = given.train(
        tmp_path / "run", load_in="int8", method="lozo", rank=2, nu=6, snapshot_every=2
    )
    assert call(*lozo) == 0
    assert not [path for path in (tmp_path / "run/snapshots").iterdir() if path.is_dir()]
    assert_found_again(Run(tmp_path / "run"), capsys, 1e-6)  # replayed on the base in its own form
    longer = given.train(tmp_path / "run", load_in="int8", method="lozo", rank=2, nu=6, steps=7)
    assert call(*longer) == 2
    assert "unless nu is total_steps or more" in capsys.readouterr().err


WRITERS: list[dict[str, Any]] = [
    {"method": "mezo"}, {"method": "lozo-m", "nu": 5}, {"method": "tezo-adam"}, {"probe": "inplace"},
    {"refresh_every": 2},
]  # fmt: skip


@pytest.mark.parametrize("options", WRITERS, ids=str)
def test_writers_are_refused(
    options: dict[str, Any], given: Given, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    own = {"rank": None} if options.get("method") == "mezo" else {}
    assert call(*given.train(tmp_path / "run", load_in="int8", **{**own, **options})) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "torchao Int8Tensor" in error


@torch.no_grad()
def test_results_for_other_tools(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The merged model is plain and dequantised, the adapter goes beside the quantised base and says so."""
    merged, adapter = tmp_path / "merged", tmp_path / "adapter"
    assert call("export", "--run", run.path, "--merged", merged, "--adapter", adapter) == 0
    out = capsys.readouterr().out
    assert "trained beside quantised weights (14 as torchao Int8Tensor" in out
    assert "trained beside quantised weights" in (adapter / "README.md").read_text()
    settings = run.config["settings"]
    base = load_model(settings["model"], load_in="int8").eval()
    batch = {name: part for name, part in make_batch(3).items() if name != "labels"}
    engine = tezo_ds.initialize(base, run.config["tezo"])
    plain = base(**batch).logits
    engine.load_coefficients(run.coefficients)
    with engine.applied():
        wanted = base(**batch).logits
    whole = AutoModelForCausalLM.from_pretrained(merged)
    assert {type(p.data) for p in whole.parameters()} == {torch.Tensor}
    moved = (wanted - plain).abs().max()
    assert (whole(**batch).logits - wanted).abs().max() < 1e-3 * moved
    beside = PeftModel.from_pretrained(base, adapter)
    assert (beside(**batch).logits - wanted).abs().max() < 1e-3 * moved
