"""Patterns of `include` and `exclude` that match no parameter although they are part of names."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from tezo_ds.config import TezoConfig
from tezo_ds.errors import ConfigError
from tezo_ds.patterns import matching
from tezo_ds.sharding import Sharding

log = logging.getLogger(__name__)


def check_patterns(sharding: Sharding, config: TezoConfig) -> None:
    """Checks that globs are of whole names. Where others of them match, rank 0 says so in a line.

    Raises:
        ConfigError: no pattern of `include` matches, and globs around the given words would; a pattern names
            layers that the model does not have.
    """
    names = [name for name, _ in sharding.module.named_parameters()]
    include = () if config.chooses else config.include
    for field, patterns in (("include", include), ("exclude", config.exclude)):
        meant = list(_meant(field, patterns, names))
        if not meant:
            continue
        given = " and ".join(repr(pattern) for pattern, _ in meant)
        globs = " ".join(f"--{field} '{glob}'" for _, several in meant for glob in several)
        message = (
            f"{field}: {given} matches no parameter, as a pattern is a glob of a whole name; use {globs} "
            "(in a config a list of strings)"
        )
        if field == "include" and not matching(patterns, names):
            raise ConfigError(message)
        if sharding.place == 0:
            log.warning("%s", message)


def _meant(
    field: str, patterns: Sequence[str], names: Sequence[str]
) -> Iterator[tuple[str, list[str]]]:
    """Yields each pattern that matches nothing, with globs that match something and were meant."""
    for pattern in patterns:
        if matching([pattern], names, field):
            continue
        words = [word.strip(" '\"*[]()") for word in pattern.split(",")]
        globs = [f"*{word}*" for word in words if word]
        if found := [glob for glob in globs if matching([glob], names)]:
            yield pattern, found
