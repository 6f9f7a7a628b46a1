"""Kinds of models that are served, told by a model's config, and a refusal of all others."""

from __future__ import annotations

from enum import Enum
from typing import Any

import transformers

from tezo_ds.sources import explained

TOWERS = ("vision_config", "audio_config")  # fields of what is not a text model alone
CLASSIFIES = "ForSequenceClassification"


class ModelKind(Enum):
    """What a model predicts, by the class of transformers that loads it."""

    CAUSAL = "AutoModelForCausalLM"
    MASKED = "AutoModelForMaskedLM"
    ENCODER_DECODER = "AutoModelForSeq2SeqLM"
    CLASSIFIER = "AutoModelForSequenceClassification"

    @property
    def loader(self) -> Any:
        """The class of transformers that loads a model of this kind."""
        return getattr(transformers, self.value)


def kind_named(name: str, trust: bool = False) -> ModelKind:
    """Returns the kind of the model in a folder or of a hub name, by its config alone.

    Raises:
        ConfigError: no such model, or none that is served.
    """
    with explained("model", name):
        return read_kind(name, trust)[1]


def read_kind(name: str, trust: bool) -> tuple[Any, ModelKind]:
    """Returns a model's config and its kind.

    Raises:
        ValueError, OSError: no such model, or none that is served; see `explained`.
    """
    if name.endswith(".gguf"):
        raise ValueError(
            "a GGUF file; make a folder of it first, by from_pretrained(FOLDER, gguf_file=NAME, "
            "quantization_config=GgufConfig(dequantize=True)) and save_pretrained"
        )
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust)
    kind = _kind_of(config)
    if not _loads(kind, config):
        raise ValueError(_unserved(config))
    return config, kind


def _kind_of(config: Any) -> ModelKind:
    named = [str(name) for name in config.architectures or []]
    classifies = any(name.endswith(CLASSIFIES) for name in named)
    if config.is_encoder_decoder:
        if classifies:
            raise ValueError(
                f"{_shown(config)} is an encoder-decoder model with a classification head, which is not "
                "served; take an encoder or a decoder with one, or the encoder-decoder without it"
            )
        return ModelKind.ENCODER_DECODER
    if classifies:
        return ModelKind.CLASSIFIER
    masked = any(name.endswith("ForMaskedLM") for name in named)
    return ModelKind.MASKED if masked else ModelKind.CAUSAL


def _loads(kind: ModelKind, config: Any) -> bool:
    """Returns whether transformers, or code that the model brings along, has a class for it."""
    brought = getattr(config, "auto_map", None) or {}
    return kind.value in brought or type(config) in kind.loader._model_mapping


def _unserved(config: Any) -> str:
    if hasattr(config, "text_config") and any(hasattr(config, tower) for tower in TOWERS):
        return (
            f"{_shown(config)} is multimodal, and transformers does not load its text tower as a causal "
            "language model; give a text model, such as its text tower saved as one"
        )
    return (
        f"{_shown(config)} is no text model that is served; give a causal, masked or encoder-decoder "
        "language model, or one for sequence classification"
    )


def _shown(config: Any) -> str:
    """Returns a model's class and type, as its config has them."""
    named = config.architectures or [type(config).__name__]
    return f"{named[0]} (model type {config.model_type})"
