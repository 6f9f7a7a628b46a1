"""The output layer's term in other tools' formats: ΔW as a LoRA pair, of one-hot rows where it is no product,
b as transformers' sequence_bias."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig

from tezo_ds.engine.engine import Engine
from tezo_ds.output_layer.term import BASIS, BIAS, TOKENS, WEIGHT


def width_of(engine: Engine) -> int:
    """Returns the rank that the term has as a LoRA pair: r of a product of rank r, or the number of label
    words; 0 without a term."""
    term = engine.output_layer.state
    return len(term.get(BASIS, term.get(TOKENS, ())))


def pair_of(engine: Engine) -> tuple[Tensor, Tensor]:
    """Returns B, (vocabulary, r), and A, (r, d), for which B A is ΔW at the words' rows: those of the term,
    or one-hot rows and ΔW."""
    term, shape = engine.output_layer.state, engine.output_layer.shape
    assert shape is not None, "there is a term"
    tokens, weight = term[TOKENS], term[WEIGHT]
    inner = term.get(BASIS, weight)
    outer = torch.zeros(shape[0], len(inner))
    outer[tokens] = weight if BASIS in term else torch.eye(len(tokens))
    return outer, inner


def save_biases(engine: Engine, folder: Path) -> None:
    """Writes the model's generation_config.json with the words' biases, which generation then adds; nothing
    without a term."""
    term = engine.output_layer.state
    if not term:
        return
    config = copy.deepcopy(getattr(engine.sharding.module, "generation_config", None))
    config = config or GenerationConfig()
    pairs = zip(term[TOKENS].tolist(), term[BIAS].tolist(), strict=True)
    config.sequence_bias = [[[token], bias] for token, bias in pairs]
    # Its save_pretrained would refuse what many published models have.
    config.to_json_file(folder / "generation_config.json")


def not_in_weights(engine: Engine) -> str | None:
    """Returns what of the term is in generation_config.json alone, in one line; None if nothing is."""
    if not (term := engine.output_layer.state):
        return None
    return (
        f"the biases of {len(term[TOKENS])} label words are sequence_bias in generation_config.json, which "
        "generate adds and a forward alone does not"
    )


def not_in_merged(engine: Engine) -> str | None:
    """Returns what of the term a merged model's weights lack, in one line; None if nothing is."""
    return None if engine.output_layer.has_bias else not_in_weights(engine)
