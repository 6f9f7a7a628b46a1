"""How perturbed losses are measured."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Collection

from tezo_ds.config import TezoConfig
from tezo_ds.config.registry import PROBES
from tezo_ds.directions.lowrank import Factors
from tezo_ds.errors import ProbeError
from tezo_ds.probes.base import Probe
from tezo_ds.sharding.base import Sharding

__all__ = ["Probe", "choose_probe", "make_probe"]

log = logging.getLogger(__name__)


def make_probe(
    config: TezoConfig, sharding: Sharding, names: Collection[str], factors: Factors | None
) -> Probe:
    """The probe that `config.probe` names.

    Args:
        config: of the run.
        sharding: the model.
        names: of all parameters that train.
        factors: of the directions; None if they are dense.

    Raises:
        ProbeError: a trainable parameter is out of its reach, or directions are.
        ShardingError: in-place on weights that cannot be written exactly.
    """
    return choose_probe(config, sharding, names, factors).make(config, sharding, names, factors)


def choose_probe(
    config: TezoConfig, sharding: Sharding, names: Collection[str], factors: Factors | None
) -> type[Probe]:
    """Class of the probe to use: the one that is asked for, or by `auto` the first without gaps.

    Args:
        config, sharding, names, factors: as for `make_probe`.

    Raises:
        ProbeError: none reaches all that trains.
    """
    asked = list(PROBES) if config.probe == "auto" else [config.probe]
    for name, following in zip(asked, [*asked[1:], None], strict=True):
        module, _, attribute = PROBES[name].partition(":")
        kind: type[Probe] = getattr(importlib.import_module(module), attribute)
        if not (gaps := kind.gaps(sharding, names, factors)):
            return kind
        if following and factors is not None:
            log.warning("probe: %s, since %s cannot reach %s", following, name, listed(gaps))
    others = ", ".join(other for other in PROBES if other != name)
    if factors is None:
        raise ProbeError(f"{name} probe: directions of {config.method} are dense; use {others}")
    raise ProbeError(f"{name} probe cannot reach {listed(gaps)}; exclude it or use {others}")


def listed(gaps: dict[str, str]) -> str:
    """Names with reasons, three at the most, for a message."""
    shown = [f"{name} ({why})" for name, why in list(gaps.items())[:3]]
    more = len(gaps) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
