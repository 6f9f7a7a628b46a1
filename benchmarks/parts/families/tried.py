"""What works with a model: each feature runs, and its numbers are compared with those of another way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import tezo_ds
from parts.families.models import batch
from tezo_ds.errors import TezoError
from tezo_ds.output_layer.fit import fit
from tezo_ds.output_layer.states import collect

Make = Callable[[], nn.Module]
STEPS, EXAMPLES, WORDS = 3, 40, (7, 40, 12)
MANY = 120  # examples by which a step that is solved moves something in every family
CLOSE = 1e-6  # of losses in float64, over the largest
IMAGES = ("*vision_tower*", "*multi_modal_projector*")  # take no part in a forward of text
_FIELDS: dict[str, Any] = {
    "rank": 2, "rho": 1e-2, "lr": 1e-4, "queries": 2, "seed": 3, "exclude": IMAGES,
}  # fmt: skip


class Differs(Exception):
    """Two ways of computing one number did not agree."""


def tried(run: Callable[[Make], None], make: Make) -> str:
    """Returns why something does not work with a model, in a line; "" where it does."""
    try:
        run(make)
    except Differs as error:
        return f"WRONG: {error}"
    except TezoError as error:
        return str(error)
    return ""


def fused(make: Make) -> None:
    """All branches of a step in one forward give the losses of one branch at a time.

    Raises:
        Differs: they do not.
        TezoError: it does not work.
    """
    alike(_losses(make, probe="fused"), _losses(make, probe="inplace"))


def trunk(make: Make) -> None:
    """Frozen blocks that run once for all branches give the losses of whole forwards. Raises as `fused`
    does."""
    late: dict[str, Any] = {"include": ("last:1",), "queries": 3}
    engine = tezo_ds.initialize(make(), {**_FIELDS, **late})
    engine.step(batch(EXAMPLES))
    found = engine.objective.trunk
    if found is None or found.found is None:
        raise TezoError(found.reason if found is not None else "no trunk is looked for")
    alike(_losses(make, **late), _losses(make, **late, shared_trunk=False))


def solves(make: Make) -> None:
    """Steps of tezo-gn are those whose logits were known before the first. Raises as `fused` does."""
    ours = _solved(make, False)
    if not any(ours):
        raise Differs("no step moved anything")
    alike(ours, _solved(make, True))


def fitted(make: Make, blocks: str = "none", maps: str = "last") -> None:
    """The output layer is fitted in closed form, with terms of inner layers. Raises as `fused` does."""
    engine = tezo_ds.initialize(make(), _FIELDS)
    term, words = engine.output_layer, torch.tensor(WORDS)
    term.refuse_unfit()
    assert term.layer is not None, "refused before"
    inner = term.inner.of_blocks(blocks, maps)
    examples = batch(EXAMPLES, WORDS), torch.arange(EXAMPLES) % 5 == 4
    with torch.no_grad():
        states = collect(engine.objective, term.layer, [examples], words, inner)
    found = fit(states, False, lambda part: part)
    if not math.isfinite(found.after.loss) or len(found.inner) != len(inner):
        raise Differs("the fit is not finite, or lacks a term")


FEATURES: dict[str, Callable[[Make], None]] = {
    "one forward a step": fused,
    "late layers alone": trunk,
    "tezo-gn": solves,
    "output layer": fitted,
    "last maps": lambda make: fitted(make, "layers:1-2", "last"),
    "value projections": lambda make: fitted(make, "layers:1-2", "values"),
}


def _losses(make: Make, **fields: Any) -> list[float]:
    """Returns losses and slopes of some steps."""
    engine, found = tezo_ds.initialize(make(), {**_FIELDS, **fields}), list[float]()
    for _ in range(STEPS):
        report = engine.step(batch(EXAMPLES))
        found += [report.loss, *map(float, report.kappa)]
    return found


def _solved(make: Make, known: bool) -> list[float]:
    """Returns what some steps of tezo-gn are solved for; `known`: after a forward without a step."""
    fields = {**_FIELDS, "method": "tezo-gn", "lr": 1.0}
    engine = tezo_ds.initialize(make(), fields)
    if known:
        engine.loss(batch(MANY))
    return [number for _ in range(STEPS) for number in engine.step(batch(MANY)).solved or ()]


def alike(ours: list[float], others: list[float]) -> None:
    """Raises Differs unless numbers are the same up to rounding."""
    most = max(map(abs, others))
    if not all(abs(a - b) <= CLOSE * most for a, b in zip(ours, others, strict=True)):  # NaN is not
        raise Differs(f"{ours} is not {others}")
