"""Silence about what torch cannot follow without values: it logs a traceback before it raises one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silence() -> Iterator[None]:
    """Context manager: inside, torch logs nothing of operations that it cannot follow; it raises as ever."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was
