"""Lines of a run's output that are not its own."""

from __future__ import annotations

import re

OURS = (
    r"  (trains|frozen|frozen weights|method|rank|state|weights) .*",
    r"  (most frequent class|accuracy (before|after)|test examples|steps|padding|warning) .*",
    r"  (run folder|report) .*",
    r"[\w.-]+: \d+ training and \d+ test examples",
    r"after \d+ steps: .*examples",
    r"step \d+/\d+  loss .*",
    r".* goes on after \d+ steps.*",
    r"stopped by SIG\w+ after step \d+;.*",
)


def stray(text: str) -> list[str]:
    """Returns the lines that `tezo-ds train` does not print by itself; none where it warns of nothing."""
    lines = [line for line in text.splitlines() if line.strip()]
    return [line for line in lines if not any(re.fullmatch(one, line) for one in OURS)]
