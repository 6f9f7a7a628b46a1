"""Options of `tezo-ds train` that are given several values each: the arguments of every combination."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from tezo_ds.errors import ConfigError
from tezo_ds.sweeping.halving import Trial

OWN = ("output", "resume")  # options of a run that a sweep sets


def trials_of(words: Sequence[str], command: Any) -> list[Trial]:
    """Returns the runs that words such as --lr 1e-6 3e-6 --seed 0 1 --steps 200 ask for, in their order.

    An option's values are all words up to the next option, in groups where the option takes several words.
    One that `train` takes several times, such as --include, is swept by several values at once, and is one
    list where it is given again.

    Args:
        words: what was given.
        command: the command `train` as click has it.

    Raises:
        ConfigError: no such option, or not the number of values that it takes.
    """
    known = {name: one for one in command.params for name in (*one.opts, *one.secondary_opts)}
    found: dict[
        str, list[list[str]]
    ] = {}  # by option: the words of each value, the option's name with them
    rest = list(words)
    while rest:
        flag, equals, first = rest.pop(0).partition("=")
        option = known.get(flag)
        if option is None or option.name in (*OWN, "help"):
            raise ConfigError(f"sweep: no such option: {flag}; it takes those of tezo-ds train")
        values = [first] if equals else []
        while rest and not rest[0].startswith("--") and not equals:
            values.append(rest.pop(0))
        made = _values(flag, option, values)
        before = found.setdefault(option.name, [])
        if option.multiple and before and len(made) == len(before) == 1:
            before[0] += made[0]
        else:
            before += made
    swept = [name for name, values in found.items() if len(values) > 1]
    combined = itertools.product(*found.values())
    trials = []
    for chosen in combined:
        by_name = dict(zip(found, chosen, strict=True))
        shown = tuple((name, _shown(by_name[name])) for name in swept)
        trials.append(Trial(shown, tuple(itertools.chain(*chosen))))
    if len({trial.name for trial in trials}) < len(trials):
        raise ConfigError("sweep: two runs would have one folder, as a value is given twice")
    return trials


def _values(flag: str, option: Any, values: list[str]) -> list[list[str]]:
    if option.is_flag:
        if values:
            raise ConfigError(f"sweep: {flag} takes no value (got {values[0]})")
        return [[flag]]
    if not values or len(values) % option.nargs:
        each = "a value" if option.nargs == 1 else f"{option.nargs} values each time"
        raise ConfigError(f"sweep: {flag} takes {each} (got {' '.join(values) or 'none'})")
    groups = (values[i : i + option.nargs] for i in range(0, len(values), option.nargs))
    return [[flag, *group] for group in groups]


def _shown(words: Sequence[str]) -> str:
    """Returns a value as text; on or off of an option without one."""
    return " ".join(words[1:]) or ("off" if words[0].startswith("--no-") else "on")
