"""Fields of the tezo block that were set, and that the chosen method, probe or schedule does not look at."""

from __future__ import annotations

from tezo_ds.config import TezoConfig
from tezo_ds.config.declared import extra_of
from tezo_ds.engine.engine import Engine

PROBES = {"fused probe": "fused", "in-place probe": "inplace"}
WRITERS, REWARD = "methods that write weights", "--reward"


def unused_fields(engine: Engine) -> str:
    """Returns one line that names the fields that were set and change nothing in this run; "" where none."""
    unused = {
        name: extra_of(TezoConfig.model_fields[name])["used_by"]
        for name in TezoConfig.model_fields
        if name in engine.config.model_fields_set
    }
    unused = {name: by for name, by in unused.items() if not _looks_at(engine, by)}
    if engine.config.adapter == "tt" and "rank" in engine.config.model_fields_set:
        unused["rank"] = "directions in weights; tensor trains take tt_rank"
    if not unused:
        return ""
    listed = ", ".join(f"{name} (for {by})" for name, by in unused.items())
    return f"set, but not used in this run: {listed}; leave out, or change what they are for"


def _looks_at(engine: Engine, used_by: str) -> bool:
    """Returns whether a run looks at a field, by the field's `used_by`, see `declared`."""
    config = engine.config
    field, _, values = used_by.partition(" ")
    if used_by == "all":
        return True
    if used_by in PROBES:
        return engine.probe.name == PROBES[used_by]
    if used_by == WRITERS:
        return engine.method.writes or config.writes_periods
    if used_by == REWARD:
        return engine.objective.gain is not None
    if used_by in TezoConfig.model_fields:
        return bool(getattr(config, used_by) != TezoConfig.model_fields[used_by].get_default())
    if field in TezoConfig.model_fields:
        return str(getattr(config, field)) in values.split(", ")
    return _is_one_of(config, used_by.split(", "))


def _is_one_of(config: TezoConfig, names: list[str]) -> bool:
    if not config.facts.make.startswith("tezo_ds."):  # of another package, which we cannot know
        return True
    return any(
        config.method.startswith(name[:-1]) if name.endswith("…") else config.method == name
        for name in names
    )
