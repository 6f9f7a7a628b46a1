"""Packages that a process takes for not installed, whatever is installed."""

from __future__ import annotations

import sys
from typing import Any


class Without:
    """A finder of modules that does not find the packages in `hidden`, nor what is written of them."""

    def __init__(self, finder: Any, hidden: set[str]) -> None:
        self._finder, self._hidden = finder, hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        hidden = name.split(".", maxsplit=1)[0] in self._hidden
        return None if hidden else self._finder.find_spec(name, path, target)

    def find_distributions(self, context: Any) -> Any:
        if context.name in self._hidden or not hasattr(self._finder, "find_distributions"):
            return ()
        return self._finder.find_distributions(context)


def hide(*packages: str) -> set[str]:
    """Hides packages, none of which was imported, as long as they are in the set that is returned."""
    assert not {name.split(".", maxsplit=1)[0] for name in sys.modules} & {*packages}
    hidden = {*packages}
    sys.meta_path[:] = [Without(finder, hidden) for finder in sys.meta_path]
    return hidden
