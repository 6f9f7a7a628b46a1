"""Options of the commands, made from declared fields, and settings made from the flags that were given."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from tezo_ds.config.declared import extra_of
from tezo_ds.config.registry import METHODS
from tezo_ds.config.schedules import LR_SCHEDULES
from tezo_ds.errors import ConfigError
from tezo_ds.files.text import from_json
from tezo_ds.settings import SHARDING, Settings

Model = TypeVar("Model", bound=BaseModel)
Command = Callable[..., None]
NAMED = {"method": [*METHODS], "schedule": [*LR_SCHEDULES]}  # whose words are names in a registry

DeepSpeed = Annotated[
    Path | None,
    typer.Option(
        help="DeepSpeed JSON with a tezo block; its ZeRO-3 shards the weights",
        rich_help_panel=SHARDING,
    ),
]


def flags_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Returns the fields of a model for which the command line has an option."""
    return {name: f for name, f in model.model_fields.items() if extra_of(f)["flag"]}


def takes(
    model: type[BaseModel], *, only: Collection[str] = (), without: Collection[str] = ()
) -> Callable[[Command], Command]:
    """Decorator: a command gets an option for each field of a model, and takes them as `**given`.

    An option that was not given is None, so that a default is said in one place, the field's.

    Args:
        model: a model whose fields `declared` made.
        only: names of the fields to take; none: all that have a flag.
        without: names of the fields to leave out.
    """

    def decorate(command: Command) -> Command:
        before = list(inspect.signature(command, eval_str=True).parameters.values())
        fields = {
            n: f for n, f in flags_of(model).items() if n in (only or [n]) and n not in without
        }
        own = [one for one in before if one.kind is not inspect.Parameter.VAR_KEYWORD]
        rest = [one for one in before if one.kind is inspect.Parameter.VAR_KEYWORD]
        made = [_option(name, field) for name, field in fields.items()]
        command.__signature__ = inspect.Signature([*own, *made, *rest])  # type: ignore[attr-defined]
        return command

    return decorate


def complete(command: Command) -> Command:
    """Decorator, the outermost: hides from typer the `**given` that `takes` has filled."""
    parameters = inspect.signature(command).parameters.values()
    named = [one for one in parameters if one.kind is not inspect.Parameter.VAR_KEYWORD]
    command.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in named}
    return command


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    kind, flag = _kind(field.annotation), name.replace("_", "-")
    names = (f"--{flag}/--no-{flag}",) if kind is bool else (f"--{flag}",)
    words = values_of(field.annotation) or NAMED.get(name)
    option = typer.Option(
        *names, help=text_of(field), rich_help_panel=extra_of(field)["group"],
        autocompletion=_beginning(words) if words else None,
    )  # fmt: skip
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def values_of(annotation: Any) -> list[str]:
    """Returns the words that a field takes, in the order of its annotation."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [word for one in get_args(annotation) for word in values_of(one)]


def _beginning(words: list[str]) -> Callable[[str], list[str]]:
    """Returns what a shell's completion asks: which of the words begin as typed so far."""

    def begin(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return begin


def shown_default(field: FieldInfo) -> str:
    """Returns a field's default as users would write it; "" where there is none."""
    default = field.default
    if field.is_required() or default is None or default == ():
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    values = default if isinstance(default, tuple) else (default,)
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def text_of(field: FieldInfo) -> str:
    """Returns the help sentence of a field, with its default."""
    default = shown_default(field)
    return f"{field.description} (default `{default}`)" if default else str(field.description)


def _kind(annotation: Any) -> Any:
    """Returns the type that the command line parses a field as; pydantic judges the value afterwards."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        kinds = {_kind(one) for one in arguments if one is not type(None)}
        return kinds.pop() if len(kinds) == 1 else str
    if origin is Annotated:
        return _kind(arguments[0])
    if origin is tuple:
        return list[str] if arguments[-1] is Ellipsis else tuple[tuple(map(_kind, arguments))]  # type: ignore[misc]
    return annotation if annotation in (bool, int, float, Path) else str


def refuse_idle(fsdp: bool, values: Mapping[str, Any]) -> None:
    """Raises ConfigError if an option that only FSDP2 looks at is set without FSDP2."""
    for name, field in Settings.model_fields.items():
        idle = not fsdp and extra_of(field)["flag"] and extra_of(field)["used_by"] == "--fsdp"
        if idle and values[name] not in (None, field.default):
            raise ConfigError(f"--{name.replace('_', '-')} needs --fsdp; add it, or leave both out")


def settings_from(given: Mapping[str, Any], before: Mapping[str, Any]) -> Settings:
    """Returns settings from flags, over those of an earlier run or of the launcher.

    Raises:
        ConfigError: --model or --task is missing, or a value is out of range.
    """
    if given.get("verbalizers") is not None:
        given = {**given, "verbalizers": _json_object(given["verbalizers"])}
    if given.get("template") is not None:
        given = {**given, "template": unescaped(given["template"])}
    if given.get("stop") is not None:
        given = {**given, "stop": [unescaped(text) for text in given["stop"]]}
    return from_flags(Settings, given, before)


def unescaped(text: str) -> str:
    r"""Returns a text with `\n` and `\t` as newline and tab, which no shell's plain quotes can hold.

    A second backslash before either keeps the two characters: `\\nu` is `\nu`. Other backslashes stay.
    """
    meant = {r"\n": "\n", r"\t": "\t", r"\\n": r"\n", r"\\t": r"\t"}
    return re.sub(r"\\{1,2}[nt]", lambda found: meant[found[0]], text)


def from_flags(
    model: type[Model],
    given: Mapping[str, Any],
    before: Mapping[str, Any] = types.MappingProxyType({}),
) -> Model:
    """Returns a model's values from the flags that were given, over those in `before`.

    Raises:
        ConfigError: a required flag is missing, or a value is out of range.
    """
    chosen = {k: v for k, v in given.items() if k in model.model_fields and v is not None}
    try:
        return model(**{**before, **chosen})
    except ValidationError as error:
        first = error.errors()[0]
    flag = "--" + ".".join(map(str, first["loc"])).replace("_", "-")
    if first["type"] == "missing":
        example = extra_of(model.model_fields[str(first["loc"][0])])["example"]
        raise ConfigError(f"{flag} is missing; add it, e.g. {flag} {example}")
    raise ConfigError(f"{flag}: {first['msg']} (got {first['input']!r})")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = from_json(text)
    except ValueError as error:
        raise ConfigError(f"--verbalizers is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError('--verbalizers must be a JSON object, e.g. {"0": "bad", "1": "good"}')
    return value
