"""Whether the fit of the output layer has room for the states that it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tezo_ds.doctor.flags import RunFlags
from tezo_ds.doctor.report import Failed, Row
from tezo_ds.doctor.resources import room
from tezo_ds.doctor.verdicts import TIGHT, Asked
from tezo_ds.plan.needs import GIB, Layout, Needs
from tezo_ds.plan.output_layer import Fit

CHECK = "output layer"
ADVICE = "fewer of --output-layer-examples, a shorter --max-length, or more ranks"


def row(
    flags: RunFlags, asked: Asked, layout: Layout, skeleton: nn.Module | Failed | None, need: Needs | None,
    machines: Mapping[int, Mapping[str, Any]],
) -> Row:  # fmt: skip
    """Returns the row of a run that fits its output layer, from what all ranks said of their machines."""
    if skeleton is None or isinstance(skeleton, Failed) or need is None:
        return Row(CHECK, "unchecked", "no --model" if skeleton is None else "see model")
    found = room(asked, need, layout, machines)
    if isinstance(found, Failed):
        return Row(CHECK, "unchecked", "see memory")
    return judge(flags.output_layer(skeleton, len(asked.ranks)), *found)


def judge(fit: Fit | None, free: int, of_what: str) -> Row:
    """Judges what a rank keeps while the output layer is fitted.

    Args:
        fit: of a rank; None: the number of training examples is not known.
        free: bytes that are free for a rank beside what the run needs.
        of_what: where they are.
    """
    if fit is None:
        return Row(
            CHECK, "unchecked", "as many states are kept as there are labels",
            "name --train-examples or --output-layer-examples",
        )  # fmt: skip
    text = (
        f"a fit keeps at most {fit.states / GIB:.2f} GiB of states of {fit.positions:,} labels, "
        f"{fit.nbytes / GIB:.2f} GiB at once, of {max(free, 0) / GIB:.2f} GiB for a rank of {of_what}"
    )
    if fit.nbytes > free:
        return Row(CHECK, "red", text, ADVICE)
    if fit.nbytes > TIGHT * free:
        return Row(CHECK, "yellow", text, ADVICE)
    return Row(CHECK, "green", text)
