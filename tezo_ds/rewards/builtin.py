"""Reward functions that are built in; each has TRL's signature."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial

from tezo_ds.errors import ConfigError
from tezo_ds.rewards.code import code, warn
from tezo_ds.tasks.metrics import OfPair, of_pairs

KINDS = (
    "exact, f1, rouge-l, number, regex:PATTERN, format:PATTERN, length:WORDS, code, module:function or "
    "file.py:function"
)
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def builtin(name: str, run_code: bool) -> Callable[..., list[float]] | None:
    """Returns the reward function of a name, None if no such one is built in.

    Args:
        name: "exact", "f1", "rouge-l" and "regex:PATTERN" compare with the answer as metrics do, see
            `of_pairs`; "number", "format:PATTERN" and "length:WORDS" are functions of this file.
        run_code: whether "code" may be had.

    Raises:
        ConfigError: a pattern or a number of words is none.
    """
    kind, _, given = name.partition(":")
    if name == "number":
        return number
    if name == "code":
        if not run_code:
            raise ConfigError(
                "--reward code: runs what a model wrote; add --run-code if this machine may do that"
            )
        warn()
        return code
    if kind == "format" and given:
        return partial(shaped, _pattern(name, given))
    if kind == "length" and given.isdecimal() and int(given):
        return partial(length, int(given))
    if kind == "length":
        raise ConfigError(f"--reward {name}: write length:WORDS, WORDS 1 or more")
    compares = of_pairs(name, "--reward")
    return None if compares is None else partial(compared, compares)


def _pattern(name: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"--reward {name}: is no regular expression ({error})") from None


def compared(with_: OfPair, /, completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """Rewards a completion by what a metric says of it beside the answer."""
    return [with_(said, str(right)) for said, right in zip(completions, answer, strict=True)]


def number(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """Rewards by 1 a completion whose last number is the answer's last one: 72, 72.0 and 1,072 are read; also
    after other words, as in GSM8K's answers."""
    return [
        float((n := last_number(said)) is not None and n == last_number(str(right)))
        for said, right in zip(completions, answer, strict=True)
    ]


def last_number(text: str) -> Decimal | None:
    """Returns the last number in a text, None if there is none."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def shaped(pattern: re.Pattern[str], /, completions: Sequence[str]) -> list[float]:
    """Rewards by 1 a completion that the whole of a pattern matches, but for white space around it; its dot
    matches line ends too."""
    return [float(pattern.fullmatch(said.strip()) is not None) for said in completions]


def length(words: int, /, completions: Sequence[str]) -> list[float]:
    """Rewards by 1 a completion of so many words, one of n by 1 - |n - words| / words, and by 0 from twice as
    many on."""
    return [max(0.0, 1 - abs(len(said.split()) - words) / words) for said in completions]
