"""Models and tokenizers of kinds that cannot be served are refused in words that say why."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from architectures import tiny_of

from tezo_ds.errors import ConfigError
from tezo_ds.models import loading


@pytest.mark.parametrize("name", ["BartForConditionalGeneration", "T5ForConditionalGeneration"])
def test_encoder_decoders_are_refused(tmp_path: Path, name: str) -> None:
    tiny_of(name, 61).save_pretrained(tmp_path)
    for load in (loading.load_model, lambda folder: loading.load_skeleton(folder, "auto")):
        with pytest.raises(
            ConfigError, match="encoder-decoder models are not served; use a causal"
        ):
            load(str(tmp_path))


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="SentencePiece is there")
@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("llama", "tokenizer.model"),
        ("t5", "spiece.model"),
        ("camembert", "sentencepiece.bpe.model"),
    ],
)
def test_a_tokenizer_that_needs_sentencepiece(tmp_path: Path, kind: str, file: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / file).write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    with pytest.raises(ConfigError, match="needs SentencePiece, which is missing; pip install"):
        loading.load_tokenizer(str(tmp_path))
