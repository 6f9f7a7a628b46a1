"""The term on the label words' logits: z'_c = z_c + ΔW_c·h + b_c, in every forward of the model; ΔW may be
a product B A of rank r. Terms of inner layers that were fitted with it come and go with it.

It stands within the output layer's own forward, underneath whatever else replaces that for a time (the
probes, chunks of chosen positions), so each branch's h gets it and generation sees it as well. Where
the weight is tied to an embedding, that side stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tezo_ds.config import TezoConfig
from tezo_ds.errors import ConfigError
from tezo_ds.losses.head import TO_WORDS
from tezo_ds.models.structure import embeddings
from tezo_ds.output_layer.fit import Fitted
from tezo_ds.output_layer.inner import InnerLayers
from tezo_ds.sharding.base import Sharding

TOKENS, WEIGHT, BIAS = "output_layer.tokens", "output_layer.weight", "output_layer.bias"
BASIS = "output_layer.basis"
# What the model multiplies its output layer's result by, float64 (1,), where it does: the term is one on the
# logits behind that, and in the layer stands over it.
MULTIPLIER = "output_layer.multiplier"
INSTEAD = "export an adapter (tezo-ds export --adapter)"

_PARTS = (TOKENS, WEIGHT, BIAS, BASIS, MULTIPLIER)


def term_of(words: Tensor, fitted: Fitted) -> dict[str, Tensor]:
    """Returns a fitted term by name, as of `OutputTerm.state`, without those of inner layers.

    Args:
        words: token ids, int64 (C,).
        fitted: of these.
    """
    term = {TOKENS: words.cpu(), WEIGHT: fitted.weight, BIAS: fitted.bias}
    if fitted.basis is not None:
        term[BASIS] = fitted.basis
    if fitted.multiplier != 1:
        term[MULTIPLIER] = torch.tensor([fitted.multiplier], dtype=torch.float64)
    return term


def due_by(config: TezoConfig, done: int) -> int:
    """Returns after how many steps, `done` at the most, the last fit is due, of a config that has fits."""
    every = config.output_layer_every
    return done - done % every if every else 0


def moved(term: Mapping[str, Tensor], change: Tensor) -> dict[str, Tensor]:
    """Returns a term whose biases are changed by some numbers, float64 (C,), rounded to their own dtype."""
    bias = term[BIAS]
    return {**term, BIAS: (bias.double() + change).to(bias.dtype)}


class OutputTerm:
    """What is added to the output layer's logits of a few tokens; nothing until it is loaded.

    Attributes:
        layer: the model's output layer; None: it has none.
        inner: inner layers that have a term, too.

    Args:
        sharding: the model.
    """

    def __init__(self, sharding: Sharding) -> None:
        self._sharding = sharding
        self.layer = embeddings(sharding.module, "output")
        self.inner = InnerLayers(sharding.module, lambda: self._off)
        self._loaded: dict[str, Tensor] = {}
        self._placed: tuple[Any, ...] | None = (
            None  # ((device, dtype), tokens, weight, bias, basis or None)
        )
        self._attached = self._off = False

    @property
    def state(self) -> dict[str, Tensor]:
        """Tokens int64 (C,), ΔW float32 (C, d) and b float32 (C,) by name; {} where nothing is added. In
        the place of ΔW may be B (C, r), with A (r, d) beside it; then the terms of inner layers."""
        return self._loaded | self.inner.state

    @property
    def within(self) -> dict[str, Tensor]:
        """ΔW, or B and A, and b by name, as what the layer itself returns is to have them."""
        multiplier = float(self._loaded.get(MULTIPLIER, torch.ones(1)))
        parts = {name: self._loaded[name] for name in (WEIGHT, BIAS, BASIS) if name in self._loaded}
        return {name: x if name == BASIS else x / multiplier for name, x in parts.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the term from among tensors by name, as of `state`; they may have none.

        Raises:
            ConfigError: the term is of another model.
        """
        self._placed = None
        self._loaded = {name: tensors[name] for name in _PARTS if name in tensors}
        self.inner.load(tensors)
        if not self._loaded:
            return
        shape = self.shape
        tokens, (_, width) = (
            self._loaded[TOKENS],
            self._loaded.get(BASIS, self._loaded[WEIGHT]).shape,
        )
        if shape is None or shape[1] != width or int(tokens.max()) >= shape[0]:
            raise ConfigError(
                f"output_layer: fitted for hidden states of {width} numbers, and this model's output layer "
                f"is {shape or 'missing'}; use the run's own model"
            )
        if not self._attached:
            assert self.layer is not None
            self.layer.__dict__["forward"] = self._around(self.layer.forward)
            self._attached = True

    @property
    def biases(self) -> int:
        """Number of words that have a bias."""
        return len(self._loaded.get(BIAS, ()))

    def move_biases(self, change: Tensor) -> None:
        """Adds to the biases, float64 (C,), rounding to their own dtype."""
        self.load(moved(self.state, change))

    @property
    def shape(self) -> tuple[int, int] | None:
        """Shape (vocabulary, d) of the whole layer, whoever holds it; None where there is no linear one."""
        layer = self.layer
        return (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else None

    def _around(self, project: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(input: Tensor) -> Tensor:  # torch's own name: callers may use it
            logits = project(input)
            return logits if self._off or not self._loaded else self._added(input, logits)

        assert self.layer is not None
        below = self.layer.__dict__.get("forward")  # of an engine that the model had before
        within = getattr(below, TO_WORDS, None)

        def to_words(hidden: Tensor, logits: Tensor, words: Tensor) -> Tensor:
            """Adds the term to logits (…, words) of some words alone, int64 (words,)."""
            if within is not None:
                logits = within(hidden, logits, words)
            return logits if self._off or not self._loaded else self._added(hidden, logits, words)

        if below is None or within is not None:  # nothing else is added to the layer's result
            forward.__dict__[TO_WORDS] = to_words
        return forward

    def _added(self, hidden: Tensor, logits: Tensor, words: Tensor | None = None) -> Tensor:
        """Adds the term to logits of hidden states (…, d), of the vocabulary or of some words: (…, words). In
        float32 or wider."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        key = (hidden.device, wide)
        if self._placed is None or self._placed[0] != key:
            tokens = self._loaded[TOKENS].to(hidden.device)
            within = self.within
            parts = [within.get(name) for name in (WEIGHT, BIAS, BASIS)]
            placed = [None if x is None else x.to(hidden.device, wide) for x in parts]
            self._placed = key, tokens, *placed
        _, tokens, weight, bias, basis = self._placed
        inner = hidden.to(wide) if basis is None else F.linear(hidden.to(wide), basis)
        term = F.linear(inner, weight, bias)  # (…, C)
        if words is not None:
            which, tokens = (tokens[:, None] == words).nonzero(as_tuple=True)
            term = term[..., which]
        logits[..., tokens] = (logits[..., tokens] + term).to(logits.dtype)
        return logits

    @contextmanager
    def off(self) -> Iterator[None]:
        """Context manager: nothing is added inside, in inner layers neither."""
        self._off = True
        try:
            yield
        finally:
            self._off = False

    def refuse_unfit(self) -> None:
        """Raises ConfigError unless the model's output layer can have a term at all."""
        name = type(self._sharding.module).__name__
        if self.shape is None:
            raise ConfigError(f"output_layer: {name} has no linear output layer; leave it frozen")
        if self._sharding.everyone != self._sharding.world_size:
            raise ConfigError(
                "output_layer: tensor parallelism splits the output layer, and no rank has the hidden "
                "states and all logits; leave it frozen"
            )

    @property
    def _names(self) -> list[str]:
        """Names of the output layer's weight, one for each module that holds it; its own module's last."""
        if self.layer is None:
            return []
        named = self._sharding.module.named_modules(remove_duplicate=False)
        holders = [
            (module is self.layer, f"{path}.weight")
            for path, module in named
            if getattr(module, "weight", None) is self.layer.weight
        ]
        return [name for _, name in sorted(holders)]

    @property
    def path(self) -> str:
        """Path of the output layer in the model."""
        return self._names[-1].removesuffix(".weight")

    @property
    def tied(self) -> str | None:
        """Path of a module that the output layer shares its weight with; None where it has its own."""
        names = self._names
        return names[0].removesuffix(".weight") if len(names) > 1 else None

    @property
    def has_bias(self) -> bool:
        """Whether the output layer has a bias of its own."""
        return getattr(self.layer, "bias", None) is not None

    def unmergeable(self) -> str | None:
        """Returns what stands against adding the term to the weights, in one line; None if nothing does."""
        if (tied := self.tied) is None:
            return None
        return (
            f"output_layer: {self.path} shares its weight with {tied}, so its rows cannot change alone in a "
            f"merged model; {INSTEAD}"
        )

    def refuse_merged(self) -> None:
        """Raises ConfigError if there is a term that no merged weight can hold."""
        if self._loaded and (reason := self.unmergeable()):
            raise ConfigError(reason)

    def merge_into(self, names: Sequence[str], tensor: Tensor) -> None:
        """Adds ΔW to the rows of a gathered weight, b to a gathered bias, and the term of an inner layer to
        its weight, if these are its names."""
        for inner in self.inner.with_terms:
            inner.merge_into(names, tensor)
        if not self._loaded:
            return
        tokens, within = self._loaded[TOKENS], self.within
        weight, bias = within[WEIGHT], within[BIAS]
        if BASIS in within:
            weight = weight @ within[BASIS]
        for name, part in ((f"{self.path}.weight", weight), (f"{self.path}.bias", bias)):
            if name in names:
                tensor[tokens] = (tensor[tokens] + part).to(tensor.dtype)
