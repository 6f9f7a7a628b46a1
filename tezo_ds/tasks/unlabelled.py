"""Notice of a file without the label column: all its text is trained on, which may not be what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from tezo_ds.tasks.spec import TaskSpec


def unlabelled(spec: TaskSpec, columns: Sequence[str]) -> str | None:
    """Returns a line that says so, with the column that may have been meant; None where all is as asked."""
    told = (spec.verbalizers, spec.choices_field, spec.answer_field)
    if told != (None, None, None) or spec.label_field in columns:
        return None
    said = f"no column {spec.label_field!r}: the whole text is trained on"
    near = near_name(spec.label_field, [name for name in columns if name not in spec.columns])
    if near is None:
        return said
    return f"{said}; if column {near!r} is the label, add --label-field {_quoted(near)}"


def near_name(name: str, names: Sequence[str]) -> str | None:
    """Returns the one of `names` that is most like a name: in other letters' case, padded, or misspelt."""
    plain = {other.strip().lower(): other for other in reversed(names)}
    wanted = name.strip().lower()
    found = difflib.get_close_matches(wanted, plain, 1, 0.75)
    found = found or [other for other in plain if wanted in other]  # such as label_text
    return plain[found[0]] if found else None


def _quoted(name: str) -> str:
    """Returns a name as a shell takes it."""
    return name if name.isidentifier() else f'"{name}"'
