"""Packages that only some uses need: whether they are installed, and what to type where they are not."""

from __future__ import annotations

from importlib.util import find_spec

from tezo_ds.errors import ConfigError

COMMAND_LINE = (
    "accelerate",
    "datasets",
    "matplotlib",
    "psutil",
    "rich",
    "typer",
)  # the extra `train`


def need(what: str, packages: tuple[str, ...], extra: str, instead: str = "") -> None:
    """Checks that packages are installed, without importing them.

    Args:
        what: what needs them, as the error begins.
        packages: names as they are imported.
        extra: the extra of ours that installs them.
        instead: what can be done without them, as the error ends.

    Raises:
        ConfigError: one or more of them are missing; has the command that installs them.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{what} needs {', '.join(missing)}, not installed here; "
            f"pip install 'tezo_ds[{extra}]'{instead}"
        )


def need_deepspeed(what: str) -> None:
    """Checks that DeepSpeed is installed, which ZeRO-3 alone needs.

    Raises:
        ConfigError: it is missing.
    """
    need(what, ("deepspeed",), "zero3", ", or shard by FSDP2 (--fsdp), which needs no such package")
