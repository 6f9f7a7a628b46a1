"""Products that depend on their operands and the number of threads alone, not on where memory lies.

MKL, with which torch multiplies on x86-64 CPUs, may choose a kernel by the address of an operand: on AMD
processors a product of one row, or attention, has up to a dozen results over 64 placements of the same
numbers. In its mode of conditional numerical reproducibility it has one, in the same time. MKL reads the
variable at its first product.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

VARIABLE, MODE = "MKL_CBWR", "AUTO"
PLACES = 64


def ask_mkl() -> None:
    """Asks MKL for reproducible products, unless the user chose a mode. Too late once MKL has multiplied."""
    os.environ.setdefault(VARIABLE, MODE)


@dataclass(frozen=True)
class Products:
    """Products of one process on its CPU: their results, kernels and MKL mode.

    Attributes:
        results: how many results one product, or one attention if more, has over `PLACES` placements.
        kernels: torch's instruction set and number of threads.
        asked: the mode asked of MKL.
    """

    results: int
    kernels: str
    asked: str


def products() -> Products:
    """Tries one product and one attention at `PLACES` placements of their operands."""
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 22, generator=generator) for n in (1, 15))
    q, k, v = (torch.randn(4, 2, 11, 10, generator=generator) for _ in range(3))
    linear: set[bytes] = set()
    attention: set[bytes] = set()
    for place in range(PLACES):
        linear.add(_bits(F.linear(_moved(x, place), _moved(w, 3 * place))))
        query, key, value = _moved(q, place), _moved(k, 3 * place), _moved(v, 7 * place)
        attention.add(_bits(F.scaled_dot_product_attention(query, key, value, is_causal=True)))
    kernels = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"
    mode = os.environ.get(VARIABLE)
    asked = f"{VARIABLE}={mode}" if mode else f"{VARIABLE} not set"
    return Products(max(len(linear), len(attention)), kernels, asked)


def _bits(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


def _moved(tensor: Tensor, place: int) -> Tensor:
    """Returns a copy that begins `place` elements after a multiple of 64 bytes."""
    each = 64 // tensor.element_size()
    room = tensor.new_empty(tensor.numel() + 2 * each)
    start = -room.data_ptr() // tensor.element_size() % each + place % each
    return room[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
