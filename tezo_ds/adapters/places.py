"""Where adapters stand: layers of a model's blocks, by the names that transformers gives them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from tezo_ds.config import TezoConfig
from tezo_ds.errors import ConfigError
from tezo_ds.models.structure import blocks

Side = Literal["before", "after", "beside"]

# Last parts of the names of a block's layers; BERT and its kin have one name for many.
ATTENTION_OUT = {"o_proj", "out_proj", "c_proj", "dense", "out_lin", "Wo"}
FEED_FORWARD_OUT = {
    "down_proj", "fc2", "c_proj", "dense_4h_to_h", "lin2", "ffn_output", "fc_out", "layer_2", "w2", "Wo",
    "output.dense",
}  # fmt: skip
FEED_FORWARD_IN = {
    "gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "dense_h_to_4h", "lin1", "ffn", "fc_in",
    "layer_1", "w1", "w3", "Wi", "intermediate.dense",
}  # fmt: skip
QUERY_VALUE = {
    "q_proj", "v_proj", "query", "value", "q_lin", "v_lin", "c_attn", "query_key_value", "qkv_proj",
    "Wqkv",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A module and the side of it that an adapter reads and adds to.

    Attributes:
        path: the module's path in the model.
        module: the module.
        side: before: reads its input, and adds to that; after: its output; beside: reads its input, and adds
            to its output.
    """

    path: str
    module: nn.Module
    side: Side


def places_of(model: nn.Module, config: TezoConfig) -> list[Place]:
    """Returns the places of all adapters that a config asks for, block after block.

    Raises:
        ConfigError: the model has no blocks, or they have no layers of known names.
    """
    held = {id(child) for m in model.modules() if isinstance(m, nn.ModuleList) for child in m}
    found = {id(block) for block in blocks(model) if id(block) in held}
    named = [(path, module) for path, module in model.named_modules() if id(module) in found]
    if not named:
        raise ConfigError(
            f"adapter: {type(model).__name__} has no blocks that are known, modules in a ModuleList; set "
            "adapter to none"
        )
    per_block = _of_lora if config.adapter == "lora" else _SITES[config.adapter_sites]
    places: dict[int, Place] = {}  # a module that stands in several paths gets one adapter
    for path, block in named:
        for place in per_block(path, block):
            places.setdefault(id(place.module), place)
    if missing := _missing(config, [p.path for p in places.values()]):
        kind = type(named[0][1]).__name__
        raise ConfigError(
            f"adapter: {kind} has no layer that is known as {missing}; {_advice(config)}"
        )
    return list(places.values())


def _missing(config: TezoConfig, paths: list[str]) -> str:
    """Returns what no block has, in words; "" where nothing is missing."""
    if config.adapter == "lora":
        return "" if paths else "an attention's query or value"
    attention = [path for path in paths if _in_attention(path)]
    if config.adapter_sites == "after" and not attention:
        return "an attention's output"
    return "" if len(attention) < len(paths) else "a feed-forward's"


def _advice(config: TezoConfig) -> str:
    other = "mlp" if config.adapter_sites == "after" else "after"
    sites = "" if config.adapter == "lora" else f"set adapter_sites to {other}, or "
    return f"{sites}set adapter to none"


def _of_lora(prefix: str, block: nn.Module) -> Iterator[Place]:
    for path, module in _layers(block):
        if path.rpartition(".")[2] in QUERY_VALUE:
            yield Place(f"{prefix}.{path}", module, "beside")


def _after(prefix: str, block: nn.Module) -> Iterator[Place]:
    """Yields the outputs of attention and feed-forward, as in the paper's figure."""
    for path, module in _layers(block):
        last = path.rpartition(".")[2]
        if last in ATTENTION_OUT if _in_attention(path) else _named(path, FEED_FORWARD_OUT):
            yield Place(f"{prefix}.{path}", module, "after")
    for path, module in block.named_modules():
        if _has_experts(module):  # fused into one weight, or a list of them
            yield Place(f"{prefix}.{path}", module, "after")


def _mlp(prefix: str, block: nn.Module) -> Iterator[Place]:
    """Yields the inputs of a feed-forward's first layers and the output of its last, as in the released code
    for Llama."""
    for path, module in _layers(block):
        if _in_attention(path):
            continue
        if _named(path, FEED_FORWARD_IN):
            yield Place(f"{prefix}.{path}", module, "before")
        elif _named(path, FEED_FORWARD_OUT):
            yield Place(f"{prefix}.{path}", module, "after")


_SITES = {"after": _after, "mlp": _mlp}


def _layers(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules of a block without children, those of experts left out."""
    experts = [path for path, module in block.named_modules() if _has_experts(module)]
    for path, module in block.named_modules():
        inside = any(path.startswith(f"{of}.") for of in experts)
        if path and not inside and next(module.children(), None) is None:
            yield path, module


def _has_experts(module: nn.Module) -> bool:
    return "experts" in module._modules


def _in_attention(path: str) -> bool:
    return any("att" in part for part in path.split(".")[:-1])


def _named(path: str, names: set[str]) -> bool:
    parts = path.split(".")
    return parts[-1] in names or ".".join(parts[-2:]) in names
