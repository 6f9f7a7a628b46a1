"""Models and tokenizers of kinds that cannot be served are refused in words that say why."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from architectures import tiny_of
from command_line import call
from torch import nn
from transformers import (
    BartConfig,
    CLIPConfig,
    Gemma3Config,
    LlavaConfig,
    ViTConfig,
    Wav2Vec2Config,
    WhisperConfig,
)

from tezo_ds.errors import ConfigError
from tezo_ds.kinds import ModelKind, kind_named
from tezo_ds.models import loading
from tezo_ds.models.structure import is_classifier, is_encoder_decoder

TEXT_MODELS = (
    ("T5ForConditionalGeneration", ModelKind.ENCODER_DECODER),
    ("BartForConditionalGeneration", ModelKind.ENCODER_DECODER),
    ("BertForSequenceClassification", ModelKind.CLASSIFIER),
    ("LlamaForSequenceClassification", ModelKind.CLASSIFIER),
    ("BertForMaskedLM", ModelKind.MASKED),
    ("LlamaForCausalLM", ModelKind.CAUSAL),
    ("BartForCausalLM", ModelKind.CAUSAL),
)


@pytest.mark.parametrize(("name", "kind"), TEXT_MODELS)
def test_each_kind_is_loaded_by_its_own_class(tmp_path: Path, name: str, kind: ModelKind) -> None:
    tiny_of(name, 61).save_pretrained(tmp_path)
    assert kind_named(str(tmp_path)) is kind
    loaded = loading.load_model(str(tmp_path))
    empty = loading.load_skeleton(str(tmp_path), "auto")
    assert type(loaded).__name__ == type(empty).__name__ == name
    assert is_encoder_decoder(loaded) == (kind is ModelKind.ENCODER_DECODER)
    assert is_classifier(loaded) == (kind is ModelKind.CLASSIFIER)


SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 37,
}
NO_TEXT_MODELS: tuple[tuple[Any, str], ...] = (
    (
        ViTConfig(architectures=["ViTForImageClassification"]),
        r"ViTForImageClassification \(model type vit\) is no text model that is served; give a causal",
    ),
    (Wav2Vec2Config(), r"Wav2Vec2Config \(model type wav2vec2\) is no text model that is served"),
    (WhisperConfig(), r"WhisperConfig \(model type whisper\) is no text model that is served"),
    (CLIPConfig(), r"\(model type clip\) is multimodal, and transformers does not load its text"),
    (LlavaConfig(), r"\(model type llava\) is multimodal, and transformers does not load its text"),
    (
        BartConfig(architectures=["BartForSequenceClassification"]),
        r"\(model type bart\) is an encoder-decoder model with a classification head, which is not",
    ),
)  # fmt: skip


@pytest.mark.parametrize(("config", "words"), NO_TEXT_MODELS, ids=lambda x: type(x).__name__)
def test_other_models_are_refused(
    tmp_path: Path, config: Any, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config.save_pretrained(tmp_path)
    for load in (loading.load_model, kind_named, lambda name: loading.load_skeleton(name, "auto")):
        with pytest.raises(ConfigError, match=words) as caught:
            load(str(tmp_path))
        assert "\n" not in str(caught.value)
    rows = "".join(f'{{"text": "film {i}"}}\n' for i in range(30))
    (tmp_path / "rows.jsonl").write_text(rows)
    asked = ("--model", tmp_path, "--task", tmp_path / "rows.jsonl")
    assert call("train", *asked, "--output", tmp_path / "run") == 2
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("tezo-ds: error")]
    assert re.search(words, line)


def test_the_text_tower_of_a_multimodal_model_is_a_causal_one(tmp_path: Path) -> None:
    """As far as transformers loads it so."""
    text = {**SMALL, "num_key_value_heads": 1, "head_dim": 12, "vocab_size": 61}
    vision = {**SMALL, "image_size": 8, "patch_size": 4}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    config.save_pretrained(tmp_path)
    assert kind_named(str(tmp_path)) is ModelKind.CAUSAL
    assert isinstance(loading.load_skeleton(str(tmp_path), "auto"), nn.Module)


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
