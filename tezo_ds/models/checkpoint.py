"""Fit of a checkpoint to a model: missing, misshapen and left-over weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging as transformers_logging

from tezo_ds.launched import env_rank

log = logging.getLogger(__name__)


def misfit_of(report: Mapping[str, Any]) -> str | None:
    """Returns what transformers' loading report lists as missing or misshapen; None if nothing is."""
    different = sorted(name for name, *_ in report["mismatched_keys"])
    for names, what in ((sorted(report["missing_keys"]), "no"), (different, "another shape of")):
        if names:
            return (
                f"it has {what} {names[0]} ({len(names)} such); is it whole, and does config.json "
                "fit it?"
            )
    return None


def note_left_over(report: Mapping[str, Any]) -> None:
    """Logs, on one rank, weights that the checkpoint has and the model does not."""
    if (left := sorted(report["unexpected_keys"])) and env_rank() == 0:
        log.warning("left over in the checkpoint: %s (%d such)", left[0], len(left))


@contextmanager
def without_tables() -> Iterator[None]:
    """Context manager: transformers prints no reports on the checkpoint inside."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
