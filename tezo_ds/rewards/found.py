"""Reward functions by name: built in, of a module, or of a file."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tezo_ds.errors import ConfigError
from tezo_ds.rewards.builtin import KINDS, builtin
from tezo_ds.user_functions import user_function

Rewards = Sequence[float | None]
Reward = Callable[..., Rewards]  # (prompts, completions, **columns) -> a reward for each completion


@dataclass(frozen=True)
class Judge:
    """One reward function.

    Attributes:
        name: as the user gave it.
        function: TRL's `reward(prompts, completions, **columns)`.
        at: file and line where it begins; its module where that is not known.
        file: where its code is; "" where that is not known.
        takes: columns that it has parameters for; None: it takes all.
        needs: those of them that it cannot do without.
    """

    name: str
    function: Reward
    at: str
    file: str
    takes: frozenset[str] | None
    needs: tuple[str, ...]


def find_judge(name: str | Reward, run_code: bool) -> Judge:
    """Returns the judge of a name, or of a function itself.

    Args:
        name: of `builtin`; "module:function", whose module may be in the working directory; or
            "file.py:function".
        run_code: whether the built-in that runs what a model wrote may be had.

    Raises:
        ConfigError: there is no such function, or its module cannot be imported.
    """
    if not isinstance(name, str):
        return _judge(getattr(name, "__name__", type(name).__name__), name)
    function = builtin(name, run_code)
    return _judge(name, user_function(name, "--reward", KINDS) if function is None else function)


def _judge(name: str, function: Any) -> Judge:
    if not callable(function):
        raise ConfigError(f"--reward {name}: is a {type(function).__name__}, not a function")
    inner = inspect.unwrap(function)
    while isinstance(inner, functools.partial):
        inner = inspect.unwrap(inner.func)
    if inspect.iscoroutinefunction(inner):
        raise ConfigError(f"--reward {name}: is async; wrap it in a function that runs it")
    code = getattr(inner, "__code__", None) or getattr(type(inner).__call__, "__code__", None)
    file = "" if code is None else code.co_filename
    at = f"{file}:{code.co_firstlineno}" if code is not None else str(inner.__module__)
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # of C code
        return Judge(name, function, at, file, None, ())
    columns = [p for p in parameters if p.name not in ("prompts", "completions")]
    named = [p for p in columns if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in columns)
    return Judge(
        name, function, at, file, None if takes_all else frozenset(p.name for p in parameters),
        tuple(p.name for p in named if p.default is p.empty),
    )  # fmt: skip
