"""Runs of a language-model loss that fit the output layer, and its states in a trunk's cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import BATCH, BLOCK, STEPS, Given, Run, assert_found_again, call, flags
from other_kernels import OtherKernels
from peft import PeftModel
from safetensors.torch import load_file
from test_resume import kappas, killed_after, same
from transformers import AutoModelForCausalLM, GenerationConfig

from tezo_ds.output_layer import language
from tezo_ds.output_layer.term import BASIS, BIAS, TOKENS, WEIGHT
from tezo_ds.run.folder import ADAPTER, MODEL, OUTPUT_LAYER
from tezo_ds.training.display import Display
from tezo_ds.training.output_layer import OutputLayerFits
from tezo_ds.training.session import open_engine, open_result
from tezo_ds.trunk.trunk import Trunk

pytest_plugins = ("cli_fixtures",)

Captured = pytest.CaptureFixture[str]
FIT = {"output_layer": "fit", "output_layer_rank": 5}
LATE = {"include": "last:1", "output_layer_every": 2}
EXAMPLES = 34  # 48 films but for those to test by


def train(given: Given, run: Path, **options: Any) -> list[str]:
    """Returns the arguments of a short run on the films' text, without answers."""
    films = given.data.with_name("text.jsonl")
    rows = [json.loads(line) for line in given.data.read_text().splitlines()]
    films.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows))
    task = {"model": given.model, "task": films, "template": "{text} !"}
    chosen = {**task, "test_fraction": 0.4, "output": run, "steps": STEPS, "batch_size": BATCH}
    return ["train", *flags({**chosen, **BLOCK, "lr": 2e-4, **options})]


def terms(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.stem: load_file(path) for path in sorted((run / OUTPUT_LAYER).iterdir())}


def equal(one: Path, other: Path) -> bool:
    mine, its = terms(one), terms(other)
    return mine.keys() == its.keys() and all(
        torch.equal(mine[step][name], its[step][name]) for step in mine for name in mine[step]
    )


@pytest.fixture
def roughly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a fit end early, where its bits count and not what it finds."""
    monkeypatch.setattr(language, "GRID", (1e-2, 1e-3))
    monkeypatch.setattr(language, "ROUGHLY", 1e-2)
    monkeypatch.setattr(language, "EXACTLY", 1e-2)


@pytest.mark.parametrize("way", ["bias", "fit"])
def test_what_a_run_says(given: Given, tmp_path: Path, capsys: Captured, way: str) -> None:
    assert call(*train(given, tmp_path / "run", **{**FIT, "output_layer": way})) == 0
    run, out = Run(tmp_path / "run"), capsys.readouterr().out
    (term,) = terms(run.path).values()
    words, rank = len(term[TOKENS]), {"bias": 0, "fit": 5}[way]
    found = run.summary["output_layer"]
    assert f" labels of {EXAMPLES} examples, {words} words" in out and "messages" not in out
    assert (", rank 5, λ " in out) == (way == "fit")
    assert (found["examples"], found["words"], found["rank"]) == (EXAMPLES, words, rank)
    assert term[WEIGHT].shape == (words, rank) and term[BASIS].shape[0] == rank
    assert bool(term[BIAS].any()) and term[TOKENS].tolist() == sorted(set(term[TOKENS].tolist()))
    assert found["held_out_loss_after"] < found["held_out_loss_before"] - 0.1
    summary = run.summary
    assert summary["test_loss_output_layer"] < summary["test_loss_before"] - 0.1
    assert_found_again(run, capsys, 1e-6)


@pytest.mark.usefixtures("roughly")
@pytest.mark.parametrize(
    ("method", "cache"), [("tezo", "off"), ("tezo", "memory"), ("tezo", "disk"), ("mezo", "memory")]
)
def test_a_run_that_was_killed_goes_on_bit_for_bit(
    untied: Given, method: str, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: Captured,
) -> None:  # fmt: skip
    options = {**FIT, **LATE, "method": method, "trunk_cache": cache, "check_every": 2}
    options |= {"rank": None} if method == "mezo" else {}
    whole, run = tmp_path / "whole", tmp_path / "run"
    with OtherKernels("shapes"):
        assert call(*train(untied, whole, **options)) == 0
        arguments = train(untied, run, **options)
        killed_after(3, arguments, monkeypatch)
        killed_after(4, arguments, monkeypatch)  # before the fit that is due then
        capfd.readouterr()
        assert call(*arguments) == 0
    assert "goes on after 4 steps" in capfd.readouterr().out
    assert kappas(run) == kappas(whole) and same(run, whole) and equal(run, whole)
    assert Run(run).summary["test_loss_after"] == Run(whole).summary["test_loss_after"]
    if cache == "off":
        assert call("replay", run, "--verify") == 0
        assert "digests agree" in capfd.readouterr().out
    assert_found_again(Run(run), capfd, 1e-6)


@pytest.mark.usefixtures("roughly")
def test_a_cache_that_is_not_filled_as_the_fit_did_has_other_bits(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the fit's own batches first, a run that goes on has hidden states of other shapes' kernels."""
    options = {**FIT, **LATE, "trunk_cache": "memory"}
    whole, run = tmp_path / "whole", tmp_path / "run"
    with OtherKernels("shapes"):
        assert call(*train(given, whole, **options)) == 0
        arguments = train(given, run, **options)
        killed_after(3, arguments, monkeypatch)
        monkeypatch.setattr(OutputLayerFits, "filled", False)
        assert call(*arguments) == 0
    assert kappas(run)[:3] == kappas(whole)[:3] and kappas(run) != kappas(whole)


def cached(given: Given, run: Path, cache: str, objective: str) -> dict[str, torch.Tensor]:
    """Returns the first term of a run with a trunk's cache, or without."""
    options: dict[str, Any] = {**FIT, **LATE, "rank": 4, "eval_batch_size": 7, "trunk_cache": cache}
    if objective == "lm":
        arguments = train(given, run, **options)
    else:
        arguments = given.train(run, **options, objective=objective)
    assert call(*arguments) == 0
    return terms(run)["step-00000000"]


@pytest.fixture(scope="module", params=["lm", "choices"])
def uncached(
    given: Given, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[str, dict[str, torch.Tensor]]:
    """Returns an objective, and the first term without a cache."""
    run = tmp_path_factory.mktemp("uncached") / "run"
    return request.param, cached(given, run, "off", request.param)


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_states_come_out_of_the_cache(
    given: Given, cache: str, uncached: tuple[str, dict[str, torch.Tensor]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A fit again runs no early block, and up to rounding the term is that without a cache."""
    misses: list[int] = []
    hidden = Trunk._hidden

    def watched(self: Trunk, forward: Any, inputs: Any, visit: Any, compute: bool) -> Any:
        if visit is not None and compute:
            misses.append(len(visit._missing))
        return hidden(self, forward, inputs, visit, compute)

    monkeypatch.setattr(Trunk, "_hidden", watched)
    objective, first = uncached
    other = cached(given, tmp_path / "run", cache, objective)
    assert sum(misses) == 48  # each once, whoever came first
    assert torch.equal(first[TOKENS], other[TOKENS])
    torch.testing.assert_close(other[BIAS], first[BIAS], rtol=1e-2, atol=1e-3)
    wholes = [t[WEIGHT] @ t[BASIS] if BASIS in t else t[WEIGHT] for t in (first, other)]
    torch.testing.assert_close(*wholes, rtol=1e-2, atol=1e-3)


@pytest.mark.usefixtures("roughly")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("way", ["bias", "fit"])
def test_peft_and_the_biases_give_the_runs_logits(
    given: Given, untied: Given, tied: bool, way: str, tmp_path: Path, capsys: Captured
) -> None:
    base, run = given if tied else untied, tmp_path / "run"
    assert call(*train(base, run, **{**FIT, "output_layer": way}, include="last:1")) == 0
    assert call("export", "--run", run, "--adapter", tmp_path / "adapter") == 0
    own = load_file(run / ADAPTER / "adapter_model.safetensors")
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert exported.keys() == own.keys()
    assert all(torch.equal(exported[name], own[name]) for name in own)
    heads = [part for name, part in own.items() if "lm_head.lora_A" in name]
    assert len(heads) == (way == "fit") and all(part.shape[0] == 5 for part in heads)
    config = GenerationConfig.from_pretrained(tmp_path / "adapter")
    (term,) = terms(run).values()
    assert [ids[0] for ids, _ in config.sequence_bias] == term[TOKENS].tolist()
    model = AutoModelForCausalLM.from_pretrained(base.model, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    ids = torch.arange(3, 14)[None]
    biases = torch.zeros(model.config.vocab_size)
    for (token,), bias in config.sequence_bias:
        biases[token] = bias
    with torch.no_grad():
        got = adapted(ids).logits + biases
    engine = opened(run)
    with engine.applied():
        expected = engine.sharding.module(ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    capsys.readouterr()
    code = call("export", "--run", run, "--merged", tmp_path / "merged")
    assert code == (2 if tied else 0)
    if not tied:
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        with torch.no_grad():
            torch.testing.assert_close(merged(ids).logits + biases, expected, rtol=0, atol=1e-4)
        content = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
        assert len(content["sequence_bias"]) == len(term[TOKENS])
    assert not (run / MODEL).exists()


def opened(run: Path) -> Any:
    """Makes an engine at a run's result."""
    finished = open_result(run)
    engine = open_engine(finished.settings, finished.config, None, finished.result.ranks)
    finished.result.give(engine, Display(0, 1, 1))
    return engine
