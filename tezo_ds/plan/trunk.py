"""What comes before the first layer that trains, read off names and shapes: a run may do it once for all
branches, and keep what it gives for later visits to the same examples."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from tezo_ds.models.structure import embeddings, text_config
from tezo_ds.patterns import numbered_layers, numbered_module
from tezo_ds.plan.shapes import multiplied


@dataclass(frozen=True)
class Trunk:
    """Split of a model's layers at the first that trains.

    Attributes:
        first: ℓ, number of layers before the first that trains; 0: there is no trunk.
        layers: L, number of all layers.
        weights: weights of the first ℓ layers.
        modules: modules within these layers, and the input embedding, which what comes later does not need.
        multiplied: weights of matrices in the trunk that a token is multiplied with.
    """

    first: int
    layers: int
    weights: tuple[nn.Parameter, ...]
    modules: frozenset[nn.Module]
    multiplied: int = 0

    @property
    def read(self) -> int:
        """Weights of matrices in the trunk, which a forward reads."""
        return sum(p.numel() for p in self.weights if p.dim() > 1)


def trunk_of(module: nn.Module, trained: Collection[str]) -> Trunk:
    """Returns a model's trunk.

    Args:
        module: the model; nothing but names and shapes is looked at.
        trained: names of the parameters that train.
    """
    parameters = dict(module.named_parameters())
    layers = numbered_layers(parameters)
    first = min(_places(parameters, layers, trained), default=0)
    within = set(layers[:first])
    if not first:
        return Trunk(0, len(layers), (), frozenset())
    weights = [p for name, p in parameters.items() if numbered_module(name) in within]
    modules = {m for layer in within for m in module.get_submodule(layer).modules()}
    embedding = embeddings(module, "input")
    return Trunk(
        first, len(layers), tuple(weights),
        frozenset(modules | ({embedding} if embedding is not None else set())),
        multiplied(module, [p for p in weights if p.dim() > 1]),
    )  # fmt: skip


def _places(
    names: Iterable[str], layers: Collection[str], trained: Collection[str]
) -> Iterator[int]:
    """Yields for each trained parameter the number of layers before it. What is outside of layers acts after
    those that come before it by name, as a final norm does, but embeddings act before all."""
    index = {layer: i for i, layer in enumerate(layers)}
    before = 0
    for name in names:
        layer = numbered_module(name)
        at = before if layer is None or layer not in index else index[layer]
        before = max(before, at + 1) if layer in index else before
        if name in trained:
            yield 0 if layer not in index and "embed" in name else at


def hidden_size(module: nn.Module) -> int:
    """Returns the width of the hidden states between the layers of a transformers model."""
    return int(text_config(module).hidden_size)


@dataclass(frozen=True)
class Kept:
    """Hidden states that `trunk_cache` keeps.

    Attributes:
        each: bytes of an example.
        examples: examples that a rank visits; None: not known.
        bound: `trunk_cache_gib` in bytes; None: none.
    """

    each: int
    examples: int | None
    bound: int | None

    @property
    def kept(self) -> int | None:
        """Number of examples whose states a rank keeps; None: not known."""
        if self.examples is None:
            return None
        return self.examples if self.bound is None else min(self.examples, self.bound // self.each)

    @property
    def nbytes(self) -> int | None:
        """Bytes that a rank's cache takes in the end; None: not known, and not bounded."""
        return self.bound if self.kept is None else self.kept * self.each
