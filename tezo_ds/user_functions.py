"""Functions of the user's own, by the names of a module, or a file, and of what is in it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from tezo_ds.errors import ConfigError, one_line


def user_function(name: str, option: str, kinds: str) -> Any:
    """Returns what "module:function" or "file.py:function" names.

    Args:
        name: a module may be in the working directory.
        option: where the name was given, for errors.
        kinds: names that the option knows, for errors.

    Raises:
        ConfigError: there is no such function, or its module cannot be imported.
    """
    where, _, attribute = name.rpartition(":")
    what = f"{option} {name}"
    if not where or not attribute:
        raise ConfigError(f"{what}: is not known; name {kinds}")
    module = (
        _file(what, Path(where), kinds) if where.endswith(".py") else _module(what, where, kinds)
    )
    try:
        return functools.reduce(getattr, attribute.split("."), module)
    except AttributeError:
        has = [n for n, v in vars(module).items() if inspect.isfunction(v) and n[0] != "_"]
        raise ConfigError(
            f"{what}: {module.__file__} has no {attribute!r}; its functions: {', '.join(has) or 'none'}"
        ) from None


def _module(what: str, module: str, kinds: str) -> ModuleType:
    _also_in(Path.cwd())
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"{what}: there is no module {error.name!r}, neither installed nor in {Path.cwd()}; "
                f"name {kinds}"
            ) from None
        raise _not_imported(what, error) from error
    except Exception as error:  # the user's own
        raise _not_imported(what, error) from error


def _file(what: str, path: Path, kinds: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"{what}: there is no file {path}; name {kinds}")
    path = path.resolve()
    _also_in(path.parent)
    known = f"_user_file_{path.stem}"
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
        raise _not_imported(what, error) from error
    return module


def _also_in(folder: Path) -> None:
    """Lets modules be found in a folder too, after all others: a file of the user's must not stand in the
    place of a package that is imported later."""
    if str(folder) not in sys.path and not (folder == Path.cwd() and "" in sys.path):
        sys.path.append(str(folder))


def _not_imported(what: str, error: Exception) -> ConfigError:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    frames = [f for f in frames if not os.path.samefile(f.filename, __file__)]
    at = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return ConfigError(f"{what}: cannot be imported{at} ({one_line(error)})")
