"""Fitted terms in other tools' formats: of the output layer ΔW as a LoRA pair, of one-hot rows where it is no
product, and b as transformers' sequence_bias; of inner layers U and A, which are a pair as they stand."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig

from tezo_ds.engine.engine import Engine
from tezo_ds.output_layer.term import BASIS, BIAS, TOKENS, WEIGHT


def pairs_of(engine: Engine) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns B, (outputs, r), and A, (r, inputs), of each linear map that has a fitted term, by its path.
    Those of the output layer are the words' rows of a term of rank r, or one-hot rows and ΔW."""
    layer = engine.output_layer
    pairs = {inner.path: inner.term for inner in layer.inner.with_terms if inner.term is not None}
    term, shape = layer.state, layer.shape
    if TOKENS in term:
        assert shape is not None, "there is a term"
        tokens, weight = term[TOKENS], layer.within[WEIGHT]
        right = term.get(BASIS, weight)
        left = torch.zeros(shape[0], len(right))
        left[tokens] = weight if BASIS in term else torch.eye(len(tokens))
        if len(right):  # and not biases alone
            pairs[layer.path] = left, right
    return pairs


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
