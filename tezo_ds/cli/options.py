"""Flags that several commands take; settings from flags."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from tezo_ds.errors import ConfigError
from tezo_ds.files.text import from_json

if TYPE_CHECKING:
    from tezo_ds.settings import Settings

DATA, PANEL = "Task and data", "FSDP2"


def data_option(text: str) -> Any:
    """An option about the task and its data."""
    return typer.Option(help=text, rich_help_panel=DATA)


Model = Annotated[str | None, typer.Option(help="model folder or hub name")]
DeepSpeed = Annotated[
    Path | None,
    typer.Option(help="DeepSpeed JSON with a tezo block; its ZeRO-3 shards the weights"),
]
Task = Annotated[str | None, data_option("built-in name, or a .jsonl/.csv file (needs --template)")]
Data = Annotated[
    str | None, data_option("local folder or file, in place of the hub, for a built-in task")
]
TestData = Annotated[str | None, data_option("test file")]
Template = Annotated[str | None, data_option('prompt with columns in braces, e.g. "{text} It was"')]
Verbalizers = Annotated[
    str | None, data_option('label to word, as JSON: {"0": "bad", "1": "good"}')
]
Objective = Annotated[
    str | None,
    data_option("lm: the answer among all tokens (default); choices: among the task's words alone"),
]
LabelField = Annotated[str | None, data_option("column that holds the label")]
TestFraction = Annotated[float | None, data_option("held out where there is no test file (0.2)")]
TestExamples = Annotated[int | None, data_option("at most so many test examples")]
DataSeed = Annotated[int | None, data_option("of the split and of subsets (0)")]
MaxLength = Annotated[int | None, data_option("tokens; longer prompts lose their beginning (512)")]
EvalBatch = Annotated[int | None, data_option("examples of a rank in one evaluation forward (32)")]
Dtype = Annotated[
    str | None,
    typer.Option(help="auto, float32, bfloat16 or float16; DeepSpeed's config decides where given"),
]

Fsdp = Annotated[
    bool | None,
    typer.Option(
        "--fsdp/--no-fsdp",
        help="shard the weights by FSDP2 over all ranks; each reads only its shards from disk",
        rich_help_panel=PANEL,
    ),
]
FsdpReplicas = Annotated[
    int | None,
    typer.Option(
        help="whole copies of the weights, e.g. one a node, between which only scalars travel (1)",
        rich_help_panel=PANEL,
    ),
]
FsdpOffloadParams = Annotated[
    bool | None,
    typer.Option(
        "--fsdp-offload-params/--no-fsdp-offload-params",
        help="keep the shards in CPU memory until they are gathered",
        rich_help_panel=PANEL,
    ),
]
ComputeDtype = Annotated[
    str | None,
    typer.Option(
        help="bfloat16, float16 or float32: weights of --dtype are cast to it as they are gathered",
        rich_help_panel=PANEL,
    ),
]


def refuse_idle(fsdp: bool, values: Mapping[str, Any]) -> None:
    """Raises ConfigError if one of the flags is set where FSDP2 is not used."""
    idle = {
        "fsdp_replicas": (None, 1),
        "fsdp_offload_params": (None, False),
        "compute_dtype": (None,),
    }
    for name, unset in idle.items():
        if not fsdp and values[name] not in unset:
            raise ConfigError(f"--{name.replace('_', '-')} needs --fsdp; add it, or leave both out")


def settings_from(given: dict[str, Any], before: dict[str, Any]) -> Settings:
    """Settings from flags, over those of an earlier run or of the launcher.

    Raises:
        ConfigError: --model or --task is missing, or a value is out of range.
    """
    from tezo_ds.settings import Settings

    chosen = {k: v for k, v in given.items() if k in Settings.model_fields and v is not None}
    if "verbalizers" in chosen:
        chosen["verbalizers"] = _json_object(chosen["verbalizers"])
    merged = {**before, **chosen}
    for name in ("model", "task"):
        if name not in merged:
            raise ConfigError(f"--{name} is missing; see --help for examples")
    try:
        return Settings(**merged)
    except ValidationError as error:
        first = error.errors()[0]
        flag = "--" + ".".join(map(str, first["loc"])).replace("_", "-")
        raise ConfigError(f"{flag}: {first['msg']} (got {first['input']!r})") from None


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = from_json(text)
    except ValueError as error:
        raise ConfigError(f"--verbalizers is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError('--verbalizers must be a JSON object, e.g. {"0": "bad", "1": "good"}')
    return value
