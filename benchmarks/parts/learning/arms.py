"""Ways to train that `benchmarks/learning.py` compares: steps of a method, behind a fitted head or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Settings of the output layer that every method runs behind, each with what it costs in its own time.
HEADS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "bias": {"output_layer": "bias"},
    "fit": {"output_layer": "fit"},
    "inner": {"output_layer": "fit", "inner_layers": "auto"},
    "values": {"output_layer": "fit", "inner_layers": "auto", "inner_maps": "values"},
}
# Fields of a method's steps. Rates are `lr` times the factor that tuning chose.
STEPS: dict[str, dict[str, Any]] = {
    "mezo": {"method": "mezo", "rho": 1e-3, "lr": 1e-6, "batch_size": 16},
    "lozo": {"method": "lozo", "rho": 1e-3, "lr": 1e-6, "batch_size": 16},
    "tezo-adam-coef": {"method": "tezo-adam-coef", "rho": 1e-3, "lr": 1e-3, "batch_size": 16},
    "tezo-gn": {
        "method": "tezo-gn", "rho": 1e-2, "lr": 1.0, "rank": 4, "queries": 8, "batch_size": 64,
        "difference": "forward",
    },
}  # fmt: skip
# Most of a small space that is new in each step, whose forwards are cheap.
_FRESH = {**STEPS["tezo-gn"], "include": "last:1", "queries": 24, "refresh_every": 1}
# Biases of the words are columns of each solve, and begin with what a batch of examples gives.
_BIASED = {**_FRESH, "output_layer": "bias", "output_layer_examples": 64}
# What follows the last attention: nothing trains before its last map, so all branches share it.
_BEHIND = {"include": "last:1", "exclude": "*.[qkv]_proj*"}
# More than the default arms; adapters are for the head frozen alone, as they go with no other.
_TT, _LORA = (
    {"adapter": "tt", "rho": 1e-3, "batch_size": 16},
    {"adapter": "lora", "rho": 1e-2, "batch_size": 16},
)
OTHERS: dict[str, dict[str, Any]] = {
    "tezo-gn-fresh": _FRESH,
    "tezo-gn-biased": _BIASED,
    "tezo-gn-deep": {**_BIASED, "include": "last:3"},
    "tezo-gn-behind": {**_BIASED, **_BEHIND},
    "lozo-behind": {**STEPS["lozo"], **_BEHIND},
    "mezo-behind": {**STEPS["mezo"], **_BEHIND},
    **{
        name: {"method": name, "rho": 1e-3, "lr": 1e-6, "batch_size": 16}
        for name in ("tezo", "tezo-adam", "mezo-adam")
    },
    "tt": {**_TT, "method": "tezo", "lr": 1e-5},
    "tt-published": {**_TT, "method": "tezo", "tt_init": "published", "lr": 1e-5},
    "tt-adam": {**_TT, "method": "tezo-adam-coef", "lr": 1e-4},
    "tt-growing": {  # in epochs so short that queries grow within a run: 1, 2, 2, 3, 4, …, 8
        **_TT, "method": "tezo", "lr": 1e-5, "query_schedule": "adazeta", "query_alpha": 2.0,
        "query_beta": 0.5, "queries_max": 8, "steps_per_epoch": 10,
    },
    "lora": {**_LORA, "method": "tezo", "lr": 1e-5},
    "lora-adam": {**_LORA, "method": "tezo-adam-coef", "lr": 1e-4},
}  # fmt: skip
NONE = "none"  # no steps: what the head alone gives
# By name of the steps, the way of first_order.py.
FIRST_ORDER = {"adamw-lora": "lora", "adamw": "full"}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        head: a key of HEADS.
        steps: a key of STEPS or OTHERS, or NONE.
    """

    head: str
    steps: str

    @property
    def name(self) -> str:
        """Name in tables and files."""
        parts = [part for part in (self.head, self.steps) if part not in ("frozen", NONE)]
        return " + ".join(parts) or "zero-shot"

    @property
    def tuned(self) -> bool:
        """Whether a rate is to be found: Gauss-Newton's is 1, and backpropagation has a common one."""
        return "method" in self._fields and self._fields["method"] != "tezo-gn"

    @property
    def _fields(self) -> dict[str, Any]:
        return {**STEPS, **OTHERS}.get(self.steps, {})

    def flags(
        self, factor: float, common: dict[str, Any], batch_size: int | None = None
    ) -> list[str]:
        """Returns the command line's flags: the rate times a factor and, if given, another batch size."""
        fields = {**common, **HEADS[self.head], **self._fields}
        if "lr" in fields:
            fields["lr"] = float(f"{fields['lr'] * factor:.3g}")
        if batch_size is not None and self.steps != NONE:
            fields["batch_size"] = batch_size
        if "output_layer" not in fields:
            fields.pop("output_layer_examples", None)
        words = []
        for name, value in fields.items():
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if value is True else [flag, str(value)]
        return words


def arms_of(words: list[str]) -> list[Arm]:
    """Returns the arms that words name, as head or head+steps: fit, frozen+mezo."""
    made = []
    for word in words:
        head, _, steps = word.partition("+")
        made.append(Arm(head, steps or NONE))
    return made
