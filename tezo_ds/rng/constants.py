"""Numbers that the generator and its compiled form share."""

from __future__ import annotations

import math

from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

# Taylor coefficients in z = x², highest power first; truncation error < 1e-10 on the reduced ranges.
ATANH = tuple(1 / k for k in (13, 11, 9, 7, 5, 3, 1))
COS = tuple((-1) ** k / math.factorial(2 * k) for k in (5, 4, 3, 2, 1, 0))
SIN = tuple((-1) ** k / math.factorial(2 * k + 1) for k in (5, 4, 3, 2, 1, 0))

Word = Tensor | int
