"""Models by name, without their weights: built-in shapes with the sizes that were published."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, Qwen2Config

from tezo_ds.errors import ConfigError
from tezo_ds.models.loading import load_skeleton
from tezo_ds.models.structure import (
    blocks,
    is_classifier,
    is_encoder_decoder,
    kind_of,
    sizes_of,
    text_config,
)
from tezo_ds.patterns import numbered_layers


def _opt(hidden: int, layers: int, heads: int) -> OPTConfig:
    # Zhang et al. 2022 (arXiv 2205.01068), table 1
    return OPTConfig(
        vocab_size=50272, hidden_size=hidden, word_embed_proj_dim=hidden, ffn_dim=4 * hidden,
        num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=2048,
    )  # fmt: skip


def _llama(hidden: int, inner: int, layers: int, heads: int) -> LlamaConfig:
    # Touvron et al. 2023 (arXiv 2302.13971), table 2
    return LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip


def _llama3(hidden: int, inner: int, layers: int, heads: int) -> LlamaConfig:
    # Grattafiori et al. 2024 (arXiv 2407.21783), table 3
    return LlamaConfig(
        vocab_size=128256, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, max_position_embeddings=8192,
        tie_word_embeddings=False,
    )  # fmt: skip


def _qwen(hidden: int, inner: int, layers: int, heads: int) -> Qwen2Config:
    # Yang et al. 2024 (arXiv 2412.15115), table 1, and the published config.json
    return Qwen2Config(
        vocab_size=152064, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, max_position_embeddings=32768,
        tie_word_embeddings=False,
    )  # fmt: skip


BUILT_IN: dict[str, Callable[[], Any]] = {
    "opt-13b": lambda: _opt(5120, 40, 40),
    "opt-30b": lambda: _opt(7168, 48, 56),
    "opt-66b": lambda: _opt(9216, 64, 72),
    "opt-175b": lambda: _opt(12288, 96, 96),
    "llama-7b": lambda: _llama(4096, 11008, 32, 32),
    "llama-13b": lambda: _llama(5120, 13824, 40, 40),
    "llama-30b": lambda: _llama(6656, 17920, 60, 52),
    "llama-65b": lambda: _llama(8192, 22016, 80, 64),
    "llama3-8b": lambda: _llama3(4096, 14336, 32, 32),
    "llama3-70b": lambda: _llama3(8192, 28672, 80, 64),
    "qwen2.5-32b": lambda: _qwen(5120, 27648, 64, 40),
    "qwen2.5-72b": lambda: _qwen(8192, 29568, 80, 64),
}


def skeleton(model: str, dtype: str, trust: bool = False) -> nn.Module:
    """Builds a model on the meta device: names, shapes and dtype, no values.

    Args:
        model: a name of BUILT_IN; a folder with a config.json, or that file.
        dtype: dtype of the weights; "auto": the config's, bfloat16 of built-in shapes.
        trust: whether to run Python code that comes with the model.

    Raises:
        ConfigError: `model` is none of these, or of a kind that cannot be planned.
    """
    if model in BUILT_IN:
        wanted = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
        with torch.device("meta"):
            module: nn.Module = AutoModelForCausalLM.from_config(BUILT_IN[model](), dtype=wanted)
        return module
    path = Path(model)
    folder = path.parent if path.name == "config.json" else path
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"--model {model}: no such folder or config.json, and none of {', '.join(BUILT_IN)}"
        )
    module = load_skeleton(str(folder), dtype, trust)
    if is_encoder_decoder(module) or is_classifier(module):
        raise ConfigError(
            f"--model {model}: {type(module).__name__} is no model of one stack of blocks and words, which "
            "plans are of; run a few steps instead, or name such a model of its size"
        )
    return module


@dataclass(frozen=True)
class Outline:
    """Sizes of a decoder from which its activations and FLOPs follow.

    Attributes:
        hidden: d, width of the residual stream.
        inner: f, width within an MLP.
        wide: how many activations of width f the MLP holds at once.
        queries, keys: columns of all heads' queries, and of their keys.
        layers: number of blocks.
        vocabulary: number of words.
        read: weights of all matrices in blocks, which a forward reads.
        multiplied: those of them that a token is multiplied with: of experts the ones that it is sent to.
        itemsize: bytes of a weight.
    """

    hidden: int
    inner: int
    wide: int
    queries: int
    keys: int
    layers: int
    vocabulary: int
    read: int
    multiplied: int
    itemsize: int


def outline(module: nn.Module) -> Outline:
    """Returns the outline of a transformers model.

    Raises:
        ConfigError: the model has no blocks of attention and linear layers, as decoders have.
    """
    config = text_config(module)
    names = numbered_layers(name for name, _ in module.named_parameters())
    own = {id(module.get_submodule(name)) for name in names}  # and not of a tower for images
    found = [block for block in blocks(module) if id(block) in own]
    linears = [
        sizes_of(m)
        for block in found[:1]
        for m in block.modules()
        if kind_of(m) in ("linear", "conv1d")
    ]
    heads = getattr(config, "num_attention_heads", None)
    if not linears or not heads:
        raise ConfigError(
            f"{type(module).__name__}: no blocks of attention and linear layers are found in it, which the "
            "plan is of; name another model"
        )
    hidden = config.hidden_size
    matrices = [p for block in found for p in block.parameters() if p.dim() > 1]
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    inner = max(given for given, _ in linears)
    gated = sum(given == inner for given, _ in linears) > 1  # both factors and their product
    # In several operations, as of GPT-2 and Phi, where others are one: x, x / 2, x³ and what is made of it.
    written = any(type(m).__name__ == "NewGELUActivation" for m in found[0].modules())
    return Outline(
        hidden=hidden,
        inner=inner,
        wide=max(3 if gated else 2, 4 if written else 2),
        queries=heads * head_dim,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * head_dim,
        layers=len(found),
        vocabulary=config.vocab_size,
        read=sum(p.numel() for p in matrices),
        multiplied=multiplied(module, matrices),
        itemsize=max(p.itemsize for p in module.parameters()),
    )


def multiplied(module: nn.Module, matrices: Iterable[nn.Parameter]) -> int:
    """Returns how many weights of some of a model's matrices a token is multiplied with: of experts whose
    weights are one tensor, (experts, …), those of the ones that it is sent to."""
    config = text_config(module)
    names = ("num_local_experts", "num_experts", "num_experts_per_tok")
    local, experts, chosen = (int(getattr(config, name, None) or 0) for name in names)
    experts = local or experts
    chosen = chosen or experts
    return sum(
        p.numel() * chosen // experts if p.dim() == 3 and len(p) == experts else p.numel()
        for p in matrices
    )


def numel(module: nn.Module) -> int:
    """Counts the weights of a model, tied ones once."""
    return sum(math.prod(p.shape) for p in module.parameters())
