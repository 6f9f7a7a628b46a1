"""Reading of the tezo block from a DeepSpeed JSON, a dict or flags; one line names all bad fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tezo_ds.config.block import BLOCK, TezoConfig
from tezo_ds.errors import ConfigError
from tezo_ds.files.text import read_json


def build(fields: dict[str, Any], where: str) -> TezoConfig:
    """Returns a TezoConfig of `fields`; errors name `where`.

    Raises:
        ConfigError: one line that names each bad field.
    """
    try:
        return TezoConfig(**fields)
    except ValidationError as error:
        lines: dict[str, str] = {}
        for problem in error.errors():  # a union has one for each of its members
            lines.setdefault(_field(problem), _explain(problem))
        raise ConfigError(f"{where}: " + "; ".join(lines.values())) from None


def _field(problem: Any) -> str:
    places = [part for part in problem["loc"][1:] if isinstance(part, int)]
    return ".".join(map(str, [*problem["loc"][:1], *places]))


def _explain(problem: Any) -> str:
    field = _field(problem)
    if problem["type"] == "extra_forbidden":
        known = ", ".join(TezoConfig.model_fields)
        return f"unknown field {field!r}; remove it or use one of: {known}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{field}: {message} (got {problem['input']!r})" if field else message


def resolve(
    config: TezoConfig | dict[str, Any] | str | Path,
    overrides: dict[str, Any] | None = None,
    defaults: dict[str, Any] | None = None,
) -> tuple[TezoConfig, dict[str, Any] | None]:
    """Returns the validated config, and the DeepSpeed config around the block if there is one.

    Args:
        config: a TezoConfig; a dict of its fields; a whole DeepSpeed config (dict or path to its
            JSON) with a "tezo" block.
        overrides: fields that win over the block's; None values are skipped.
        defaults: fields that neither `config` nor `overrides` sets.

    Raises:
        ConfigError: the block is missing, or a field is unknown or out of range.
    """
    where, deepspeed = f'"{BLOCK}" block', None
    if isinstance(config, TezoConfig):
        fields = config.model_dump(exclude_unset=True)
    else:
        if isinstance(config, (str, Path)):
            where, config = f'{config}: "{BLOCK}" block', read_json(config)
            if BLOCK not in config:
                raise ConfigError(f'{where} is missing; add one, e.g. "{BLOCK}": {{"rank": 16}}')
        if BLOCK in config:
            fields = config[BLOCK]
            deepspeed = {key: value for key, value in config.items() if key != BLOCK}
        elif "zero_optimization" in config:
            raise ConfigError(f'{where} is missing; add one, e.g. "{BLOCK}": {{"rank": 16}}')
        else:
            fields = config
        if not isinstance(fields, dict):
            raise ConfigError(f"{where}: must be an object, is a {type(fields).__name__}")
    chosen = {key: value for key, value in (overrides or {}).items() if value is not None}
    return build({**(defaults or {}), **fields, **chosen}, where), deepspeed
