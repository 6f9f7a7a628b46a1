"""Runs that fit inner layers: what they say and keep, the second fit of the output layer, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command_line import Given, Run, assert_found_again, call
from test_runs import FIT, terms

from tezo_ds.output_layer.problem import States
from tezo_ds.output_layer.states import collect
from tezo_ds.output_layer.term import BIAS, WEIGHT
from tezo_ds.training import output_layer

pytest_plugins = ("cli_fixtures",)

Captured = pytest.CaptureFixture[str]


def test_the_output_layer_is_fitted_to_what_inner_layers_make_of_its_states(
    untied: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[States] = []

    def collected(*given: Any, **named: Any) -> States:
        seen.append(collect(*given, **named))
        return seen[-1]

    monkeypatch.setattr(output_layer, "collect", collected)
    options = {**FIT, "steps": 1, "inner_layers": "layers:0-1"}
    assert call(*untied.train(tmp_path / "run", **options)) == 0
    found = Run(tmp_path / "run").summary["output_layer"]
    (term,) = terms(tmp_path / "run").values()
    before, after = seen
    assert (after.logits - before.logits).abs().max() > 1e-3 and not after.inner
    weight, bias = (term[name].double().requires_grad_() for name in (WEIGHT, BIAS))
    logits = after.logits + after.hidden.double() @ weight.t() + bias
    loss = F.cross_entropy(logits, after.truth) + found["ridge"] * weight.square().sum()
    slopes = torch.autograd.grad(loss, (weight, bias))
    assert all(float(slope.abs().max()) < 1e-4 for slope in slopes)


@pytest.mark.parametrize(
    ("chosen", "maps"),
    [("auto", "last"), ("layers:0-1", "last"), ("auto", "values"), ("layers:0-1", "values")],
)
def test_a_run_with_inner_layers(
    untied: Given, chosen: str, maps: str, tmp_path: Path, capsys: Captured
) -> None:  # fmt: skip
    options = {**FIT, "steps": 2, "inner_layers": chosen, "inner_maps": maps}
    assert call(*untied.train(tmp_path / "run", **options)) == 0
    run, out = Run(tmp_path / "run"), capsys.readouterr().out
    found = run.summary["output_layer"]
    paths = found["inner_layers"]
    assert f"with a term of {' and '.join(paths) or 'no inner layer'}" in out
    assert "inner_maps (for" not in out
    plain = {**options, "inner_layers": "none", "inner_maps": "last"}
    assert call(*untied.train(tmp_path / "fit", **plain)) == 0
    alone = Run(tmp_path / "fit").summary["output_layer"]
    if chosen == "auto":
        assert found["held_out_loss_after"] <= alone["held_out_loss_after"] + 1e-6
    else:
        assert len(paths) == 2 and all(("v_proj" in path) == (maps == "values") for path in paths)
    assert "inner_layers" not in alone and found["bytes_of_states"] > alone["bytes_of_states"]
    capsys.readouterr()
    assert_found_again(run, capsys, 1e-6)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"output_layer": "bias", "objective": "choices"}, "set that, too"),
        ({"output_layer": "fit", "objective": "lm"}, "add --objective choices"),
        ({**FIT, "inner_layers": "layers:9"}, "their indices are 0 to"),
        ({**FIT, "trunk_cache": "memory", "include": "last:1"}, "leave one of them off"),
    ],
)
def test_inner_layers_are_refused_in_a_line(
    given: Given, tmp_path: Path, capsys: Captured, options: dict[str, Any], what: str
) -> None:
    options = {"inner_layers": "last:1", **options}
    assert call(*given.train(tmp_path / "run", **options)) != 0
    error = capsys.readouterr().err
    assert "inner_layers: " in error and what in " ".join(error.split())
