"""Imports of the libraries that a command needs, in less time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Context manager: what is imported inside is not searched for garbage, then or later.

    Modules live as long as the process. Python would go through all of their objects again and again while
    they are imported, which takes a second of the five that a start takes. Nothing changes in a process that
    has torch, as its garbage may be large.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
