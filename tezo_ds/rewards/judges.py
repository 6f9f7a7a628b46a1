"""Judgement of completions: reward functions called, their results checked, and added up by weights."""

from __future__ import annotations

import functools
import logging
import math
import numbers
import traceback
from collections.abc import Collection, Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn

from tezo_ds.errors import ConfigError, RewardFailed, one_line
from tezo_ds.rewards.found import Judge, Reward, find_judge
from tezo_ds.rewards.limit import Overdue, limited

log = logging.getLogger(__name__)
TIMEOUT = 60.0  # seconds


def load_judges(
    names: Sequence[str | Reward], weights: Sequence[float] | None = None, *,
    timeout: float | None = TIMEOUT, run_code: bool = False,
) -> Judges:  # fmt: skip
    """Returns the judges of some names, or functions.

    Args:
        names: see `find_judge`.
        weights: as many; None: 1 each.
        timeout: seconds that a call of one function may take, see `limited`; None: for ever.
        run_code: whether the built-in that runs what a model wrote may be had.

    Raises:
        ConfigError: a function cannot be had, or there are not as many finite weights.
    """
    if not names:
        raise ConfigError("--reward: names no function")
    given = [1.0] * len(names) if weights is None else [float(w) for w in weights]
    if len(given) != len(names) or not all(map(math.isfinite, given)):
        raise ConfigError(
            f"--reward-weights: got {given} for {len(names)} --reward; give a finite number for each"
        )
    if timeout is not None and not timeout > 0:
        raise ConfigError(f"--reward-timeout {timeout:g}: must be above 0 seconds")
    return Judges([find_judge(name, run_code) for name in names], given, timeout)


class Judges:
    """Reward functions with weights.

    Attributes:
        names: of the functions, as they were given.
        weights: as many.
    """

    def __init__(
        self, judges: Sequence[Judge], weights: Sequence[float], timeout: float | None = TIMEOUT
    ) -> None:
        self._judges, self._timeout = list(judges), timeout
        self.names, self.weights = [judge.name for judge in judges], list(weights)
        self._said = False

    def require(self, columns: Collection[str]) -> None:
        """Raises ConfigError where a function needs a column that data of these columns does not have."""
        for judge in self._judges:
            if missing := [column for column in judge.needs if column not in columns]:
                raise ConfigError(f"--reward {judge.name} {_lacks(judge, missing[0], columns)}")

    def __call__(
        self, prompts: list[str], completions: list[str], columns: Mapping[str, list[Any]]
    ) -> list[float]:
        """Returns the reward of each completion, the functions' rewards by their weights, added up; as in
        TRL, one that is None adds nothing.

        Args:
            prompts, completions: texts, as many.
            columns: of the data, a value for each completion.

        Raises:
            RewardFailed: a function raised, took too long, or returned something else than a finite number
                or None for each completion.
        """
        each = self.each(prompts, completions, columns)
        if not self._said and any(
            all(r is None for r in of_one) for of_one in zip(*each, strict=True)
        ):
            self._said = True
            log.warning(
                "some completions have no reward, as every function gave None: they count as 0"
            )
        return [
            sum(w * r for w, r in zip(self.weights, of_one, strict=True) if r is not None)
            for of_one in zip(*each, strict=True)
        ]

    def each(
        self, prompts: list[str], completions: list[str], columns: Mapping[str, list[Any]]
    ) -> list[list[float | None]]:
        """Returns the rewards of each function, in the order of `names`, without weights. Raises as a call
        does."""
        if not completions:
            return [[] for _ in self._judges]
        return [self._of(judge, prompts, completions, columns) for judge in self._judges]

    def _of(
        self, judge: Judge, prompts: list[str], completions: list[str], columns: Mapping[str, list[Any]]
    ) -> list[float | None]:  # fmt: skip
        given = {**columns, "prompts": prompts, "completions": completions}
        if missing := [column for column in judge.needs if column not in given]:
            raise RewardFailed(f"reward {judge.name} {_lacks(judge, missing[0], columns)}")
        if judge.takes is not None:
            given = {name: value for name, value in given.items() if name in judge.takes}
        try:
            returned = limited(functools.partial(judge.function, **given), self._timeout)
        except Overdue as error:
            _failed(judge, error, completions, f"did not return within {self._timeout:g} s")
        except (Exception, SystemExit) as error:  # the user's own
            _failed(judge, error, completions, f"raised {one_line(error)}")
        return _checked(judge, returned, completions)


def _checked(judge: Judge, returned: Any, completions: list[str]) -> list[float | None]:
    """Returns what a function returned as numbers; arrays and tensors are lists here."""
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    who, count = f"reward {judge.name} ({judge.at})", len(completions)
    if not isinstance(values, list | tuple):
        raise RewardFailed(
            f"{who}: returned a {type(returned).__name__}; return a list of {count} numbers, one for each "
            "completion"
        )
    if len(values) != count:
        raise RewardFailed(
            f"{who}: returned {len(values)} rewards for {count} completions; return one for each"
        )
    found: list[float | None] = []
    for value, said in zip(values, completions, strict=True):
        value = value.item() if hasattr(value, "item") else value
        if value is not None and not (isinstance(value, numbers.Real) and _is_finite(value)):
            shown = "a number out of range" if isinstance(value, int) else _cut(repr(value), 40)
            raise RewardFailed(
                f"{who}: gave {shown} for the completion {_shortened(said)}; give a finite number, or None "
                "where it does not apply"
            )
        found.append(None if value is None else float(value))
    return found


def _is_finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def _failed(judge: Judge, error: BaseException, completions: list[str], how: str) -> NoReturn:
    """Raises RewardFailed with the line of the user's code, and the completion that it was at."""
    frames = list(traceback.walk_tb(error.__traceback__))
    theirs = [f for f in frames if f[0].f_code.co_filename == judge.file]
    at = f"{theirs[-1][0].f_code.co_filename}:{theirs[-1][1]}" if theirs else judge.at
    index = _index_of(error.__traceback__, completions)
    said = (
        f"among {len(completions)} completions, the first {_shortened(completions[0])}"
        if index is None
        else f"at the completion {_shortened(completions[index])}"
    )
    raise RewardFailed(f"reward {judge.name} ({at}): {how}, {said}") from error


def _index_of(trace: TracebackType | None, completions: list[str]) -> int | None:
    """Returns which completion a function was at: the innermost variable that is one of them, the very
    object. To call the function again with one at a time would take as long again, and change its state."""
    place = {id(said): index for index, said in enumerate(completions)}
    if len(completions) == 1:
        return 0
    for frame, _ in reversed(list(traceback.walk_tb(trace))):
        for value in frame.f_locals.values():
            if isinstance(value, str) and id(value) in place:
                return place[id(value)]
    return None


def _lacks(judge: Judge, column: str, columns: Collection[str]) -> str:
    named = ", ".join(repr(name) for name in columns) or "none besides the prompts"
    return f"({judge.at}): needs the column {column!r}, and the data has {named}"


def _shortened(text: str) -> str:
    return repr(_cut(" ".join(text.split()), 80))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 2]} …"
