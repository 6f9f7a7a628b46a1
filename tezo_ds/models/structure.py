"""A model's modules: kinds of linear maps, users of a parameter, transformer blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from torch import nn

from tezo_ds.errors import ConfigError
from tezo_ds.quantised.packed import is_packed

KINDS: dict[type[nn.Module], str] = {nn.Linear: "linear", nn.Embedding: "embedding"}
PLAIN = (nn.Linear.forward, nn.Embedding.forward)
CONV1D = "transformers.pytorch_utils", "Conv1D"
# x @ Wᵀ + b, without `F.linear`
FALCON = "transformers.models.falcon.modeling_falcon", "FalconLinear"


def kind_of(module: nn.Module) -> str | None:
    """Returns "linear" (y = x Wᵀ), "conv1d" (y = x W, of GPT-2), "embedding", or None for a module that the
    fused probe does not know."""
    if _named(module) == CONV1D:
        return "conv1d"
    found = next((name for base, name in KINDS.items() if isinstance(module, base)), None)
    return found or ("linear" if is_packed(module) else None)


def sizes_of(layer: nn.Module) -> tuple[int, int]:
    """Returns how many numbers a "linear" or "conv1d" layer gives and takes, whoever holds its weight."""
    if kind_of(layer) == "conv1d":
        return int(layer.nf), int(layer.nx)  # type: ignore[arg-type]
    return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]


def acts_plainly(module: nn.Module) -> bool:
    """Returns whether a linear layer's or Embedding's result is its product or lookup, and a bias. A packed
    layer's is, or the fused probe refuses it."""
    packed = is_packed(module) and kind_of(module) == "linear"
    return packed or _named(module) in (CONV1D, FALCON) or type(module).forward in PLAIN


def _named(module: nn.Module) -> tuple[str, str]:
    """Returns where a module's class is from, and its name, as it may not be installed."""
    return type(module).__module__, type(module).__name__


def embeddings(model: nn.Module, which: Literal["input", "output"]) -> nn.Module | None:
    """Returns a model's input embedding or its output layer; None where it names none."""
    get = getattr(model, f"get_{which}_embeddings", None)
    try:
        found = get() if get is not None else None
    except (AttributeError, NotImplementedError):  # transformers' default, of models without one
        return None
    return found if isinstance(found, nn.Module) else None


def text_config(model: nn.Module) -> Any:
    """Returns the config of what reads text in a transformers model, which may read images as well; None
    where it has none."""
    config = getattr(model, "config", None)
    return getattr(config, "get_text_config", lambda: config)()


def users(module: nn.Module, names: set[str]) -> Iterator[tuple[str, nn.Module, str]]:
    """Yields (parameter name, module, its attribute) for each use of the named parameters in a model."""
    by_id = {id(p): name for name, p in module.named_parameters() if name in names}
    for path, owner in module.named_modules():
        if "weight" not in owner._parameters and f"{path}.weight" in names:  # packed by other names
            yield f"{path}.weight", owner, "weight"
        for attribute, parameter in owner.named_parameters(recurse=False):
            if name := by_id.get(id(parameter)):
                yield name, owner, attribute


def uncovered(module: nn.Module, names: set[str]) -> dict[str, str]:
    """Returns the named parameters that act elsewhere than as the weight of a linear map or Embedding,
    each with its place."""
    gaps: dict[str, str] = {}
    for name, owner, attribute in users(module, names):
        if kind_of(owner) is None or attribute != "weight":
            gaps[name] = f"{attribute} of {type(owner).__name__}"
        elif getattr(owner, "max_norm", None) is not None:
            gaps[name] = "Embedding with max_norm, which rewrites its weight in every forward"
    return gaps


def blocks(model: nn.Module, layers: Sequence[str] | None = None) -> list[nn.Module]:
    """Returns the modules that are gathered one at a time: outermost ones of the named classes, by default
    of the classes that the model says not to split, and without any the children of its ModuleLists.

    Modules that share a weight with the rest are left to the group of the whole model, in which the
    weight is gathered whenever one of its users runs.

    Raises:
        ConfigError: the model has no module of a named class.
    """
    names = set(layers or getattr(model, "_no_split_modules", None) or ())
    modules = list(model.modules())
    if layers and (unknown := names - {type(module).__name__ for module in modules}):
        raise ConfigError(
            f"fsdp_transformer_layer_cls_to_wrap: {type(model).__name__} has no {min(unknown)}"
        )
    if names:
        # By base classes, too: `fully_shard` gives modules classes of its own.
        found = [m for m in modules if names & {base.__name__ for base in type(m).__mro__}]
    else:
        found = [child for m in modules if isinstance(m, nn.ModuleList) for child in m]
    inner = {id(module) for block in found for module in block.modules() if module is not block}
    uses = _uses(model)
    return [
        block
        for block in found
        if id(block) not in inner and all(uses[key] == n for key, n in _uses(block).items())
    ]


def _uses(module: nn.Module) -> Counter[int]:
    """Counts the modules that hold each parameter, by the parameter's id."""
    held = (
        m._parameters.values() for m in module.modules()
    )  # parameters() walks for each module again
    return Counter(key for each in held for key in {id(p) for p in each if p is not None})


def is_masked_lm(module: nn.Module) -> bool:
    """Returns whether labels belong to the position they stand at instead of the one before."""
    return getattr(module, "loss_type", None) == "ForMaskedLM"


def is_encoder_decoder(module: nn.Module) -> bool:
    """Returns whether an encoder reads the input, and labels belong to positions of a decoder."""
    config = getattr(module, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and not is_classifier(module)


def is_classifier(module: nn.Module) -> bool:
    """Returns whether each example has one row of logits, over classes."""
    return getattr(module, "loss_type", None) == "ForSequenceClassification"
