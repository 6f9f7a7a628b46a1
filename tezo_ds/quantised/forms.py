"""Forms of packed weights by name, and the bytes that a matrix takes in each, scales counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tezo_ds.errors import ConfigError

GROUP = 64  # weights that share a scale, of int4


@dataclass(frozen=True)
class Form:
    """A form of packed weights.

    Attributes:
        name: as `--load-in` and `--weights` have it.
        bits: bits of a number.
        group: numbers that share a scale; 0: those of a row do.
        scale_bits: bits of a group's scale, with its zero point.
    """

    name: str
    bits: float
    group: int = 0
    scale_bits: float = 0

    def nbytes(self, shape: Sequence[int]) -> int:
        """Returns the bytes of a matrix (m, n)."""
        numel = math.prod(shape)
        groups = numel / self.group if self.group else numel / shape[-1]
        return math.ceil((self.bits * numel + self.scale_bits * groups) / 8)


FORMS = {
    form.name: form
    for form in (
        Form("int8", 8, 0, 16),  # torchao: a scale a row, in the dtype of the activations
        Form("int4", 4, GROUP, 32),  # torchao on a GPU: scale and zero point in 16 bits
        Form("8bit", 8, 0, 32),  # bitsandbytes: the largest number of a row
        Form(
            "4bit", 4, 64, 8 + 32 / 256
        ),  # nf4; largest numbers of groups in bytes, doubly quantised
    )
}


def form_named(name: str) -> Form:
    """Returns the form of a name, or of a number of bits, scales counted.

    Raises:
        ConfigError: neither.
    """
    if name in FORMS:
        return FORMS[name]
    try:
        bits = float(name)
    except ValueError:
        bits = math.nan
    if not 1 <= bits <= 16:
        raise ConfigError(
            f"--weights {name}: must be one of {', '.join(FORMS)}, or bits a weight with all scales, "
            "e.g. 4.25"
        )
    return Form(f"{bits:g} bits", bits)


def form_stored(config: Any) -> Form | None:
    """Returns the form that a checkpoint's config.json says its weights have; None: plain, or not known."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    about = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(about.get("quant_method"))
    if about.get("load_in_4bit") or about.get("load_in_8bit"):
        return FORMS["4bit" if about.get("load_in_4bit") else "8bit"]
    if isinstance(bits := about.get("bits"), int):  # GPTQ, AWQ: scale and zero point of each group
        group = max(0, about.get("group_size") or 0)
        return Form(f"{method} {bits}", bits, group, 16 + bits)
    return Form(method, 8, 128 * 128, 32) if method == "fp8" else None
