"""Choice of the block whose term to fit: whose layer's inputs tell label words apart best, by least squares.

Inputs x (n,) at the labelled positions go through one fixed random map each to at most 256 features, and
one-hot labels are regressed on these with a ridge. Ranks add up second moments, of the examples to fit by
and of those held out, and the layer with the least squared error on the latter is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tezo_ds.output_layer.inner_term import layers_of, writer_of
from tezo_ds.rng.philox import derive_key, normals
from tezo_ds.sharding.base import Sharding
from tezo_ds.sharding.world import agreed
from tezo_ds.trunk.outputs import hidden_of

FEATURES = 256
MOST = 7  # layers to choose from, about: their inputs are all kept
RIDGES = (1e-3, 1e-2, 1e-1)  # over the features' mean square


def candidates(sharding: Sharding) -> list[int]:
    """Returns the blocks among which `auto` chooses: from a third of the depth on, without the last.

    Raises:
        ConfigError: blocks end in no linear layer, or there are too few.
    """
    count = len(layers_of(sharding.module))
    apart = max(1, count // (3 * MOST // 2))
    found = list(range(count - 2, count // 3 - 1, -apart))[::-1]
    for layer in found or [0]:
        writer_of(sharding, layer)
    return found


class Watch:
    """Inputs of some blocks' last linear layers, and lengths of the hidden states behind the blocks, while
    plain forwards run inside `watching`.

    Args:
        sharding: the model.
        layers: the blocks.
    """

    def __init__(self, sharding: Sharding, layers: Sequence[int]) -> None:
        self._sharding, self._layers, paths = sharding, layers, layers_of(sharding.module)
        self._blocks = {layer: sharding.module.get_submodule(paths[layer]) for layer in layers}
        self._inputs: dict[int, Tensor] = {}
        self._hidden: dict[int, Tensor] = {}
        self._kept: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        self._squares: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context manager: the blocks' calls inside are seen."""
        hooks = []
        for layer in self._layers:
            writer = self._sharding.module.get_submodule(writer_of(self._sharding, layer))
            hooks.append(writer.register_forward_pre_hook(self._note(self._inputs, layer)))
            hooks.append(self._blocks[layer].register_forward_hook(self._note(self._hidden, layer)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @staticmethod
    def _note(into: dict[int, Tensor], layer: int) -> Callable[..., None]:
        def note(_: nn.Module, args: Any, output: Any = None) -> None:
            into[layer] = hidden_of(args[0] if output is None else output)

        return note

    def keep(self, positions: Tensor) -> None:
        """Keeps of the last forward what was seen at some positions, int64 (k,) of the flattened (B * T,)."""
        for layer in self._layers:
            x, hidden = (
                seen[layer].reshape(-1, seen[layer].shape[-1])[positions.to(seen[layer].device)]
                for seen in (self._inputs, self._hidden)
            )
            self._kept[layer].append(x)
            self._squares[layer].append(hidden.double().square().sum(dim=1))

    def inputs(self, layer: int) -> Tensor:
        """Returns what was kept of a layer: its inputs at the positions, (N, n), in the forward's dtype."""
        return torch.cat(self._kept[layer])

    @property
    def nbytes(self) -> int:
        """Bytes of all that was kept on this rank."""
        return sum(part.nbytes for parts in self._kept.values() for part in parts)

    def length(self, layer: int) -> float:
        """Returns the root mean square length of the hidden states behind a block, over all ranks."""
        squares = torch.cat(self._squares[layer])
        both = torch.stack([squares.sum(), squares.new_tensor(float(len(squares)))])
        total, count = self._sharding.all_reduce(both).tolist()
        return math.sqrt(total / max(1.0, count))

    def best(self, truth: Tensor, held: Tensor, words: int) -> tuple[int, dict[int, float]]:
        """Returns the layer that tells labels apart best, and each layer's mean squared error on examples
        that are held out. All ranks must call this.

        Args:
            truth: index of the right word of each position kept, int64 (k,).
            held: whether it is held out, bool (k,).
            words: C.
        """
        moments = {}
        for layer in self._layers:
            both = self._moments(_mapped(self.inputs(layer), layer), truth, held, words)
            moments[layer] = self._sharding.all_reduce(both).cpu()
        errors = agreed(lambda: {layer: _error(part, words) for layer, part in moments.items()})
        return min(errors, key=lambda layer: errors[layer]), errors

    @staticmethod
    def _moments(x: Tensor, truth: Tensor, held: Tensor, words: int) -> Tensor:
        """Returns (x, 1, y)ᵀ(x, 1, y), of examples to fit by and of those held out: float64 (2, f + 1 + C,
        f + 1 + C)."""
        labels = F.one_hot(truth.to(x.device), words)
        rows = torch.cat([x.double(), x.new_ones(len(x), 1).double(), labels.double()], dim=1)
        out = held.to(x.device)
        return torch.stack([rows[~out].t() @ rows[~out], rows[out].t() @ rows[out]])


def _mapped(x: Tensor, layer: int) -> Tensor:
    """Returns a layer's inputs (N, n) through its fixed random map: (N, features)."""
    n, wide = x.shape[1], torch.promote_types(x.dtype, torch.float32)
    drawn = normals(derive_key(0, str(layer), "inner layer"), torch.arange(n), min(n, FEATURES))
    return x.to(wide) @ (drawn / math.sqrt(n)).to(x.device, wide)


def _error(moments: Tensor, words: int) -> float:
    """Returns the mean squared error, on what is held out, of the best ridge."""
    fit, out = moments
    own = len(fit) - words
    scale = fit.diagonal()[: own - 1].mean()
    errors = []
    for ridge in RIDGES:
        damped = fit[:own, :own] + ridge * scale * torch.eye(own, dtype=torch.float64)
        W = torch.linalg.solve(damped, fit[:own, own:])  # (f + 1, C)
        missed = out[own:, own:] - 2 * W.t() @ out[:own, own:] + W.t() @ out[:own, :own] @ W
        errors.append(float(missed.trace() / out[own - 1, own - 1].clamp(min=1)))
    return min(errors)
