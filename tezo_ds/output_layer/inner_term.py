"""A term on what one linear layer adds to the hidden states: y' = W x + U (A x), in every forward.

The layer is the last of a block whose results are as wide as the hidden states (down_proj, fc2, …). U has a
column for each label word, the direction of that word's row of the output layer, and A is fitted. So the
term is a change of W of rank C, and a LoRA pair as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tezo_ds.errors import ConfigError
from tezo_ds.models.structure import kind_of
from tezo_ds.patterns import numbered_layers
from tezo_ds.sharding.base import Sharding

LAYER, LEFT, RIGHT = "inner_layer.layer", "inner_layer.left", "inner_layer.right"

See = Callable[[Tensor, Tensor], Tensor]  # (x, y) -> y as it is to be


def layers_of(module: nn.Module) -> list[str]:
    """Returns the paths of a model's blocks."""
    return numbered_layers([name for name, _ in module.named_parameters()])


def writer_of(sharding: Sharding, layer: int) -> str:
    """Returns the path of the linear map that a block's term stands at.

    Raises:
        ConfigError: the model has no such block, it is the last one, or it ends in no linear map.
    """
    module, found = sharding.module, layers_of(sharding.module)
    if not 0 <= layer < len(found) - 1:
        raise ConfigError(
            f"inner_layer: {layer} is no layer before the last of {len(found)}; choose 0 to "
            f"{len(found) - 2}, or auto"
        )
    block = module.get_submodule(found[layer])
    linear = [path for path, part in block.named_modules() if kind_of(part) == "linear"]
    ends = [path for path in linear if _shape(sharding, block, path)[0] == _hidden_size(module)]
    if not ends or any(part.isdigit() for part in ends[-1].split(".")):
        raise ConfigError(
            f"inner_layer: {found[layer]} of {type(module).__name__} ends in no linear layer of its own; "
            "leave inner_layer off"
        )
    return f"{found[layer]}.{ends[-1]}"


def _shape(sharding: Sharding, block: nn.Module, path: str) -> torch.Size:
    return sharding.shape(block.get_submodule(path).get_parameter("weight"))


def _hidden_size(module: nn.Module) -> int | None:
    config = getattr(module, "config", None)
    return getattr(getattr(config, "get_text_config", lambda: config)(), "hidden_size", None)


class InnerTerm:
    """What is added behind one linear layer; nothing until it is loaded.

    Args:
        sharding: the model.
    """

    def __init__(self, sharding: Sharding) -> None:
        self._sharding = sharding
        self._loaded: dict[str, Tensor] = {}
        self._placed: tuple[tuple[torch.device, torch.dtype], Tensor, Tensor] | None = None
        self._attached: set[str] = set()
        self._path = ""
        self.off = False

    @property
    def state(self) -> dict[str, Tensor]:
        """Layer int64 (1,), U float32 (m, C) and A float32 (C, n) by name; {} where nothing is added."""
        return dict(self._loaded)

    @property
    def path(self) -> str:
        """Path of the linear layer; "" where nothing is added."""
        return self._path if self._loaded else ""

    def pair(self) -> tuple[Tensor, Tensor]:
        """Returns U (m, C) and A (C, n), which make the change of the weight."""
        return self._loaded[LEFT], self._loaded[RIGHT]

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the term from among tensors by name, as of `state`; they may have none.

        Raises:
            ConfigError: the term is of another model.
        """
        self._placed = None
        self._loaded = {name: tensors[name] for name in (LAYER, LEFT, RIGHT) if name in tensors}
        if not self._loaded:
            return
        self._path = writer_of(self._sharding, int(self._loaded[LAYER]))
        layer = self._sharding.module.get_submodule(self._path)
        shape = tuple(self._sharding.shape(layer.get_parameter("weight")))
        found = (len(self._loaded[LEFT]), self._loaded[RIGHT].shape[1])
        if shape != found:
            raise ConfigError(
                f"inner_layer: fitted for a weight of {found}, and {self._path} of this model is {shape}; "
                "use the run's own model"
            )
        if self._path not in self._attached:
            layer.__dict__["forward"] = self._around(self._path, layer.forward)
            self._attached.add(self._path)

    def _around(self, path: str, project: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(input: Tensor) -> Tensor:  # torch's own name: callers may use it
            y = project(input)
            return y if self.off or path != self.path else self._added(input, y)

        return forward

    def _added(self, x: Tensor, y: Tensor) -> Tensor:
        """Adds the term to results y (…, m) of inputs x (…, n), in float32 or wider."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if self._placed is None or self._placed[0] != (x.device, wide):
            left, right = (part.to(x.device, wide) for part in self.pair())
            self._placed = (x.device, wide), left, right
        _, left, right = self._placed
        return (y.to(wide) + x.to(wide) @ right.t() @ left.t()).to(y.dtype)

    def merge_into(self, names: Sequence[str], tensor: Tensor) -> None:
        """Adds U A to the gathered weight of the layer, if that is among its names."""
        if self._loaded and f"{self._path}.weight" in names:
            left, right = self.pair()
            tensor += (left @ right).to(tensor.dtype)
