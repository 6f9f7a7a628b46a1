"""The benchmark of conversations at toy size."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conversations
import pytest
from command_line import call
from tiny_tokenizer import save_tiny_llama, with_chat_template


def test_the_loss_of_held_out_turns_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(words: list[str], check: bool) -> Any:
        """Runs `python -m tezo_ds …` in this process."""
        more = ["--lr", "5e-3", "--rank", "4", "--max-length", "512"]
        return SimpleNamespace(returncode=call(*words[3:], *more))

    monkeypatch.setattr(subprocess, "run", here)
    rows = [conversations.conversation(subject) for subject in conversations.SUBJECTS]
    texts = [message["content"] for row in rows for message in row["messages"]]
    model = tmp_path / "model"
    save_tiny_llama(model, texts, max_position_embeddings=512)
    with_chat_template(model)
    args = argparse.Namespace(model=str(model), steps=12, batch_size=5, method="tezo-adam-coef")
    found = conversations.run(args, tmp_path)
    assert found["alike"] and found["steps"] == 12
    assert found["test_examples"] == conversations.HELD_OUT
    assert found["test_loss_after"] < found["test_loss_before"]
    # What comes of tokens that are not the template's.
    monkeypatch.setattr(conversations, "encode", lambda *_: [SimpleNamespace(input_ids=[])] * 8)
    (tmp_path / "run" / "summary.json").rename(tmp_path / "summary")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: _put_back(tmp_path))
    assert not conversations.run(args, tmp_path)["alike"]


def _put_back(folder: Path) -> Any:
    (folder / "summary").rename(folder / "run" / "summary.json")
    return SimpleNamespace(returncode=0)
