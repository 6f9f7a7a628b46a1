"""What the pictures of all reports are drawn with."""

from __future__ import annotations

from typing import Any


def load_pyplot() -> Any:
    """matplotlib's pyplot, which needs no screen; not at the top of a module, as it takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
