"""The library that draws the pictures of all reports."""

from __future__ import annotations

from typing import Any


def load_pyplot() -> Any:
    """Imports matplotlib's pyplot without a screen; not at the top of a module, as it takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
