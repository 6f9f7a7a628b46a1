"""Probes, by which perturbed losses are measured."""

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

__all__ = ["Probe", "choose_probe"]

log = logging.getLogger(__name__)


def choose_probe(
    config: TezoConfig, sharding: Sharding, names: Collection[str], factors: Factors | None
) -> type[Probe]:
    """Returns the class of the probe to use: the one asked for, or under `auto` the first without gaps.

    Args:
        config: the run's config.
        sharding: the model.
        names: names of all parameters that train.
        factors: factors of the directions; None if directions are dense.

    Raises:
        ProbeError: no such probe reaches all that trains, or directions.
    """
    asked = list(PROBES) if config.probe == "auto" else [config.probe]
    for name, following in zip(asked, [*asked[1:], None], strict=True):
        module, _, attribute = PROBES[name].partition(":")
        kind: type[Probe] = getattr(importlib.import_module(module), attribute)
        if not (gaps := kind.gaps(sharding, names, factors)):
            return kind
        if following and factors is not None and sharding.quantised:
            raise ProbeError(
                f"{name} probe cannot reach {listed(gaps)}; exclude it, as {following} would write "
                "quantised weights"
            )
        if following and factors is not None:
            log.warning(
                "probe: %s, since %s cannot reach %s; exclude it, and a step is one forward",
                following, name, listed(gaps),
            )  # fmt: skip
    others = ", ".join(other for other in PROBES if other != name)
    if factors is None:
        raise ProbeError(f"{name} probe: directions of {config.method} are dense; use {others}")
    raise ProbeError(f"{name} probe cannot reach {listed(gaps)}; exclude it or use {others}")


def listed(gaps: dict[str, str]) -> str:
    """Returns names with reasons, three at the most, for a message."""
    shown = [f"{name} ({why})" for name, why in list(gaps.items())[:3]]
    more = len(gaps) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
