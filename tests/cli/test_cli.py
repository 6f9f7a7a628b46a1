"""`tezo-ds train` and `tezo-ds evaluate` in one process, held against a run by the public API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import (
    BATCH,
    BLOCK,
    STEPS,
    TEMPLATE,
    WORDS,
    Given,
    Run,
    call,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import tezo_ds
from tezo_ds.tasks import batch_indices, collate, encode, load_task
from tezo_ds.tasks.baselines import majority_accuracy

pytest_plugins = ("cli_fixtures",)

OVERRIDES: dict[str, Any] = {
    "recall": False,
    "method": "tezo-m",
    "rank": 3,
    "rho": "auto",
    "lr": 0.0003,
    "schedule": "linear",
    "warmup_steps": 1,
    "total_steps": 7,
    "momentum": 0.5,
    "rank_threshold": 0.5,
    "query_schedule": "adazeta",
    "queries_max": 3,
    "query_alpha": 2.5,
    "query_beta": 0.7,
    "steps_per_epoch": 2,
    "placement": "per_rank",
    "normalize": "std",
    "shape": "rank",
    "temperature": 0.5,
    "difference": "forward",
    "branch_chunk": 0,
    "memory_budget": 1.0,
    "micro_batch": 1,
    "shared_trunk": False,
    "trunk_cache": "off",
    "trunk_cache_gib": 1.0,
    "clip_kappa": 0.9,
    "rank_max": 8,
    "refresh_every": 3,
    "keep_periods": 4,
    "nu": 9,
    "rank_scaling": True,
    "betas": [0.8, 0.99],
    "eps": 1e-6,
    "bias_correction": False,
    "damping": 0.2,
    "step_scales": [0.5],
    "compile": False,
    "cuda_graphs": False,
    "restore": "copy",
    "stochastic_rounding": False,
    "train_vectors": True,
    "adapter": "none",
    "adapter_sites": "mlp",
    "tt_rank": 3,
    "tt_modes": [5, 5, 2, 3],
    "tt_init": "published",
    "tt_act": "tanh",
    "bottleneck": 6,
    "contraction": "sequential",
    "output_layer": "fit",
    "output_layer_every": 2,
    "output_layer_examples": 9,
    "output_layer_rank": 5,
    "inner_layers": "none",
    "inner_maps": "last",
    "seed": 11,
    "queries": 2,
    "probe": "fused",
    "include": ["model.layers.*"],
    "exclude": ["*q_proj*"],
    "check_every": 2,
}


def by_hand(given: Given) -> tezo_ds.Engine:
    """Trains the run of the fixture `plain` through the public API."""
    task = load_task(str(given.data), template=TEMPLATE, verbalizers=WORDS, test_fraction=0.4)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    examples = encode(tokenizer, task.train, 512)
    engine = tezo_ds.initialize(AutoModelForCausalLM.from_pretrained(given.model), dict(BLOCK))
    for step in range(STEPS):
        chosen = batch_indices(len(examples), BATCH, step, BLOCK["seed"], 0, 1)
        engine.step(collate([examples[i] for i in chosen], tokenizer.pad_token_id))
    return engine


def test_coefficients_are_those_of_an_engine_driven_by_hand(given: Given, plain: Run) -> None:
    engine = by_hand(given)
    expected, found = engine.coefficients(), plain.coefficients
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(bool(part.all()) for part in found.values())


def test_evaluate_finds_what_the_run_found(
    given: Given, plain: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = plain.summary
    assert call("evaluate", "--run", plain.path) == 0
    after = json.loads(capsys.readouterr().out)
    assert call("evaluate", *given.task()) == 0
    before = json.loads(capsys.readouterr().out)
    for found, when in ((before, "before"), (after, "after")):
        assert found == {
            "accuracy": summary[f"accuracy_{when}"],
            "loss": pytest.approx(summary[f"test_loss_{when}"], rel=1e-6),
            "test_examples": summary["test_examples"],
        }
    assert after["accuracy"] != before["accuracy"]
    assert abs(after["loss"] - before["loss"]) > 0.1
    task = load_task(str(given.data), template=TEMPLATE, verbalizers=WORDS, test_fraction=0.4)
    assert summary["accuracy_majority"] == majority_accuracy(task.train, task.test) > 0


def test_every_field_of_the_block_has_an_option(given: Given, tmp_path: Path) -> None:
    fields = tezo_ds.TezoConfig.model_fields
    assert OVERRIDES.keys() == fields.keys()
    same = {name for name, value in OVERRIDES.items() if value == fields[name].get_default()}
    # memory_budget sets the first; a trunk or label words are not there; an adapter goes with fewer fields.
    # Compiling takes longer than all tests here, and there is no GPU.
    alike = {"branch_chunk", "trunk_cache", "inner_layers", "inner_maps", "adapter"}
    alike |= {"compile", "cuda_graphs"}
    assert same == alike
    options = {k: v[0] if k in ("include", "exclude") else v for k, v in OVERRIDES.items()}
    options |= {name: tuple(OVERRIDES[name]) for name in ("betas", "step_scales")}
    options["tt_modes"] = "5,5,2,3"
    assert call(*given.train(tmp_path / "run", **options, steps=3)) == 0
    assert Run(tmp_path / "run").config["tezo"] == OVERRIDES


def test_patterns_may_be_given_more_than_once(given: Given, tmp_path: Path) -> None:
    more = ("--exclude", "*embed*", "--exclude", "*mlp*")
    assert call(*given.train(tmp_path / "run", steps=1), *more) == 0
    run = Run(tmp_path / "run")
    assert run.config["tezo"]["exclude"] == ["*embed*", "*mlp*"]
    assert all("self_attn" in name for name in run.coefficients)
