"""All adapters of a run: where they stand, their parameters by name, and weights of each branch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tezo_ds.adapters.base import Adapter, Weights
from tezo_ds.adapters.lora import LoraAdapter
from tezo_ds.adapters.places import Place, places_of
from tezo_ds.adapters.sites import NAME, AdapterSite
from tezo_ds.adapters.tt import TensorTrainAdapter
from tezo_ds.config import TezoConfig
from tezo_ds.directions.branches import LowRank
from tezo_ds.directions.space import CoefficientSpace, Vector
from tezo_ds.errors import ConfigError
from tezo_ds.models.structure import kind_of, text_config
from tezo_ds.patterns import matching
from tezo_ds.sharding.base import Sharding
from tezo_ds.sharding.view import as_matrix

AHEAD = 1 << 20  # numbers of weights prepared at a time, at most

Kind = tuple[Adapter, torch.dtype]


class Adapters:
    """The adapters of a run.

    Attributes:
        sites: where they stand, in the model's order.
        seed: seed of the initial values.
        dtypes: dtype of each site's weights, float32 beside 16-bit ones.
    """

    def __init__(
        self, sites: Sequence[AdapterSite] = (), dtypes: Sequence[torch.dtype] = (), seed: int = 0
    ) -> None:
        self.sites, self.dtypes, self.seed = tuple(sites), tuple(dtypes), seed

    @property
    def vectors(self) -> list[Vector]:
        """All parameters, as vectors that train."""
        return [
            Vector(f"{site.name}.{name}", math.prod(shape), dtype)
            for site, dtype in zip(self.sites, self.dtypes, strict=True)
            for name, shape in site.adapter.shapes.items()
        ]

    @property
    def numel(self) -> int:
        """Number of all parameters."""
        return sum(site.adapter.numel for site in self.sites)

    @property
    def at(self) -> set[str]:
        """Names of the model's own parameters in the modules where adapters stand."""
        return {
            f"{site.path}.{name}"
            for site in self.sites
            for name, _ in site.module.named_parameters(remove_duplicate=False)
        }

    def refuse_merged(self) -> None:
        """Raises ConfigError if there are adapters, which merged weights would lack."""
        for site in self.sites:
            raise ConfigError(site.adapter.no_merge)

    def bytes_in(self, branches: int) -> int:
        """Returns the bytes of a forward's weights: of each shape what is prepared at a time, and parameters
        that it is of."""
        held = 0
        for adapter in dict.fromkeys(site.adapter for site in self.sites):
            count = sum(site.adapter == adapter for site in self.sites)
            at_once = min(count, max(1, AHEAD // (branches * adapter.prepared_numel)))
            held += 4 * branches * at_once * (adapter.prepared_numel + adapter.numel)
        return held

    def start_(self, coefficients: Tensor, space: CoefficientSpace) -> None:
        """Sets the initial values of all parameters among a run's coefficients, (D,)."""
        for site in self.sites:
            coefficients[self._columns(site, space)] = site.adapter.initial(site.name, self.seed)

    def _columns(self, site: AdapterSite, space: CoefficientSpace) -> slice:
        """Returns where a site's parameters are; they are next to each other."""
        first, *_, last = (space.slices[f"{site.name}.{name}"] for name in site.adapter.shapes)
        return slice(first.start, last.stop)

    def prepared(
        self, branches: LowRank, space: CoefficientSpace, device: torch.device | str = "cpu"
    ) -> Prepared:
        """Returns each site's weights in some branches, on the device of the forward."""
        columns = {site.name: self._columns(site, space) for site in self.sites}
        return Prepared(self, columns, branches, device)


class Prepared(dict[str, Any]):
    """Weights of each site by its name, prepared when they are asked for: those of several sites of one
    shape at once, as they are tiny, but not of all, as those of many branches are not. May hold others'
    tensors besides."""

    def __init__(
        self, adapters: Adapters, columns: dict[str, slice], branches: LowRank,
        device: torch.device | str,
    ) -> None:  # fmt: skip
        super().__init__()
        self._columns, self._branches, self._device = columns, branches, device
        self._kinds: dict[str, Kind] = {}
        self._alike: dict[Kind, list[str]] = {}  # names of sites
        self._now: dict[Kind, dict[str, Weights]] = {}
        for site, dtype in zip(adapters.sites, adapters.dtypes, strict=True):
            kind = self._kinds[site.name] = site.adapter, dtype
            self._alike.setdefault(kind, []).append(site.name)

    def __missing__(self, name: str) -> Weights:
        kind = self._kinds[name]
        now = self._now.get(kind, {})
        if name not in now:
            now = self._now[kind] = dict(self._prepare(kind, name))
        return now[name]

    def _prepare(self, kind: Kind, first: str) -> Iterator[tuple[str, Weights]]:
        """Yields the weights of a site and of some that follow it."""
        (adapter, dtype), several = kind, self._alike[kind]
        at_once = max(1, AHEAD // (len(self._branches) * adapter.prepared_numel))
        start = several.index(first)
        names = several[start : start + at_once]
        parts = [self._branches.part(self._columns[name])[:, 0].to(dtype) for name in names]
        packed = torch.stack(parts).to(self._device)  # (sites, branches, numel)
        weights = adapter.prepare(adapter.split(packed))
        for k, name in enumerate(names):
            yield name, tuple(part[k] for part in weights)  # (branches, …) each


def adapters_of(config: TezoConfig, sharding: Sharding) -> Adapters:
    """Returns the adapters that a config asks for, at those of their places that `include` and `exclude`
    leave; none of an `adapter: none`.

    Raises:
        ConfigError: the model has no places for them, or sizes do not fit.
    """
    if config.adapter == "none":
        return Adapters()
    places = places_of(sharding.module, config)
    names = [f"{place.path}.{NAME}" for place in places]
    chosen = matching(config.include, names) - matching(config.exclude, names, "exclude")
    if not chosen:
        raise ConfigError(
            f"no adapter trains: include {list(config.include)} without exclude {list(config.exclude)} "
            f"matches none of {len(names)} names such as {names[0]}"
        )
    sites, dtypes = [], []
    for place, name in zip(places, names, strict=True):
        if name in chosen:
            sites.append(AdapterSite(place, _adapter(config, sharding, place)))
            dtypes.append(_dtype(sharding, place))
    return Adapters(sites, dtypes, config.seed)


def _adapter(config: TezoConfig, sharding: Sharding, place: Place) -> Adapter:
    inputs, outputs = _sizes(sharding, place)
    if config.adapter == "lora":
        assert isinstance(config.rank, int), "the config's own check"
        return LoraAdapter((inputs, outputs), config.rank)
    return TensorTrainAdapter.of(config, inputs if place.side == "before" else outputs)


def _sizes(sharding: Sharding, place: Place) -> tuple[int, int]:
    """Returns a layer's inputs and outputs."""
    if kind_of(place.module) is None:  # a whole feed-forward with experts
        width = int(text_config(sharding.module).hidden_size)
        return width, width
    if packed := sharding.packed.get(f"{place.path}.weight"):
        return packed.shape[1], packed.shape[0]
    weight = place.module.get_parameter("weight")
    whole = as_matrix(sharding.shape(weight))
    if not sharding.block(weight).covers(whole):
        raise ConfigError(
            f"adapter: {place.path} is split by tensor parallelism, which adapters do not know; exclude "
            f"{place.path}.{NAME}, or shard by ZeRO-3 or FSDP2 alone"
        )
    if isinstance(place.module, nn.Linear):
        return place.module.in_features, place.module.out_features
    return whole  # of GPT-2's Conv1D


def _dtype(sharding: Sharding, place: Place) -> torch.dtype:
    if packed := sharding.packed.get(f"{place.path}.weight"):
        return torch.promote_types(packed.dtype, torch.float32)
    parameter = next(place.module.parameters())
    return torch.promote_types(sharding.compute_dtype(parameter), torch.float32)
