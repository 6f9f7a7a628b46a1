"""Memory of a step on rewards beside GRPO's, at toy size."""

from __future__ import annotations

from pathlib import Path

import grpo
import pytest
from tiny_tokenizer import save_tiny_llama


@pytest.mark.parametrize("way", ["tezo-ds", "grpo-lora"])
def test_each_way_makes_its_answers_and_its_steps(way: str, tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model", ["What is 7 plus 12?"])
    words = ["--prompts", "2", "--completions", "2", "--new", "3", "--rank", "2", "--model"]
    found = grpo.measured_apart([*words, str(tmp_path / "model")], way)
    assert found["peak"] > 0 and found["seconds"] > 0
