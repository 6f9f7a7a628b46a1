"""Declaration of a field: once, for the command line, the docs and the validation alike."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from pydantic.fields import FieldInfo


def declared(
    default: Any, text: str, *, group: str | None = None, used_by: str = "all", example: Any = None,
    flag: bool = True, **bounds: Any,
) -> Any:  # fmt: skip
    """Returns a pydantic field with all that help texts and docs say of the field.

    Args:
        default: value of an unset field; `...`: the field is required.
        text: a sentence for `--help` and docs, which names values and unit.
        group: heading in `--help` and docs; None: the command's own.
        used_by: what uses the field: "all"; methods, "tezo…" for all whose names begin so; "fused probe" or
            "in-place probe"; "methods that write weights"; or values of another field, "rank auto", or its
            name alone where any but its default will do.
        example: a value to show.
        flag: whether the command line has an option for the field.
        bounds: bounds of the value, as pydantic's `Field` takes them.
    """
    extra = {"group": group, "used_by": used_by, "example": example, "flag": flag}
    return Field(default, description=text, json_schema_extra=extra, **bounds)


def extra_of(field: FieldInfo) -> dict[str, Any]:
    """Returns a field's group, used_by, example and flag."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict), "a field that was not declared by `declared`"
    return dict(extra)
