"""The benchmark of generating in all branches, at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import generation
import pytest
from tiny_tokenizer import save_tiny_llama


def test_rows_have_what_their_names_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_llama(tmp_path / "model", ["What is 7 plus 12?"])
    words = ["--model", str(tmp_path / "model"), "--prompts", "3", "--queries", "2", "--new", "5"]
    generation.main([*words, "--rounds", "2", "--rank", "2", "--json", str(tmp_path / "j")])
    assert "3 prompts in 4 branches, 5 new tokens" in capsys.readouterr().out
    rows = json.loads((tmp_path / "j").read_text())["rows"]
    assert [row["way"] for row in rows] == [generation.PLAIN, generation.ENGINE]
    assert [row["tokens"] for row in rows] == [60, 60], "no completion ends before its time"
    assert all(len(row["seconds"]) == len(row["ratios"]) == 2 for row in rows)
    assert rows[0]["ratios"] == [1, 1] and rows[1]["ratio"] > 0 and rows[1]["gathered"] == 0
