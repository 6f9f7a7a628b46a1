"""Damaged and random input by hypothesis, and its permitted outcomes: a result, or one line that names the
fault. `pytest tests/fuzz --hypothesis-profile=long` tries fifty times as many examples."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tezo_ds.errors import TezoError

Thing = TypeVar("Thing")

ALIKE = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("short", derandomize=True, **ALIKE)
settings.register_profile("long", **ALIKE)
_named = settings.get_current_profile_name() == "long"
settings.load_profile("long" if _named else "short")


def examples(count: int) -> settings:
    """Returns hypothesis settings for `count` examples; fifty times as many in the long profile."""
    return settings(max_examples=50 * count if _named else count)


NUMBERS = (
    st.integers(-3, 70)
    | st.sampled_from([10**15, 2**63, 10**30, -(10**30), 10**400])
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.sampled_from([0.0, 0.5, 1.0, 1e-320, 1e300])
)
TEXTS = st.text(max_size=8) | st.sampled_from(["", "auto", "*", "\n", "\x00", "\ud800", "a\nb"])
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
"""Whatever Python reads out of JSON, and what other writers put there: NaN, Infinity."""


def outcome(call: Callable[[], Thing], *naming: str) -> Thing | None:
    """Runs a call and returns its result; None where it refuses in one line that has one of `naming`."""
    try:
        return call()
    except TezoError as error:
        assert_one_line(str(error), *naming)
        return None


def assert_one_line(message: str, *naming: str) -> None:
    """Asserts that an error message for a user is one line, which holds one of `naming`."""
    assert len(message.splitlines()) == 1, repr(message)
    assert message.isprintable(), repr(message)
    assert not naming or any(name in message for name in naming), message


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Draws damaged bytes: cut, flipped in some bits, or with something else in place of a part."""
    kind = draw(st.sampled_from(["cut", "flip", "put"]))
    place = draw(st.integers(0, max(len(content) - 1, 0)))
    if kind == "cut":
        return content[:place]
    if kind == "flip":
        bits = bytearray(content)
        for at in [place, *draw(st.lists(st.integers(0, len(content) - 1), max_size=2))]:
            bits[at] ^= 1 << draw(st.integers(0, 7))
        return bytes(bits)
    put = draw(
        st.binary(max_size=4)
        | VALUES.map(lambda value: json.dumps(value).encode())
        | st.sampled_from([b"NaN", b"\xff", b"[" * 100_000, b'{"":' * 3000, b"9" * 5000, b"\x00"])
    )
    return content[:place] + put + content[place + draw(st.integers(0, 9)) :]


@st.composite
def changed(draw: st.DrawFn, content: dict[str, Any]) -> dict[str, Any]:
    """Draws a JSON object of which one field, at the top or one level down, is gone or has another value."""
    copy: dict[str, Any] = json.loads(json.dumps(content))
    objects = [copy, *(value for value in copy.values() if isinstance(value, dict) and value)]
    part = draw(st.sampled_from(objects))
    name = draw(st.sampled_from(sorted(part)))
    if draw(st.integers(0, 3)):
        part[name] = draw(VALUES)
    else:
        del part[name]
    return copy
