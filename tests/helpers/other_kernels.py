"""Another maker's kernels, on any machine: products whose last bits depend on more than what is multiplied.

Every processor's library chooses a kernel by the shapes of the operands, and some by where these lie in
memory. So under `OtherKernels("shapes")` every product and attention is off by one unit in the last
place, here and there, by a rule of the operands' shapes and strides; under "addresses" by their places
within 64 bytes. Whatever is promised bit for bit has to hold under the first. `pytest --kernels shapes`
runs a whole session so, the ranks of worlds included.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

VARIABLE = "TEZO_TEST_KERNELS"  # for processes that tests start
KINDS = ("own", "shapes", "addresses")

aten = torch.ops.aten
PRODUCTS = {
    aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, aten.baddbmm_, aten.mv, aten.addmv, aten.linear,
    aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_attention_math,
}  # fmt: skip
WORDS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16}


class OtherKernels(TorchDispatchMode):
    """A context in which products have the bits of other kernels.

    Attributes:
        products: how many there were.
    """

    def __init__(self, by: str) -> None:
        super().__init__()
        assert by in KINDS[1:], by
        self._by, self.products = by, 0
        self._known: dict[
            int, tuple[Callable[..., Any], bool]
        ] = {}  # operators, and which multiply

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keeps torch from a wrapper around each operation, for a compiler that is not in use: it would take
        twice the time of all else."""
        return False

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if not self._multiplies(func):
            return func(*args, **(kwargs or {}))
        # Before the product, which may overwrite an operand.
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        result = func(*args, **(kwargs or {}))
        if not any(isinstance(t, FakeTensor | DTensor) for t in given):
            self.products += 1
            out = result if isinstance(result, Tensor) else result[0]
            if out.dtype in WORDS and out.device.type != "meta":
                nudge(out, zlib.crc32(repr([self._facts(t) for t in given]).encode()))
        return result

    def _multiplies(self, func: Callable[..., Any]) -> bool:
        known = self._known.get(id(func))  # as torch hashes operators in Python, each time
        if known is None:
            known = func, getattr(func, "overloadpacket", None) in PRODUCTS
            self._known[id(func)] = known
        return known[1]

    def _facts(self, operand: Tensor) -> Any:
        if self._by == "shapes":
            return tuple(operand.shape), operand.stride()
        return operand.data_ptr() % 64


def nudge(out: Tensor, key: int) -> None:
    """Moves a quarter of the numbers up and a quarter down by one unit in the last place; in 16 bits, to
    which sums are rounded at the end, one in 64. Zeros stay."""
    words = out.detach().view(WORDS[out.dtype])
    move = moves(out.numel(), key, words.dtype).view(out.shape)
    words.add_(move * (out.isfinite() & (out != 0)))


def moves(numel: int, key: int, dtype: torch.dtype) -> Tensor:
    """Returns 1, -1 and 0 for the places of a tensor, drawn by place and key: (numel,)."""
    return _kept(numel, key, dtype) if numel < 1 << 14 else _made(numel, key, dtype)


def _made(numel: int, key: int, dtype: torch.dtype) -> Tensor:
    mask = 63 if dtype == torch.int16 else 3
    which = torch.arange(numel).mul_(2654435761).add_(key).bitwise_right_shift_(13) & mask
    return (which == 0).to(dtype) - (which == 1).to(dtype)


_kept = functools.lru_cache(maxsize=4096)(_made)
