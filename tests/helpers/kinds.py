"""Tiny encoder-decoder and sequence-classification models with tokenizers that fit them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from architectures import tiny_of
from tiny_tokenizer import tiny_tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast

# Of the tokenizer's <s>, </s> and <pad>; BART's decoder begins with </s> <s>, T5's with <pad>.
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
STARTS = {"T5": 2, "Bart": 1}
ENCODER_DECODERS = ("T5ForConditionalGeneration", "BartForConditionalGeneration")
NO_TABLE = ("*relative_attention_bias*",)  # of T5, which the fused probe does not reach


def tokenizer_for(name: str, texts: list[str]) -> PreTrainedTokenizerFast:
    """Makes a tokenizer that puts around a text what a model's own would."""
    classifies = name.endswith("ForSequenceClassification")
    causal = classifies and name.startswith(("Llama", "GPT2"))
    return tiny_tokenizer(texts, bos=not name.startswith("T5"), eos=not causal)


def model_for(name: str, tokenizer: PreTrainedTokenizerFast, **config: Any) -> nn.Module:
    """Makes a model of a class of transformers with a tokenizer's special tokens."""
    more: dict[str, Any] = {**IDS, **config}
    for kind, start in STARTS.items():
        if name.startswith(kind):
            more = {"decoder_start_token_id": start, "forced_eos_token_id": None, **more}
    model = tiny_of(name, len(tokenizer), **more)
    with torch.no_grad():  # large enough for outputs to depend on inputs
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3, generator=torch.manual_seed(parameter.numel()))
    return model


def save_kind(folder: Path, name: str, texts: list[str], **config: Any) -> Path:
    """Writes a model with its tokenizer."""
    tokenizer = tokenizer_for(name, texts)
    tokenizer.save_pretrained(folder)
    model: Any = model_for(name, tokenizer, **config)
    model.save_pretrained(folder)
    return folder
