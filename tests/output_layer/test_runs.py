"""Runs that fit the output layer: what they say, and how they resume, replay, evaluate and export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import STEPS, WORDS, Given, Run, assert_found_again, call
from other_kernels import OtherKernels
from safetensors.torch import load_file, save_file
from test_resume import Killed, kappas, killed_after, same
from world_output_layer import roughly

from tezo_ds.output_layer.term import BIAS, MULTIPLIER, TOKENS, WEIGHT
from tezo_ds.run.folder import (
    ADAPTER,
    COEFFICIENTS,
    JOURNAL,
    METRICS,
    MODEL,
    OUTPUT_LAYER,
    SUMMARY,
    RunFolder,
)
from tezo_ds.run.journal import read_journal
from tezo_ds.run.terms import last_term

pytest_plugins = ("cli_fixtures",)

Captured = pytest.CaptureFixture[str]
FIT = {"output_layer": "fit", "objective": "choices"}


def terms(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.stem: load_file(path) for path in sorted((run / OUTPUT_LAYER).iterdir())}


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[step][name], other[step][name]) for step in one for name in one[step]
    )


@pytest.fixture(scope="module")
def fitted(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = tmp_path_factory.mktemp("fitted") / "run"
    assert call(*given.train(run, **FIT, eval_every=4, check_every=2, output_layer_every=3)) == 0
    return Run(run)


@pytest.mark.parametrize("way", ["bias", "fit"])
def test_what_a_run_says(given: Given, tmp_path: Path, capsys: Captured, way: str) -> None:
    assert call(*given.train(tmp_path / "run", output_layer=way, objective="choices")) == 0
    run, out = Run(tmp_path / "run"), capsys.readouterr().out
    summary = run.summary
    found = summary["output_layer"]
    assert f"output layer: {way} to 22 examples" in out and (", λ " in out) == (way == "fit")
    assert "with the output layer fitted: accuracy" in out and "messages" not in out
    assert found["after_steps"] == 0 and found["examples"] == 22
    assert found["held_out_loss_before"] != found["held_out_loss_after"]
    scores = [line for line in run.lines if "test_loss" in line]
    assert [(line["step"], line.get("after")) for line in scores] == [
        (0, None), (0, "output_layer"), (STEPS, None),
    ]  # fmt: skip
    assert [line["test_accuracy"] for line in scores] == [
        summary[f"accuracy_{when}"] for when in ("before", "output_layer", "after")
    ]
    margin = {"bias": 0.001, "fit": 0.05}[way]
    assert summary["test_loss_output_layer"] < summary["test_loss_before"] - margin
    (term,) = terms(run.path).values()
    assert len(term[TOKENS]) == len(WORDS) and bool(term[WEIGHT].any()) == (way == "fit")
    assert_found_again(run, capsys, 1e-6)


def test_a_run_on_a_model_that_divides_its_logits(
    given: Given, tmp_path: Path, capsys: Captured
) -> None:
    shutil.copytree(given.model, tmp_path / "model")
    config = json.loads((given.model / "config.json").read_text())
    divided = {
        "model_type": "granite",
        "architectures": ["GraniteForCausalLM"],
        "logits_scaling": 8.0,
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, **divided}))
    divides = Given(tmp_path / "model", given.data)
    assert call(*divides.train(tmp_path / "run", **FIT, check_every=2)) == 0
    run = Run(tmp_path / "run")
    (term,) = terms(run.path).values()
    assert term[MULTIPLIER].tolist() == [0.125]
    assert run.summary["test_loss_output_layer"] < run.summary["test_loss_before"] - 0.05
    assert call("replay", run.path, "--verify") == 0
    assert_found_again(run, capsys, 1e-6)


def test_what_comes_without_is_as_it_was(given: Given, tmp_path: Path, capsys: Captured) -> None:
    assert call(*given.train(tmp_path / "run")) == 0
    run = Run(tmp_path / "run")
    assert not (run.path / OUTPUT_LAYER).exists() and "output_layer" not in run.summary
    assert "output_layer" not in (run.path / JOURNAL).read_text() + capsys.readouterr().out
    assert not (run.path / ADAPTER / "generation_config.json").exists()


def test_fewer_examples_are_those_of_the_first_epochs_beginning(
    given: Given, tmp_path: Path, capsys: Captured
) -> None:
    options = {**FIT, "output_layer_examples": 10, "steps": 1}
    assert call(*given.train(tmp_path / "run", **options)) == 0
    assert Run(tmp_path / "run").summary["output_layer"]["examples"] == 10


# By a replay and from snapshots; tests/run/test_resume.py has every method by both.
@pytest.mark.parametrize(("method", "snapshot_every"), [("tezo", 0), ("mezo", 2)])
def test_a_run_that_was_killed_goes_on_bit_for_bit(
    untied: Given, method: str, snapshot_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: Captured,
) -> None:  # fmt: skip
    lr = {"mezo": {"rank": None, "lr": 2e-4}}.get(method, {})
    options = {**FIT, "method": method, **lr, "output_layer_every": 3, "check_every": 2}
    options |= {"snapshot_every": snapshot_every, "eval_every": 4, "inner_layers": "last:1"}
    whole, run = tmp_path / "whole", tmp_path / "run"
    with OtherKernels("shapes"), roughly():
        assert call(*untied.train(whole, **options)) == 0
        arguments = untied.train(run, **options)
        killed_after(3, arguments, monkeypatch)  # before the fit that is due then
        assert sorted(terms(run)) == ["step-00000000"]
        killed_after(4, arguments, monkeypatch)
        assert sorted(terms(run)) == ["step-00000000", "step-00000003"]
        capfd.readouterr()
        assert call(*arguments) == 0
    assert "goes on after 4 steps" in capfd.readouterr().out
    assert sorted(terms(run)) == [f"step-{done:08d}" for done in (0, 3, 6)]
    assert kappas(run) == kappas(whole) and same(run, whole)
    assert equal(terms(run), terms(whole))
    mine, its = read_journal(run / JOURNAL).steps, read_journal(whole / JOURNAL).steps
    assert [line.get("output_layer") for line in mine] == [x.get("output_layer") for x in its]
    one, other = Run(run), Run(whole)
    for name in ("accuracy_before", "accuracy_output_layer", "accuracy_after", "test_loss_after"):
        assert one.summary[name] == other.summary[name]
    capfd.readouterr()
    assert_found_again(one, capfd, 1e-6)


def test_biases_that_steps_move_are_found_again(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    """tezo-gn, whose steps solve for the words' biases: they are in no file but the journal."""
    options = {**FIT, "method": "tezo-gn", "rank": 2, "queries": 2, "rho": 1e-2, "lr": 0.5}
    options |= {"snapshot_every": 3, "check_every": 2, "output_layer_examples": 10, "steps": 5}
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert call(*given.train(whole, **options)) == 0
    arguments = given.train(run, **options)
    killed_after(2, arguments, monkeypatch)  # before the snapshot
    killed_after(4, arguments, monkeypatch)
    assert call(*arguments) == 0
    assert kappas(run) == kappas(whole) and same(run, whole)
    lines = read_journal(run / JOURNAL).steps
    (term,) = terms(run).values()
    state = last_term({0: term}, lines)
    assert len(lines[0]["solved"]) == 2 + len(WORDS) and not torch.equal(state[BIAS], term[BIAS])
    capfd.readouterr()
    assert_found_again(Run(run), capfd, 1e-6)
    assert call("replay", run, "--verify") == 0


def killed_before_a_step(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs until a step would be logged, and ends as a killed process does."""

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as gone, pytest.raises(Killed):
        gone.setattr(RunFolder, "log_step", die)
        gone.setattr("tezo_ds.training.loop.write_results", lambda *_: None)
        call(*arguments)


def test_a_fit_whose_step_never_came_is_kept(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    arguments = given.train(tmp_path / "run", **FIT)
    killed_before_a_step(arguments, monkeypatch)
    capfd.readouterr()
    (before,) = terms(tmp_path / "run").values()
    assert call(*arguments) == 0
    assert "output layer:" not in capfd.readouterr().out
    (after,) = terms(tmp_path / "run").values()
    assert torch.equal(before[WEIGHT], after[WEIGHT])
    summary = Run(tmp_path / "run").summary
    assert summary["accuracy_output_layer"] is not None and summary["output_layer"]["digest"]
    # Where the evaluation before all steps was lost as well, the term is not in it.
    assert call(*given.train(tmp_path / "plain")) == 0
    assert summary["accuracy_before"] == Run(tmp_path / "plain").summary["accuracy_before"]


def test_a_trunk_changes_nothing(given: Given, tmp_path: Path) -> None:
    options = {**FIT, "include": "last:1", "output_layer_every": 3}
    ways: list[dict[str, Any]] = [{}, {"shared_trunk": False}, {"trunk_cache": "memory"}]
    found = []
    for i, way in enumerate(ways):
        assert call(*given.train(tmp_path / f"{i}", **options, **way)) == 0
        found.append(terms(tmp_path / f"{i}"))
    for others in found[1:]:
        for name in (WEIGHT, BIAS):
            mine, its = (each["step-00000000"][name] for each in (found[0], others))
            torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4)


def test_replay_verifies_and_export_takes_it(fitted: Run, tmp_path: Path, capsys: Captured) -> None:
    assert call("replay", fitted.path, "--verify") == 0
    assert "3 digests agree" in capsys.readouterr().out
    assert call("export", "--run", fitted.path, "--adapter", tmp_path / "adapter") == 0
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    own = load_file(fitted.path / ADAPTER / "adapter_model.safetensors")
    assert exported.keys() == own.keys()
    assert all(torch.equal(exported[name], own[name]) for name in own)
    content = json.loads((tmp_path / "adapter" / "generation_config.json").read_text())
    last = terms(fitted.path)[f"step-{STEPS:08d}"]
    assert [bias for _, bias in content["sequence_bias"]] == last[BIAS].tolist()
    assert "sequence_bias" in (tmp_path / "adapter" / "README.md").read_text()
    capsys.readouterr()
    assert call("export", "--run", fitted.path, "--merged", tmp_path / "merged") == 2
    assert "shares its weight with model.embed_tokens" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_an_untied_model_is_merged(untied: Given, tmp_path: Path, capsys: Captured) -> None:
    run = tmp_path / "run"
    assert call(*untied.train(run, **FIT, method="mezo", rank=None, lr=2e-4)) == 0
    assert_found_again(Run(run), capsys, 1e-6)  # by a replay, as the model has no biases
    assert call("export", "--run", run, "--merged", tmp_path / "merged") == 0
    assert "sequence_bias" in capsys.readouterr().out
    base = load_file(untied.model / "model.safetensors")["lm_head.weight"]
    for folder in (run / MODEL, tmp_path / "merged"):
        content = json.loads((folder / "generation_config.json").read_text())
        (term,) = terms(run).values()
        assert [ids[0] for ids, _ in content["sequence_bias"]] == term[TOKENS].tolist()
        merged = {k: v for p in folder.glob("*.safetensors") for k, v in load_file(p).items()}
        moved = (merged["lm_head.weight"] - base)[term[TOKENS]]
        torch.testing.assert_close(moved, term[WEIGHT], rtol=0, atol=2e-2)  # beside MeZO's


def damage(run: Path, how: str, done: int) -> None:
    path = run / OUTPUT_LAYER / f"step-{done:08d}.safetensors"
    if how == "missing":
        path.unlink()
    elif how == "bits":
        content = bytearray(path.read_bytes())
        content[-2] ^= 1
        path.write_bytes(content)
    else:  # whole, and of another fit
        shutil.copy(path.with_name("step-00000000.safetensors"), path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "missing",
            "step-00000003.safetensors is missing: the output layer as it was after 3 steps",
        ),
        ("bits", "step-00000003.safetensors: does not have its checksum"),
        ("other", "step-00000003.safetensors: is not the output layer that the run had after 3"),
    ],
)
def test_what_is_damaged_is_refused(
    fitted: Run, tmp_path: Path, capsys: Captured, given: Given, how: str, message: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(fitted.path, run)
    damage(run, how, 3)
    more = given.train(run, **FIT, eval_every=4, check_every=2, output_layer_every=3, steps=8)
    commands = [["evaluate", "--run", run], ["replay", run, "--verify"], more]
    commands += [["export", "--run", run, "--adapter", tmp_path / "adapter"]]
    for command in commands:
        capsys.readouterr()
        assert call(*command) == 2
        error = capsys.readouterr().err
        assert message in error and "take it from a copy" in error
    assert not (tmp_path / "adapter").exists()


def test_the_last_fit_of_a_finished_run_counts_by_its_summary(
    fitted: Run, tmp_path: Path, capsys: Captured
) -> None:
    run = tmp_path / "run"
    shutil.copytree(fitted.path, run)
    damage(run, "other", STEPS)
    assert call("evaluate", "--run", run) == 2
    assert "is not the output layer that the run had after 6 steps" in capsys.readouterr().err
    (run / SUMMARY).unlink()  # as of a run that was killed
    assert (
        call("evaluate", "--run", run) == 0
    )  # by the fit before, as the file is of another journal
    one = json.loads(capsys.readouterr().out)
    damage(run, "missing", STEPS)
    assert call("evaluate", "--run", run) == 0
    assert json.loads(capsys.readouterr().out) == one


def test_a_damaged_file_that_no_step_rests_on_may_be_removed(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    arguments = given.train(tmp_path / "run", **FIT)
    log_step = RunFolder.log_step
    killed_before_a_step(arguments, monkeypatch)
    assert RunFolder.log_step is log_step
    damage(tmp_path / "run", "bits", 0)
    assert call(*arguments) == 2
    assert "or remove it, and it is fitted again" in capsys.readouterr().err
    damage(tmp_path / "run", "missing", 0)
    assert call(*arguments) == 0
    assert "output layer: fit to 22 examples" in capsys.readouterr().out


def test_a_file_of_another_run_is_not_taken(given: Given, tmp_path: Path) -> None:
    """A file says by the journal's checksum which run it is of."""
    one, other = tmp_path / "one", tmp_path / "other"
    assert call(*given.train(one, **FIT, steps=1)) == 0
    assert call(*given.train(other, **FIT, seed=9, steps=1)) == 0
    content = load_file(one / OUTPUT_LAYER / "step-00000000.safetensors")
    save_file(content, other / OUTPUT_LAYER / "step-00000000.safetensors")
    assert call("evaluate", "--run", other) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mezo", "rank": None}, "or add --no-save-model"),
        ({"output_layer_examples": 4}, "output_layer_examples"),
        ({"train_examples": 4}, "a fit needs 5 training examples at least, got 4"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    given: Given, tmp_path: Path, capsys: Captured, options: dict[str, Any], message: str
) -> None:
    assert call(*given.train(tmp_path / "run", output_layer="fit", **options)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / METRICS).exists()


def test_a_tied_model_of_mezo_runs_without_a_merged_one(
    given: Given, tmp_path: Path, capsys: Captured
) -> None:
    options = {"method": "mezo", "rank": None, "lr": 2e-4, "save_model": False}
    assert call(*given.train(tmp_path / "run", **FIT, **options)) == 0
    assert not (tmp_path / "run" / COEFFICIENTS).exists()
    assert_found_again(Run(tmp_path / "run"), capsys, 1e-6)


def test_fields_of_another_kind_than_ours_do_no_harm(
    given: Given, tmp_path: Path, capsys: Captured
) -> None:
    run = tmp_path / "run"
    assert call(*given.train(run, **FIT, steps=2)) == 0
    expected = Run(run).summary["accuracy_after"]
    summary = {**Run(run).summary, "output_layer": "fitted"}
    (run / SUMMARY).write_text(json.dumps(summary))
    capsys.readouterr()
    assert call("evaluate", "--run", run) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == expected
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    odd = [{**line, "after": []} if line.get("after") else line for line in lines]
    (run / METRICS).write_text("".join(json.dumps(line) + "\n" for line in odd))
    assert call(*given.train(run, **FIT, steps=3)) == 0
    before = {key: summary[key] for key in ("accuracy_before", "accuracy_output_layer")}
    assert {key: Run(run).summary[key] for key in before} == before
