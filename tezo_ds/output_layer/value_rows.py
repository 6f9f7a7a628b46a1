"""Places of an attention's values among what one linear map gives that gives queries and keys as well.

Families order them differently, so they are found by what they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

POSITIONS = 256  # that are looked at
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by an element's bytes


def value_rows(given: Tensor, values: Tensor) -> Tensor | None:
    """Returns the place of each value among what a map gave, int64 (v,); None: it did not give them all.

    Args:
        given: what the map gave, (N, m).
        values: what the attention keeps, (N, v), of the same dtype.
    """
    given, values = given[:POSITIONS], values[:POSITIONS]
    sums, order = _sums(given).sort()
    places = torch.searchsorted(sums, _sums(values)).clamp(max=len(sums) - 1)
    rows = order[places]
    return rows if torch.equal(given[:, rows], values) else None


def _sums(x: Tensor) -> Tensor:
    """Returns a number for each column that says all its bits, int64 (columns,)."""
    bits = x.contiguous().view(_BITS[x.element_size()]).long()
    odd = 2 * torch.arange(len(x), device=x.device) + 1
    return (bits * (odd * 0x9E3779B97F4A7C1)[:, None]).sum(dim=0)  # modulo 2^64
