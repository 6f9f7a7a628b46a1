"""Layers that read the very same tensor (q, k, v; gate, up), found without a forward of the model.

Such layers share one product x [V₁ V₂ V₃], and the shape of a product sets its last bits. So they have to
be known before the first loss, and alike in every process. The model's own code shows them, run once on
tensors that have shapes and no values, with as many examples as `EXAMPLES` says.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from tezo_ds.models.structure import kind_of
from tezo_ds.sharding.base import Sharding

EXAMPLES = (
    7,
    11,
)  # examples of the run without values; the second where the first is another dim of the inputs
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


_FOUND: dict[Hashable, list[list[str]]] = {}  # runs of models that were looked at in this process
_MOST = 256


def readers(
    sharding: Sharding, paths: Collection[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[list[str]]:
    """Returns what `Hollow.readers` does, which is asked once for models that are alike."""
    if (
        "past_key_values" in kwargs
    ):  # which the forward to come fills, and a run without values must not
        kwargs = {**kwargs, "past_key_values": None, "use_cache": False}
    key = _alike(sharding, paths, args, kwargs)
    if key in _FOUND:
        return _FOUND[key]
    found = Hollow(sharding).readers(paths, args, kwargs)
    if key is not None and len(_FOUND) < _MOST:
        _FOUND[key] = found
    return found


def _alike(
    sharding: Sharding, paths: Collection[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Hashable:
    """Returns what the runs are a function of, for a model whose code goes by a config, as those of
    transformers do: classes of modules, config, shapes. None for others, which may go by more."""
    as_dict = getattr(getattr(sharding.module, "config", None), "to_dict", None)
    if as_dict is None:
        return None
    modules = tuple((path, type(module)) for path, module in sharding.module.named_modules())
    weights = [
        (*sharding.shape(p), sharding.compute_dtype(p)) for p in sharding.module.parameters()
    ]
    rows, examples = _examples(args, kwargs)
    given = tree_map_only(
        Tensor, lambda x: (_shape(x, rows, examples), x.dtype), [args, dict(kwargs)]
    )
    return modules, tuple(weights), repr(as_dict()), repr(given), tuple(sorted(paths))


def _examples(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the rows of a forward's arguments, and how many examples are run in their place."""
    shapes = _shapes(args, kwargs)
    sizes = {n for shape in shapes for n in shape[1:]}
    return max(shape[0] for shape in shapes), next(n for n in EXAMPLES if n not in sizes)


def _shapes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Size]:
    return [x.shape for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim()]


def _shape(x: Tensor, rows: int, examples: int) -> tuple[int, ...]:
    """Returns the shape of an argument of the run without values."""
    return (examples, *x.shape[1:]) if x.shape[:1] == (rows,) else tuple(x.shape)


class Hollow:
    """A copy of a model's modules whose parameters and buffers have shapes and no values.

    Whole on every rank and without hooks, so neither gathers nor wrappers of forwards take part.

    Args:
        sharding: the model.
    """

    def __init__(self, sharding: Sharding) -> None:
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._sharding = sharding
        self._packed = {id(weight.module): weight for weight in sharding.packed.values()}
        self._copies: dict[int, Any] = {}  # by id of what they are copies of
        with _disable_current_modes(), self._fake:
            self.module: nn.Module = self._module(sharding.module)

    def _module(self, module: nn.Module) -> nn.Module:
        packed = self._packed.get(id(module))
        if packed is not None and kind_of(module) == "linear":  # whose kernels ask for values
            (m, n), bias = packed.shape, getattr(module, "bias", None) is not None
            device = self._sharding.device
            return self._copies.setdefault(
                id(module), nn.Linear(n, m, bias, device=device, dtype=packed.dtype)
            )
        if id(module) not in self._copies:
            # Not by copy.copy, as the classes that `fully_shard` makes construct themselves otherwise.
            twin = self._copies[id(module)] = object.__new__(type(module))
            held = vars(twin)
            held.update(vars(module))
            held.pop("forward", None)
            held.update({name: type(held[name])() for name in _HOOKS})
            for kind, make in (
                ("_parameters", self._parameter),
                ("_buffers", self._like),
                ("_modules", self._module),
            ):
                parts = vars(module)[kind].items()
                held[kind] = {name: part if part is None else make(part) for name, part in parts}
        twin = self._copies[id(module)]
        return twin

    def _parameter(self, parameter: nn.Parameter) -> nn.Parameter:
        if id(parameter) not in self._copies:
            whole = torch.empty(
                self._sharding.shape(parameter),
                dtype=self._sharding.compute_dtype(parameter),
                device=self._sharding.device,
            )
            self._copies[id(parameter)] = nn.Parameter(whole, requires_grad=False)
        twin: nn.Parameter = self._copies[id(parameter)]
        return twin

    @staticmethod
    def _like(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    @torch.no_grad()
    def readers(
        self, paths: Collection[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> list[list[str]]:
        """Returns runs of modules, called once each, that read one tensor right after another.

        Only tensors whose rows are examples count, not such as serve every example alike.

        Args:
            paths: paths of the modules to watch.
            args, kwargs: arguments of a forward; only shapes matter, not the number of examples.

        Raises:
            Exception: of any kind, where the model's code asks for values.
        """
        rows, examples = _examples(args, kwargs)
        lengths = {shape[1] for shape in _shapes(args, kwargs) if len(shape) > 1}
        leads = {examples, *(examples * length for length in lengths)}

        def hollow(x: Tensor) -> Tensor:
            return torch.empty(_shape(x, rows, examples), dtype=x.dtype, device=x.device)

        watch = _Watch(leads)
        for path, module in self.module.named_modules():
            if path in paths:
                watch.attach(path, module)
        with _disable_current_modes(), self._fake:
            given, named = tree_map_only(Tensor, hollow, (args, dict(kwargs)))
            self.module(*given, **named)
        return watch.runs()


class _Watch:
    """Record of the tensors that modules read in one forward."""

    def __init__(self, leads: Collection[int]) -> None:
        self._leads = leads
        self._runs: list[list[str]] = []
        self._last: weakref.ref[Tensor] | None = None
        self._version = -1

    def attach(self, path: str, module: nn.Module) -> None:
        """Watches a module from now on."""

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(iter((*args, *kwargs.values())))
            if x.shape[:1] and x.shape[0] in self._leads:
                self._note(path, x)

        module.register_forward_pre_hook(note, with_kwargs=True)

    def _note(self, path: str, x: Tensor) -> None:
        if self._last is not None and self._last() is x and self._version == x._version:
            self._runs[-1].append(path)
        else:
            self._runs.append([path])
        self._last, self._version = weakref.ref(x), x._version

    def runs(self) -> list[list[str]]:
        """Returns runs of two modules or more, none of which was called more than once."""
        times = Counter(path for run in self._runs for path in run)
        return [run for run in self._runs if len(run) > 1 and all(times[path] == 1 for path in run)]
