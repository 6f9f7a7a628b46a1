"""Patterns of `include` and `exclude`: globs of parameter names, and layers by number, from names alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from tezo_ds.errors import ConfigError

_NUMBERED = re.compile(r"(.*?\.)?\d+(?=\.)")  # up to a name's first number, as in model.layers.3
_LAYERS = re.compile(r"\s*(last|layers)\s*:(.*)", re.DOTALL)
_RANGE = re.compile(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?")  # 3 or 24-29
TOWER = re.compile("vision|visual|image|audio|speech")
SWAPPED = {"encoder": "decoder", "decoder": "encoder"}


def matching(patterns: Iterable[str], names: Sequence[str], field: str = "include") -> set[str]:
    """Returns the names that at least one of the patterns matches.

    Args:
        patterns: each a glob of a whole name; `last:6`, the last six layers of `numbered_layers`; or
            `layers:0-2,7`, the layers of these indices, from 0 and with both ends.
        names: all parameter names of the model, in its order.
        field: the field that holds the patterns; for errors.

    Raises:
        ConfigError: a pattern names layers that the model does not have.
    """
    found: set[str] = set()
    for pattern in patterns:
        if of_layers := _LAYERS.fullmatch(pattern):
            chosen = _chosen(
                of_layers[1], of_layers[2], numbered_layers(names), f"{field}: {pattern!r}"
            )
            found.update(name for name in names if numbered_module(name) in chosen)
        else:
            found.update(name for name in names if fnmatchcase(name, pattern))
    return found


def layers_of(pattern: str, names: Iterable[str], field: str) -> list[str]:
    """Returns the numbered layers, in their order, that `last:…` or `layers:…` names among parameter names.

    Raises:
        ConfigError: the pattern is of another form, or names layers that the model does not have.
    """
    layers, of_layers = numbered_layers(names), _LAYERS.fullmatch(pattern)
    kind, text = of_layers.groups() if of_layers else ("layers", "?")
    chosen = _chosen(kind, text, layers, f"{field}: {pattern!r}")
    return [layer for layer in layers if layer in chosen]


def numbered_module(name: str) -> str | None:
    """Returns the outermost numbered module of a parameter, as model.layers.3; None outside of any."""
    found = _NUMBERED.match(name)
    return found[0] if found else None


def numbered_layers(names: Iterable[str]) -> list[str]:
    """Returns a model's transformer blocks, as model.layers.0, model.layers.1 …, in the order of their names.

    Of the lists of numbered modules it is the one with most parameters, so neither a head that is a
    Sequential nor experts within a block; a tower for images or sound must have four times as many as
    the rest. Where that list is one half of an encoder and a decoder, it is both halves, encoder first.
    """
    lists: dict[str, Counter[str]] = {}  # model.layers -> model.layers.0 -> parameters
    for name in names:
        if layer := numbered_module(name):
            lists.setdefault(layer.rpartition(".")[0], Counter())[layer] += 1
    if not lists:
        return []

    def size(prefix: str) -> float:
        return lists[prefix].total() / (4 if TOWER.search(prefix) else 1)

    largest = max(lists, key=size)
    halves = [largest]
    for start, other in _other_halves(largest):
        if inside := [prefix for prefix in lists if f"{prefix}.".startswith(other)]:
            halves = [largest, max(inside, key=size)]
            if start.endswith("decoder."):
                halves.reverse()
            break
    return [layer for prefix in halves for layer in lists[prefix]]


def _other_halves(prefix: str) -> Iterator[tuple[str, str]]:
    """Yields a prefix's beginnings that end in encoder or decoder, each with the other one's in its place."""
    parts = prefix.split(".")
    for end, part in enumerate(parts, start=1):
        if part in SWAPPED:
            before = parts[: end - 1]
            yield ".".join([*before, part, ""]), ".".join([*before, SWAPPED[part], ""])


def _chosen(kind: str, text: str, layers: Sequence[str], pattern: str) -> set[str]:
    """Returns the layers that `last:…` or `layers:…` names."""
    count = len(layers)
    if not layers:
        raise ConfigError(
            f"{pattern} names layers, and the model has none that are numbered; use a glob"
        )
    has = f"the model has {count} layers, {layers[0]} to {layers[-1]}"
    parts = text.split(",") if kind == "layers" else [text]
    ranges = [_RANGE.fullmatch(part) for part in parts]
    if not all(ranges) or (kind == "last" and "-" in text):
        example = "last:6" if kind == "last" else "layers:24-29, layers:3 or layers:0-2,7"
        raise ConfigError(f"{pattern} is not of the form {example}; {has}")
    found: set[str] = set()
    for one in ranges:
        assert one is not None
        first, last = int(one[1]), int(one[2] or one[1])
        if kind == "last":
            if not 1 <= first <= count:
                raise ConfigError(f"{pattern}: {has}; use last:1 to last:{count}")
            return set(layers[count - first :])
        if first > last:
            raise ConfigError(
                f"{pattern}: {first} is above {last}; {has}; use layers:{last}-{first}"
            )
        if last >= count:
            raise ConfigError(f"{pattern}: {has}; their indices are 0 to {count - 1}")
        found.update(layers[first : last + 1])
    return found
