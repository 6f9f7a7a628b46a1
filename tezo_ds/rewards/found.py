"""Reward functions by name: built in, of a module, or of a file."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tezo_ds.errors import ConfigError, one_line
from tezo_ds.rewards.builtin import KINDS, builtin

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
    return _judge(name, _of_user(name) if function is None else function)


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


def _of_user(name: str) -> Any:
    """Returns what "module:function" or "file.py:function" names."""
    where, _, attribute = name.rpartition(":")
    if not where or not attribute:
        raise ConfigError(f"--reward {name}: is not known; name {KINDS}")
    module = _file(name, Path(where)) if where.endswith(".py") else _module(name, where)
    try:
        return functools.reduce(getattr, attribute.split("."), module)
    except AttributeError:
        has = [n for n, v in vars(module).items() if inspect.isfunction(v) and n[0] != "_"]
        raise ConfigError(
            f"--reward {name}: {module.__file__} has no {attribute!r}; its functions: "
            f"{', '.join(has) or 'none'}"
        ) from None


def _module(name: str, module: str) -> ModuleType:
    _also_in(Path.cwd())
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"--reward {name}: there is no module {error.name!r}, neither installed nor in "
                f"{Path.cwd()}; name {KINDS}"
            ) from None
        raise _not_imported(name, error) from error
    except Exception as error:  # the user's own
        raise _not_imported(name, error) from error


def _file(name: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"--reward {name}: there is no file {path}; name {KINDS}")
    path = path.resolve()
    _also_in(path.parent)
    known = f"_reward_file_{path.stem}"
    if getattr(sys.modules.get(known), "__file__", None) == str(path):
        return sys.modules[known]
    spec = importlib.util.spec_from_file_location(known, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[known] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[known]
        if not isinstance(error, Exception):
            raise
        raise _not_imported(name, error) from error
    return module


def _also_in(folder: Path) -> None:
    """Lets modules be found in a folder too, after all others: a file of the user's must not stand in the
    place of a package that is imported later."""
    if str(folder) not in sys.path and not (folder == Path.cwd() and "" in sys.path):
        sys.path.append(str(folder))


def _not_imported(name: str, error: Exception) -> ConfigError:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    frames = [f for f in frames if not os.path.samefile(f.filename, __file__)]
    at = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return ConfigError(f"--reward {name}: cannot be imported{at} ({one_line(error)})")
