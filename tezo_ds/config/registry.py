"""Methods and probes by name. Imports none of them, so that `--help` and a check of a config stay quick.

Another package adds a method by `tezo_ds.methods.register`, or by an entry point, which needs no import:

    [project.entry-points."tezo_ds.methods"]
    toy = "toy_method:FACTS"
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Literal

GROUP = "tezo_ds.methods"  # of entry points


@dataclass(frozen=True)
class MethodFacts:
    """Facts of a method that the package needs without importing the method's mathematics.

    Attributes:
        make: "module:function", called as function(config, space, device), which returns a `Method`.
        summary: a phrase for `--help`.
        descent: rule from a gradient estimate to a step: plain, with momentum, or Adam.
        rank: default of the field `rank`; None where directions are dense.
        fixed_factors: U and V stay for `refresh_every` steps, and `rank: auto` may choose their ranks.
        fresh_left: U is drawn anew for each direction of each step, V every ν steps.
        learns_coefficients: a run's result is its coefficients, those of ended periods included; otherwise
            the result is in the weights, and can be rebuilt from the slopes alone.
        solves: a step solves for the weights of its directions, by the changes of the logits along them.
        lr: default of the field `lr`.
    """

    make: str
    summary: str
    descent: Literal["sgd", "momentum", "adam"] = "sgd"
    rank: int | None = 16
    fixed_factors: bool = False
    fresh_left: bool = False
    learns_coefficients: bool = False
    solves: bool = False
    lr: float = 1e-6

    @property
    def dense_moments(self) -> int:
        """Numbers kept beside each trained weight."""
        return {"sgd": 0, "momentum": 1, "adam": 2}[self.descent] if self.rank is None else 0

    def load(self) -> Any:
        """Returns the function that `make` names."""
        module, _, name = self.make.partition(":")
        return getattr(importlib.import_module(module), name)


_TEZO, _LOZO, _MEZO = (f"tezo_ds.methods.{name}:make" for name in ("tezo", "lozo", "mezo"))
METHODS: dict[str, MethodFacts] = {
    "tezo": MethodFacts(_TEZO, "TeZO", fixed_factors=True, learns_coefficients=True),
    "tezo-m": MethodFacts(
        _TEZO, "TeZO with momentum", "momentum", fixed_factors=True, learns_coefficients=True
    ),
    "tezo-adam": MethodFacts(
        "tezo_ds.methods.tezo_adam:make",
        "TeZO-Adam as published",
        "adam",
        fixed_factors=True,
        lr=1e-3,
    ),
    "tezo-adam-coef": MethodFacts(
        _TEZO,
        "Adam on TeZO's coefficients",
        "adam",
        fixed_factors=True,
        learns_coefficients=True,
        lr=1e-4,
    ),
    "tezo-gn": MethodFacts(
        "tezo_ds.methods.tezo_gn:make",
        "Gauss-Newton in the span of TeZO's directions",
        fixed_factors=True,
        learns_coefficients=True,
        solves=True,
        lr=1.0,
    ),
    "lozo": MethodFacts(_LOZO, "LOZO", rank=2, fresh_left=True),
    "lozo-m": MethodFacts(_LOZO, "LOZO with momentum", "momentum", rank=2, fresh_left=True),
    "mezo": MethodFacts(_MEZO, "MeZO", rank=None),
    "mezo-m": MethodFacts(_MEZO, "MeZO with momentum", "momentum", rank=None),
    "mezo-adam": MethodFacts(_MEZO, "MeZO with Adam", "adam", rank=None, lr=1e-3),
}

# `probe: auto` takes the first that reaches all that trains.
PROBES: dict[str, str] = {
    "fused": "tezo_ds.probes.fused:FusedProbe",
    "inplace": "tezo_ds.probes.inplace:InplaceProbe",
}


def register(name: str, facts: MethodFacts) -> None:
    """Adds a method, which `method: NAME` then chooses.

    Raises:
        ValueError: another method has this name.
    """
    if METHODS.get(name, facts) != facts:
        raise ValueError(f"there is a method {name!r} already; choose another name")
    METHODS[name] = facts


def facts_of(name: str) -> MethodFacts:
    """Returns the facts of a method that is built in, registered, or an entry point's.

    Raises:
        ValueError: no method has this name; lists the known ones.
    """
    if name not in METHODS:
        for point in entry_points(group=GROUP, name=name):
            register(name, point.load())
    if name not in METHODS:
        raise ValueError(f"must be one of {', '.join(METHODS)}, or of an installed package's own")
    return METHODS[name]
