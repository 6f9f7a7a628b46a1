"""Trained vectors in the fused probe: biases, and the weights of norms.

A layer's result is affine in its vectors, so each branch's change is a term of the result:

    y += δ_b          bias
    y += x̂ ∘ δ_b      weight of a norm; x̂ = f(x; w = 1, b = 0) - f(x; w = 0, b = 0)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from tezo_ds.adapters.sites import AdapterSite
from tezo_ds.models.structure import acts_plainly, kind_of, users
from tezo_ds.sharding.base import Sharding
from tezo_ds.sharding.view import as_matrix
from tezo_ds.trunk.stand_ins import all_replaced

Norm = Callable[[Tensor], Tensor]


class VectorSite:
    """One module and its vectors that train.

    Args:
        path: the module's path.
        module: the module.
        bias, weight: the parameters' names where they train.
        normalised: gives x̂; None where only a bias trains.
    """

    def __init__(
        self, path: str, module: nn.Module, bias: str | None, weight: str | None,
        normalised: Norm | None,
    ) -> None:  # fmt: skip
        self.path, self.module = path, module
        self.bias, self.weight, self._normalised = bias, weight, normalised
        self.calls = 0

    @property
    def name(self) -> str:
        """Name of one of the site's parameters."""
        name = self.weight or self.bias
        assert name is not None
        return name

    def around(self, add: Callable[[VectorSite, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        """Returns a forward of the module whose result has passed through `add`."""
        forward = self.module.forward

        def call(*args: Tensor, **kwargs: Tensor) -> Tensor:
            x = next(chain(args, kwargs.values()))
            return add(self, x, forward(*args, **kwargs))

        return call

    def chosen(self, changes: Mapping[str, Tensor], rows: Tensor) -> dict[str, Any]:
        """Returns the site's changes of some branches alone, int64 (k,), by name."""
        return {name: changes[name][rows] for name in (self.bias, self.weight) if name is not None}

    def add_(self, x: Tensor, y: Tensor, changes: Mapping[str, Tensor]) -> Tensor:
        """Returns y with the site's terms; changes are each δ, (branches, numel), float32 or wider."""
        self.calls += 1
        y = y.contiguous()
        for name in filter(None, (self.bias, self.weight)):
            change = changes[name][:, None]  # (branches, 1, numel)
            rows = y.view(len(change), -1, y.shape[-1])
            if name == self.weight:
                assert self._normalised is not None
                change = self._normalised(x).reshape(rows.shape) * change
            rows.add_(change.to(y.dtype))
        return y


def find_vector_sites(sharding: Sharding, names: Collection[str]) -> Iterator[VectorSite]:
    """Yields a site for each module that owns some of the named vectors, all of them covered."""
    paths = {id(module): path for path, module in sharding.module.named_modules()}
    owned: dict[int, tuple[nn.Module, dict[str, str]]] = {}
    for name, owner, attribute in users(sharding.module, set(names)):
        owned.setdefault(id(owner), (owner, {}))[1][attribute] = name
    for owner, attributes in owned.values():
        normalised = None
        if "weight" in attributes:
            weight = owner.get_parameter("weight")
            n, dtype = sharding.shape(weight).numel(), sharding.compute_dtype(weight)
            normalised = _normalised(owner, torch.zeros(n, device=sharding.device, dtype=dtype))
        names_of = attributes.get("bias"), attributes.get("weight")
        yield VectorSite(paths[id(owner)], owner, *names_of, normalised)


def uncovered_vectors(sharding: Sharding, names: Collection[str]) -> dict[str, str]:
    """Returns the named vectors that the fused probe cannot reach, each with its place."""
    gaps = {}
    affine: dict[int, bool] = {}
    for name, owner, attribute in users(sharding.module, set(names)):
        if kind_of(owner) in ("linear", "conv1d"):
            covered = attribute == "bias" and acts_plainly(owner)
        else:
            if id(owner) not in affine:
                affine[id(owner)] = _is_affine(owner, sharding)
            covered = attribute in ("weight", "bias") and affine[id(owner)]
        if not covered:
            gaps[name] = f"{attribute} of {type(owner).__name__}"
        elif _is_split(owner, sharding):
            gaps[name] = f"{attribute} of a layer split by tensor parallelism"
    return gaps


def _is_split(module: nn.Module, sharding: Sharding) -> bool:
    return not all(
        sharding.block(parameter).covers(as_matrix(sharding.shape(parameter)))
        for parameter in module.parameters(recurse=False)
    )


def _is_affine(module: nn.Module, sharding: Sharding) -> bool:
    """Tries on random numbers whether f(x; w, b) = f(x; 0, 0) + w ∘ x̂(x) + b."""
    shapes = {tuple(sharding.shape(p)) for p in module.parameters(recurse=False)}
    if next(module.children(), None) is not None or len(shapes) != 1 or len(min(shapes)) != 1:
        return False
    ((n,),) = shapes
    generator = torch.Generator().manual_seed(0)
    w, b, *x = torch.randn(8, n, generator=generator)
    of = torch.stack(x).view(2, 3, n)
    try:
        zero, both = _with(module, 0 * w, 0 * b)(of), _with(module, w, b)(of)
        scaled = w * _normalised(module, 0 * w)(of)
    except Exception:  # whatever a module of unknown kind may object to
        return False
    if both.shape != of.shape:
        return False
    shift = b if "bias" in module._parameters and module._parameters["bias"] is not None else 0
    return torch.allclose(both, zero + scaled + shift, rtol=1e-4, atol=1e-5)


def _normalised(module: nn.Module, zeros: Tensor) -> Norm:
    """Returns x̂ as a function of x; `zeros` has the size, device and dtype of the vectors."""
    at_zero, at_one = _with(module, zeros, zeros), _with(module, zeros + 1, zeros)
    return lambda x: at_one(x) - at_zero(x)


def _with(module: nn.Module, weight: Tensor, bias: Tensor) -> Norm:
    """Returns the module's function with other vectors: a shallow copy's, so that hooks, wrappers and
    other holders of its parameters stay out of it."""
    twin = copy.copy(module)
    values = {"weight": weight, "bias": bias}
    twin.__dict__["_parameters"] = {
        name: None if parameter is None else nn.Parameter(values[name], requires_grad=False)
        for name, parameter in module._parameters.items()
    }
    return lambda x: type(module).forward(twin, x)


@contextmanager
def attached_vectors(
    sites: list[VectorSite | AdapterSite], add: Callable[[Any, Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Context manager: what each site's module takes or gives inside passes through `add`."""
    with all_replaced((site.module, site.around(add)) for site in sites):
        yield
