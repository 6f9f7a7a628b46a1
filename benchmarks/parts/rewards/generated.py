"""Tasks that a seed writes, each with one right answer that SmolLM2-135M-Instruct gives now and then."""

from __future__ import annotations

import random
from collections.abc import Callable

Row = dict[str, str]
NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo", "Mary",
    "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor",
)  # fmt: skip
THINGS = (
    "apples", "books", "candles", "coins", "eggs", "keys", "lemons", "maps", "nails", "pears", "pens",
    "plates", "ropes", "shells", "stamps", "stones", "tickets", "towels",
)  # fmt: skip
CITIES = (
    "Athens", "Berlin", "Cairo", "Dublin", "Geneva", "Lima", "Lisbon", "London", "Madrid", "Oslo", "Paris",
    "Prague", "Rome", "Tokyo", "Vienna", "Warsaw",
)  # fmt: skip


def sums(draw: random.Random) -> Row:
    """Adds two numbers below ten."""
    a, b = draw.randint(1, 9), draw.randint(1, 9)
    return {"prompt": f"Question: What is {a} + {b}?\nAnswer:", "completion": f" {a + b}"}


def cities(draw: random.Random) -> Row:
    """Finds the city in a sentence on a person."""
    name, city = draw.choice(NAMES), draw.choice(CITIES)
    thing, count = draw.choice(THINGS), draw.randint(2, 9)
    text = f"{name} moved to {city} with {count} {thing}."
    return {"prompt": f"{text}\nCity:", "completion": f" {city}"}


TASKS: dict[str, Callable[[random.Random], Row]] = {task.__name__: task for task in (cities, sums)}


def rows_of(task: str, seed: int, train: int, test: int) -> tuple[list[Row], list[Row]]:
    """Returns rows to train and to test with; no prompt is in both, and none is twice in one.

    Raises:
        ValueError: the task has not as many different prompts.
    """
    draw, rows = random.Random(f"{task} {seed}"), dict[str, Row]()
    for _ in range(100 * (train + test)):
        row = TASKS[task](draw)
        rows.setdefault(row["prompt"], row)
        if len(rows) == train + test:
            both = list(rows.values())
            return both[test:], both[:test]
    raise ValueError(f"{task} has {len(rows)} different prompts, fewer than {train + test}")
