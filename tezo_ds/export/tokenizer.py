"""Tokenizer beside an exported adapter or model."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a tokenizer's files; raises OSError where they cannot be written."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers raises nothing more exact
        raise OSError(str(error)) from None
