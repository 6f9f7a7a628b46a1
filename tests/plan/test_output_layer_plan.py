"""What a fit of the output layer is planned to take, beside what it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call
from reducing import by_ranks
from tiny import SIZES, VOCABULARY, make_batch, tiny
from torch import Tensor
from world_plan import small

import tezo_ds
from tezo_ds.config import TezoConfig
from tezo_ds.errors import ConfigError
from tezo_ds.output_layer.entry import Late
from tezo_ds.output_layer.fit import fit
from tezo_ds.output_layer.language import TokenStates, fit_tokens
from tezo_ds.output_layer.problem import States
from tezo_ds.output_layer.states import collect, collect_tokens
from tezo_ds.plan.output_layer import fit_of

EXAMPLES, LABELS, LENGTH = 24, 5, 11


def examples(words: Tensor) -> dict[str, Tensor]:
    """Makes examples with as many labels each, of all words."""
    batch = make_batch(EXAMPLES)
    batch["attention_mask"][:] = 1
    labels = words[torch.arange(EXAMPLES * LABELS) % len(words)].view(EXAMPLES, LABELS)
    batch["labels"][:] = -100
    batch["input_ids"][:, 3 : 3 + LABELS] = batch["labels"][:, 3 : 3 + LABELS] = labels
    return batch


@pytest.mark.parametrize(
    ("way", "choices", "inner", "of"),
    [("fit", True, "none", "last"), ("bias", True, "none", "last"), ("fit", False, "none", "last"),
     ("bias", False, "none", "last"), ("fit", True, "layers:0-1", "last"), ("fit", True, "layers:1", "last"),
     ("fit", True, "layers:0-1", "values"), ("fit", True, "layers:1", "values")],
)  # fmt: skip
def test_bytes_are_those_of_a_fit(way: Any, choices: bool, inner: str, of: Any) -> None:
    words, ranks = torch.arange(VOCABULARY) if not choices else torch.tensor([7, 12, 40]), 2
    batch = examples(words)
    fields = {"output_layer": way, "output_layer_rank": 3, "inner_layers": inner, "inner_maps": of}
    config = TezoConfig(**fields)
    planned = fit_of(
        tiny(), config, ranks, EXAMPLES, LABELS, len(words) if choices else None, LENGTH
    )
    assert planned is not None

    def rank(index: int, reduce: Any) -> tuple[int, int, int]:
        engine = tezo_ds.initialize(tiny(), {"rank": 2})
        layer, late = engine.output_layer.layer, Late()
        assert layer is not None
        part = {key: value.tensor_split(ranks)[index] for key, value in batch.items()}
        batches = [(part, torch.arange(EXAMPLES // ranks) % 5 == 4)]
        states: States | TokenStates
        if choices:
            layers = engine.output_layer.inner.of_blocks(inner, of)
            states = collect(engine.objective, layer, batches, words, layers, late)
            found = fit(states, way == "bias", reduce)
        else:
            states = collect_tokens(engine.objective, layer, batches, words)
            found = fit_tokens(states, 3 if way == "fit" else 0, reduce)
        return len(states.truth), states.nbytes + late.nbytes, found.message_bytes

    taken = by_ranks(ranks, rank)
    assert taken == [(planned.positions, planned.states, planned.message)] * ranks


@pytest.mark.parametrize("maps", ["last", "values"])
@pytest.mark.parametrize("chosen", ["layers:1", "layers:0", "layers:1-2"])
def test_tokens_are_those_that_run_again(
    chosen: str, maps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "num_hidden_layers", 3)
    model: Any = tiny()
    engine, words = tezo_ds.initialize(model, {"rank": 2}), torch.tensor([7, 12, 40])
    config = TezoConfig(output_layer="fit", inner_layers=chosen, inner_maps=maps)
    planned = fit_of(model, config, 1, EXAMPLES, LABELS, len(words), LENGTH)
    batch, rows = examples(words), list[int]()
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:2].numel()))
    layers = engine.output_layer.inner.of_blocks(chosen, maps)
    taken = []
    for batches in (1, 2):  # the first of which is also tried
        held = torch.arange(EXAMPLES) % 5 == 4
        collect(engine.objective, model.lm_head, [(batch, held)] * batches, words, layers)
        taken.append(sum(rows))
        rows.clear()
    again = (taken[1] - taken[0]) / EXAMPLES / 3 - LENGTH
    assert planned is not None and again == pytest.approx(LABELS * planned.tokens)


def test_inner_layers_of_a_loss_over_all_tokens_are_refused() -> None:
    config = TezoConfig(output_layer="fit", inner_layers="auto")
    with pytest.raises(ConfigError, match="inner_layers: are fitted to label words"):
        fit_of(tiny(), config, 2, EXAMPLES, LABELS, None, LENGTH)
    assert fit_of(tiny(), config, 2, EXAMPLES, LABELS, 3, LENGTH) is not None


def test_numbers_by_hand() -> None:
    config = TezoConfig(output_layer="fit", output_layer_examples=10)
    found = fit_of(small(), config, 3, 1000, 7, None, LENGTH)  # d = 94, float32
    assert found is not None
    words = min(70, small().get_output_embeddings().out_features)  # type: ignore[operator]
    assert (found.positions, found.words) == (4 * 7, words)
    assert found.numbers == words * 17 and found.message == 8 * max(words * 17, 16 * 94)
    assert found.nbytes >= 2 * found.states
    assert fit_of(small(), TezoConfig(), 3, 1000, 7, None, LENGTH) is None
    alone = fit_of(small(), config, 1, 1000, 7, 4, LENGTH)
    assert alone is not None and (alone.message, alone.numbers) == (0, 4 * 95)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        small().config.save_pretrained(tmp_path)
    flags = ["plan", "--model", str(tmp_path), "--world", "6", "--per-node", "3", "--length", "40"]
    flags += ["--labels", "30", "--rank", "3", "--output-layer", "fit"]
    assert call(*flags) == 0
    assert "name --train-examples for what a fit takes" in capsys.readouterr().out
    flags += ["--train-examples", "600"]
    assert call(*flags) == 0
    assert "output layer: a rank keeps" in capsys.readouterr().out
    assert call(*flags, "--json") == 0
    found = json.loads(capsys.readouterr().out)["output_layer"]
    assert found["positions"] == 3000 and found["seconds"] > 0
    assert call(*flags, "--words", "3", "--json") == 0
    other = json.loads(capsys.readouterr().out)["output_layer"]
    assert (other["words"], other["numbers"]) == (3, 3 * 95)
