"""Layers whose weights are packed: found by what they hold, and tried as y = x Ŵᵀ.

A packed weight is any but a plain floating-point tensor of 16 bits or more: bytes of bitsandbytes, tensor
subclasses of torchao, buffers of GPTQ and its kin. Its name, shape and dtype here are those of the matrix
that it stands for, as the same model has it in 16 bits, so that U, V and an adapter are of that matrix.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

TRIED = 64  # inputs of a layer that a trial sets
ROWS = 256  # unit vectors in one forward
ROUNDS, NOT_LINEAR = 4e-3, 5e-2  # relative errors; bfloat16 alone makes 3e-3 at most


@dataclass(frozen=True)
class PackedWeight:
    """A weight of a layer that is stored in fewer bits.

    Attributes:
        path: the layer's path.
        module: the layer.
        shape: (out, in).
        dtype: of the activations around the layer, and so of U and V.
        kind: library and class of what holds the weight.
    """

    path: str
    module: nn.Module
    shape: torch.Size
    dtype: torch.dtype
    kind: str

    @property
    def nbytes(self) -> int:
        """Bytes of all that stands for the matrix: numbers, scales, zero points."""
        bias = getattr(self.module, "bias", None)
        own = [t for t in _tensors(self.module) if t is not bias]
        if (state := _state(self.module)) is not None:
            held = (part for part in (state, getattr(state, "state2", None)) if part is not None)
            own += [t for part in held for t in vars(part).values() if isinstance(t, Tensor)]
        parts = {id(part): part.nbytes for tensor in own for part in _parts(tensor)}
        return sum(parts.values())

    @torch.no_grad()
    def dequantised(self) -> Tensor:
        """Returns Ŵ, (out, in) in `dtype`: what the weight unpacks itself to, or what the layer makes of unit
        vectors."""
        if (unpacked := _unpacked(self.module)) is not None:
            return unpacked.to(self.dtype)
        columns = torch.arange(self.shape[1])
        parts = [self._of_units(some) for some in columns.split(ROWS)]
        return torch.cat(parts).t().contiguous()

    def _of_units(self, columns: Tensor) -> Tensor:
        """Returns columns of Ŵ as rows: (k, out)."""
        units = torch.zeros(len(columns), self.shape[1], dtype=self.dtype, device=self._device)
        units[torch.arange(len(columns)), columns] = 1
        return self._product(units)

    def _product(self, x: Tensor) -> Tensor:
        """Returns x Ŵᵀ, the bias taken away before, as 16 bits of a sum would not have all of the product."""
        held = next((h for h in _held(self.module) if "bias" in h), {})
        bias = held.get("bias")
        try:
            held["bias"] = None
            y: Tensor = self.module.forward(x)
        finally:
            held["bias"] = bias
        return y

    @property
    def _device(self) -> torch.device:
        return next(_tensors(self.module)).device

    @torch.no_grad()
    def error(self) -> float:
        """Returns |y - x Ŵᵀ| / |x Ŵᵀ| of some random x, which are not zero in at most `TRIED` places.

        Raises:
            Exception: of any kind, where the layer does not take x.
        """
        generator = torch.Generator().manual_seed(0)
        columns = torch.randperm(self.shape[1], generator=generator)[:TRIED]
        values = torch.randn(5, len(columns), generator=generator).to(self._device, self.dtype)
        x = torch.zeros(5, self.shape[1], dtype=self.dtype, device=self._device)
        x[:, columns] = values
        unpacked = _unpacked(self.module)
        rows = self._of_units(columns) if unpacked is None else unpacked[:, columns].t()
        expected = values.double() @ rows.double()
        found = self._product(x).double()
        return float((found - expected).norm() / expected.norm())


def is_packed(module: nn.Module) -> bool:
    """Returns whether a linear layer or Embedding holds its weight in another form than plain numbers."""
    if shape_of(module) is None:
        return False
    weight = getattr(module, "weight", None)
    if _state(module) is not None:  # beside bytes that pass for numbers, so that FSDP2 shards them
        return True
    if isinstance(weight, Tensor):
        return not _plain(weight)
    bias = getattr(module, "bias", None)
    return any(tensor is not bias for tensor in _tensors(module))


def shape_of(module: nn.Module) -> torch.Size | None:
    """Returns the shape of the matrix of a linear layer or Embedding, as the layer says; None for others."""
    for names in (("out_features", "in_features"), ("num_embeddings", "embedding_dim")):
        sizes = [getattr(module, name, None) for name in names]
        if all(isinstance(size, int) for size in sizes):
            return torch.Size(sizes)  # type: ignore[arg-type]
    return None


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """Returns the packed weights of a model by the names that the matrices have in 16 bits."""
    found = {path: module for path, module in model.named_modules() if is_packed(module)}
    if not found:
        return {}
    floating = [p.dtype for p in model.parameters() if p.is_floating_point() and p.itemsize > 1]
    default = next(iter(floating), torch.get_default_dtype())
    weights = {}
    for path, module in found.items():
        weight, shape = getattr(module, "weight", None), shape_of(module)
        assert shape is not None
        own = isinstance(weight, Tensor) and _wraps(weight) and not isinstance(weight, DTensor)
        dtype = weight.dtype if own and isinstance(weight, Tensor) else default
        weights[f"{path}.weight"] = PackedWeight(path, module, shape, dtype, _kind(module))
    return weights


def make_portable(weights: Iterable[PackedWeight], device: torch.device) -> None:
    """Sets layers of bitsandbytes up to read their weights as they are stored.

    On some processors they would lay them out anew in the first forward, for a kernel that computes in
    bfloat16 and knows few sizes: another result than elsewhere, and the next weights that FSDP2 gathers
    would be taken for laid out. Scales, which FSDP2 does not move, come to the device.
    """
    for weight in weights:
        module: Any = weight.module
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
        if (state := _state(module)) is not None:
            state.to(device)


def misfits(weights: Iterable[PackedWeight]) -> Iterator[tuple[PackedWeight, str]]:
    """Yields the weights whose layers do not act as y = x Ŵᵀ, each with the reason. One of each kind and
    shape is tried."""
    known: dict[Any, str | None] = {}
    for weight in weights:
        key = type(weight.module), weight.kind, weight.shape
        if key not in known:
            known[key] = _misfit(weight)
        if reason := known[key]:
            yield weight, reason


def rounding(weights: Iterable[PackedWeight]) -> tuple[PackedWeight, float] | None:
    """Returns a weight whose layer rounds its inputs, with the error of its products; None if none does."""
    known = set()
    for weight in weights:
        if weight.kind in known or _misfit(weight) or isinstance(weight.module, nn.Embedding):
            continue
        known.add(weight.kind)
        if (error := weight.error()) > ROUNDS:
            return weight, error
    return None


def _misfit(weight: PackedWeight) -> str | None:
    if isinstance(weight.module, nn.Embedding):  # a lookup in whatever the weight is
        return None if _unpacked(weight.module) is not None else "a lookup that is not known"
    try:
        error = weight.error()
    except Exception as raised:  # whatever a layer of unknown kind may object to
        said = textwrap.shorten(f"{type(raised).__name__}: {raised}", 100, placeholder=" …")
        return f"does not take an input of {weight.shape[1]} ({said})"
    return None if error <= NOT_LINEAR else f"is no linear map: error {error:.1g}"


def _unpacked(module: nn.Module) -> Tensor | None:
    """Returns what a weight unpacks itself to, a tensor subclass or 4 bits of bitsandbytes; None for any
    other, and for shards."""
    weight, state = getattr(module, "weight", None), _state(module)
    if not isinstance(weight, Tensor) or isinstance(weight, DTensor):
        return None
    unpacked: Tensor
    if state is not None and not getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import dequantize_4bit

        unpacked = dequantize_4bit(weight.data, state)
        return unpacked
    if not _wraps(weight):
        return None
    unpacked = weight.dequantize()
    return unpacked


def _state(module: nn.Module) -> Any:
    """Returns what bitsandbytes knows of a weight of 4 bits, with the layer under FSDP2; None for others."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state


def _plain(tensor: Tensor) -> bool:
    if isinstance(tensor, DTensor):
        return _plain(tensor._local_tensor)
    return tensor.is_floating_point() and tensor.itemsize > 1 and not _wraps(tensor)


def _wraps(tensor: Tensor) -> bool:
    """Returns whether a tensor is a subclass that is made of others."""
    return hasattr(tensor, "__tensor_flatten__") and not isinstance(tensor, FakeTensor)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yields a module's own parameters and buffers."""
    values = chain(*(held.values() for held in _held(module)))
    return (tensor for tensor in values if tensor is not None)


def _held(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module._parameters, module._buffers


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yields the plain tensors that a tensor is made of."""
    if not _wraps(tensor):
        yield tensor
        return
    subclass: Any = tensor
    for name in subclass.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


def _kind(module: nn.Module) -> str:
    weight: Any = getattr(module, "weight", None)
    if isinstance(weight, DTensor):
        weight = weight._local_tensor
    holder = type(weight) if isinstance(weight, Tensor) and _wraps(weight) else type(module)
    return f"{holder.__module__.partition('.')[0]} {holder.__name__}"
