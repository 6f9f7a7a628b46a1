"""Inner layers: a linear map of a transformer block, and a term U A on its weight, y' = y + U A x.

Of the block's last map the columns of U are the label words' rows of the output layer, less their mean and
of length one: directions that later blocks mostly pass on, and that the words' logits are read along. Of its
value projection they follow from what is measured, see `values`. A is fitted, see `fit`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tezo_ds.config.block import AUTO
from tezo_ds.errors import ConfigError
from tezo_ds.models.structure import embeddings, kind_of, sizes_of, text_config
from tezo_ds.output_layer.newton import by_halves
from tezo_ds.patterns import layers_of, numbered_layers
from tezo_ds.trunk.outputs import hidden_in

PREFIX, LEFT, RIGHT = "inner_layers.", ".left", ".right"
# Of the blocks that `auto` tries, by what gets a term in them.
DEPTHS = {"last": (1 / 2, 2 / 3, 5 / 6), "values": (7 / 15, 8 / 15, 3 / 5)}
# Names within an attention: of the map that gives values, maybe queries and keys as well, and of its last.
PROJECTIONS = ("v_proj", "qkv_proj", "query_key_value", "c_attn")
LAST = ("o_proj", "out_proj", "dense", "c_proj")


def directions(rows: Tensor) -> Tensor:
    """Returns U, float32 (d, C), of the words' rows (C, d), with the same bits on any processor."""
    centred = rows.double() - by_halves(rows.double().t())[None] / len(rows)
    length = by_halves(centred.square()).sqrt()
    return (centred / torch.where(length > 0, length, 1.0)[:, None]).t().float().contiguous()


@dataclass(frozen=True)
class Heads:
    """Heads of the attention that a value projection is of.

    Attributes:
        last: the attention's last linear map, which is given what all heads give, one after another.
        count: H.
        groups: number of values that heads share.
        size: numbers of a value.
        place: number of blocks before its own.
    """

    last: nn.Module
    count: int
    groups: int
    size: int
    place: int


class InnerLayer:
    """A linear map of a block, and its term; nothing is added until one is loaded.

    Attributes:
        path: of the linear map in the model.
        block: the transformer block that it is in.
        layer: the linear map.
        heads: of a value projection; None: it is the block's last map.
        term: U (m, K) and A (K, n), float32; None: nothing is added.

    Args:
        off: tells whether nothing is added for the moment.
    """

    def __init__(
        self, path: str, block: nn.Module, layer: nn.Module, off: Callable[[], bool]
    ) -> None:
        self.path, self.block, self.layer, self._off = path, block, layer, off
        self.heads: Heads | None = None
        self.term: tuple[Tensor, Tensor] | None = None
        self._attached = False
        self._placed: tuple[Any, Tensor, Tensor] | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers that the whole map gives, m, and takes, n, whoever holds it."""
        return sizes_of(self.layer)

    def load(self, left: Tensor, right: Tensor) -> None:
        """Takes U and A.

        Raises:
            ConfigError: they are of another model.
        """
        if (len(left), right.shape[1]) != self.sizes:
            raise ConfigError(
                f"inner_layers: the term of {self.path} is of a map {(len(left), right.shape[1])}, and this "
                f"model's is {self.sizes}; use the run's own model"
            )
        self.term, self._placed = (left, right), None
        if not self._attached:
            self.layer.__dict__["forward"] = self._around(self.layer.forward)
            self._attached = True

    def _around(self, project: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
            y = project(*args, **kwargs)
            if self._off() or self.term is None:
                return y
            return self._added(hidden_in(args, kwargs), y)

        return forward

    def _added(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns y + U A x of inputs (…, n), in float32 or wider."""
        assert self.term is not None
        wide = torch.promote_types(x.dtype, torch.float32)
        if self._placed is None or self._placed[0] != (x.device, wide):
            U, A = (part.to(x.device, wide) for part in self.term)
            self._placed = (x.device, wide), U, A
        _, U, A = self._placed
        return (y + F.linear(F.linear(x.to(wide), A), U)).to(y.dtype)

    def merge_into(self, names: Sequence[str], tensor: Tensor) -> None:
        """Adds U A to a gathered weight, if these are its names."""
        if self.term is not None and f"{self.path}.weight" in names:
            change = self.term[0] @ self.term[1]
            change = change.t() if kind_of(self.layer) == "conv1d" else change
            tensor.copy_((tensor + change).to(tensor.dtype))


def last_map(module: nn.Module, block: str) -> str:
    """Returns the path of the last linear map of a block, which is named by its own, of those that give as
    many numbers as enter the output layer: neither a router nor what stands within an attention.

    Raises:
        ConfigError: the block has none.
    """
    width = getattr(embeddings(module, "output"), "in_features", None)
    maps = [
        name
        for name, m in module.get_submodule(block).named_modules()
        if kind_of(m) in ("linear", "conv1d") and sizes_of(m)[0] == width
    ]
    if not maps:
        raise ConfigError(
            f"inner_layers: {block} of {type(module).__name__} has no linear map that gives the {width} "
            "numbers that enter the output layer; leave inner_layers off"
        )
    return f"{block}.{maps[-1]}"


def value_map(module: nn.Module, block: str) -> tuple[str, Heads]:
    """Returns the path of the linear map that gives a block's values, and the heads of its attention.

    Raises:
        ConfigError: the block has no such map.
    """
    within = dict(module.get_submodule(block).named_modules())
    path = next((name for name in within if name.split(".")[-1] in PROJECTIONS), "")
    name = path.split(".")[-1]
    beside = path.removesuffix(name)
    last = next((within[beside + name] for name in LAST if path and beside + name in within), None)
    size, groups = _of_values(text_config(module))
    if last is None or not size or sizes_of(within[path])[0] < groups * size:
        raise ConfigError(
            f"inner_maps: {block} of {type(module).__name__} has no linear map that gives values (such as "
            f"{PROJECTIONS[0]}) beside the attention's last; use inner_maps last"
        )
    if name == PROJECTIONS[0]:  # values alone, so that nothing has to be said of their number
        groups = sizes_of(within[path])[0] // size
    place = numbered_layers(name for name, _ in module.named_parameters()).index(block)
    return f"{block}.{path}", Heads(last, sizes_of(last)[1] // size, groups, size, place)


def _of_values(config: Any) -> tuple[int, int]:
    """Returns how many numbers a value has, 0 where the config does not say, and how many values."""
    heads, width = (getattr(config, x, None) for x in ("num_attention_heads", "hidden_size"))
    if not heads or not width:
        return 0, 0
    size = getattr(config, "head_dim", None) or width // heads
    groups = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", heads)
    one = getattr(config, "multi_query", False)
    return size, 1 if one and not getattr(config, "new_decoder_architecture", False) else groups


def named(chosen: str, module: nn.Module, maps: str = "last") -> list[str]:
    """Returns the blocks that a value of `inner_layers` names, or that it lets choose among.

    Args:
        chosen: the value.
        module: the model.
        maps: value of `inner_maps`.

    Raises:
        ConfigError: the model has no such blocks.
    """
    if chosen == "none":
        return []
    names = [name for name, _ in module.named_parameters()]
    if chosen != AUTO:
        return layers_of(chosen, names, "inner_layers")
    layers = numbered_layers(names)
    return list(dict.fromkeys(layers[int(depth * len(layers))] for depth in DEPTHS[maps]))


def tensors_of(paths: Sequence[str], terms: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Returns the terms (U, A) of some maps by the names that a run keeps them under."""
    # Copies, as files of tensors refuse those that share their memory.
    lefts = {f"{PREFIX}{p}{LEFT}": U.cpu().clone() for p, (U, _) in zip(paths, terms, strict=True)}
    return lefts | {f"{PREFIX}{p}{RIGHT}": A for p, (_, A) in zip(paths, terms, strict=True)}


class InnerLayers:
    """The inner layers of a model that have a term.

    Args:
        module: the model.
        off: tells whether nothing is added for the moment.
    """

    def __init__(self, module: nn.Module, off: Callable[[], bool] = lambda: False) -> None:
        self._module, self._off = module, off
        self._known: dict[str, InnerLayer] = {}

    def of_blocks(self, chosen: str, maps: str = "last") -> list[InnerLayer]:
        """Returns the inner layers that values of `inner_layers` and `inner_maps` name, the same each time.

        Raises:
            ConfigError: the model has no such blocks, or they have no such map.
        """
        blocks = named(chosen, self._module, maps)
        if maps == "values":
            found = [(*value_map(self._module, block), block) for block in blocks]
            return [self._of(path, block, heads) for path, heads, block in found]
        return [self._of(last_map(self._module, block), block) for block in blocks]

    def _of(self, path: str, block: str, heads: Heads | None = None) -> InnerLayer:
        if path not in self._known:
            modules = self._module.get_submodule(block), self._module.get_submodule(path)
            self._known[path] = InnerLayer(path, *modules, self._off)
        self._known[path].heads = (
            heads or self._known[path].heads
        )  # a term may have been loaded before
        return self._known[path]

    @property
    def with_terms(self) -> list[InnerLayer]:
        """The inner layers that have a term."""
        return [inner for inner in self._known.values() if inner.term is not None]

    @property
    def state(self) -> dict[str, Tensor]:
        """U and A by name."""
        return {
            f"{PREFIX}{inner.path}{end}": part
            for inner in self.with_terms
            for end, part in zip((LEFT, RIGHT), inner.term or (), strict=True)
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes all terms from among tensors by name, as of `state`; there may be none.

        Raises:
            ConfigError: a term is of another model.
        """
        for inner in self._known.values():
            inner.term = None
        for name, left in tensors.items():
            if name.startswith(PREFIX) and name.endswith(LEFT):
                path = name.removeprefix(PREFIX).removesuffix(LEFT)
                self._found(path).load(left, tensors[f"{PREFIX}{path}{RIGHT}"])

    def _found(self, path: str) -> InnerLayer:
        layers = numbered_layers(name for name, _ in self._module.named_parameters())
        for block in layers:
            if path.startswith(f"{block}."):
                try:
                    return self._of(path, block)
                except AttributeError:
                    break
        raise ConfigError(
            f"inner_layers: {type(self._module).__name__} has no {path}; use the run's own model"
        )
