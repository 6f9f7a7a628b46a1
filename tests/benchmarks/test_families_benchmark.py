"""Families of models, and what works with each."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import MARKERS
from parts.families import tried as trying
from parts.families.models import FAMILIES, make
from parts.families.tried import FEATURES, tried
from torch import nn

SOME = ["Gemma 3", "Gemma 2", "Mixtral"]  # plain, capped logits, experts


def test_a_table_and_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "models.md"
    page.write_text(f"before\n{MARKERS[0]}\n{MARKERS[1]}\nafter\n")
    assert families.main(["--families", *SOME, "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n")
    rows = {
        cells[1].strip(): cells[2:]
        for line in text.splitlines()
        if len(cells := line.split("|")) > 3
    }
    assert [cell.strip() for cell in rows["Gemma 3"]] == ["yes"] * len(FEATURES) + [""]
    assert "no (" in rows["Mixtral"][0] and "yes" in rows["Mixtral"][1]
    assert "no (" in rows["Gemma 2"][3] and "yes" in rows["Gemma 2"][2]
    assert "1. output_layer: Gemma2ForCausalLM goes on to change" in text
    capsys.readouterr()


def test_numbers_that_differ_are_wrong_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(make: Any, **fields: Any) -> list[float]:
        return [1.0, 2.0] if fields["probe"] == "fused" else [1.0, 2.1]

    monkeypatch.setattr(trying, "_losses", other)
    assert tried(trying.fused, partial(make, "Llama")).startswith("WRONG: [1.0, 2.0] is not")
    with pytest.raises(trying.Differs):
        trying.alike([float("nan")], [1.0])


def test_models_are_the_same_each_time_and_their_logits_finite() -> None:
    for family in ("Llama", "GPT-2", "Mamba 2"):
        models: list[nn.Module] = [make(family) for _ in range(2)]
        examples = {k: v for k, v in trying.batch(7).items() if k != "labels"}
        first, second = (model(**examples).logits for model in models)
        assert torch.equal(first, second) and first.isfinite().all()
    assert len(FAMILIES) > 30
