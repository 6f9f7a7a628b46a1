"""Reward functions: found by name, called as TRL does, refused with their line and the completion."""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tezo_ds.errors import ConfigError, RewardFailed
from tezo_ds.rewards import load_judges
from tezo_ds.rewards.limit import Overdue, limited

PROMPTS = ["a", "b", "c"]
MADE = ["one", "two words", "three more words"]
ANSWERS = {"answer": ["x", "y", "z"]}

USERS = """
import functools, re, signal, time
import numpy, torch

calls = []

def words(prompts, completions, **columns):
    calls.append((prompts, completions, sorted(columns)))
    return [len(c.split()) for c in completions]

def with_answer(completions, answer):
    return [float(a == "y") for a in answer]

def wants(completions, target, **columns):
    return [0.0] * len(completions)

def raises(completions, **columns):
    found = []
    for said in completions:
        found.append(1 / (len(said.split()) - 2))
    return found

def raises_at_once(completions, **columns):
    raise KeyError("x")

def leaves(completions, **columns):
    raise SystemExit(3)

def sleeps(completions, **columns):
    for said in completions:
        time.sleep(0 if said == "one" else 60)

def spins(completions, **columns):
    while True:
        try:
            sum(range(1000))
        except Exception:
            pass

def backtracks(completions, **columns):
    return [1.0 if re.match(r"(a+)+$", "a" * 40 + "b") else 0.0 for _ in completions]

def cancels(completions, **columns):
    signal.alarm(0)
    time.sleep(60)

def has_an_alarm(completions, **columns):
    def stop(*_):
        raise TimeoutError
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        time.sleep(30)
    except TimeoutError:
        return [7.0] * len(completions)
    finally:
        signal.signal(signal.SIGALRM, before)

def arrays(completions, **columns):
    return numpy.arange(3, dtype=numpy.float32)

def tensors(completions, **columns):
    return torch.arange(3)

def in_list(completions, **columns):
    return [numpy.float32(1), torch.tensor(2.0), True]

def some(completions, **columns):
    return [None if c == "one" else 2.0 for c in completions]

def returns(value):
    return lambda completions, **columns: value

nan = returns([1.0, float("nan"), 0.0])
inf = returns([1.0, 0.0, float("-inf")])
short = returns([1.0])
text = returns(["good", 1.0, 1.0])
huge = returns([1, 1, 10**5000])
one = returns(1.0)
nothing = returns(None)
partly = functools.partial(lambda limit, completions, **columns: [limit] * len(completions), 4)

class Both:
    def __call__(self, prompts, completions, **columns):
        return [float(p in c) for p, c in zip(prompts, completions)]
    def method(self, completions, **columns):
        return [5.0] * len(completions)

both = Both()
number = 3

async def later(completions, **columns):
    return [0.0] * len(completions)
"""


@pytest.fixture(autouse=True)
def _functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "users_rewards.py").write_text(USERS)
    (tmp_path / "broken_rewards.py").write_text("import math\n\nmath.nothing\n")
    (tmp_path / "needs_more.py").write_text("import not_there_at_all\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield
    for name in [n for n in sys.modules if "users_rewards" in n]:
        del sys.modules[name]


def judged(name: str, **given: float) -> list[float]:
    return load_judges([name], **given)(PROMPTS, MADE, ANSWERS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("words", [1.0, 2.0, 3.0]),
        ("with_answer", [0.0, 1.0, 0.0]),
        ("arrays", [0.0, 1.0, 2.0]),
        ("tensors", [0.0, 1.0, 2.0]),
        ("in_list", [1.0, 2.0, 1.0]),
        ("some", [0.0, 2.0, 2.0]),
        ("partly", [4.0, 4.0, 4.0]),
        ("both", [0.0, 0.0, 0.0]),
        ("both.method", [5.0, 5.0, 5.0]),
        ("has_an_alarm", [7.0, 7.0, 7.0]),
    ],
)
@pytest.mark.parametrize("where", ["users_rewards", "./users_rewards.py"])
def test_functions_of_a_module_or_a_file(name: str, expected: list[float], where: str) -> None:
    assert judged(f"{where}:{name}") == expected


def test_a_function_is_called_as_trl_does_and_not_without_completions() -> None:
    judges = load_judges(["users_rewards:words"])
    assert judges(PROMPTS, MADE, ANSWERS) == [1.0, 2.0, 3.0]
    assert judges([], [], {"answer": []}) == []
    assert sys.modules["users_rewards"].calls == [(PROMPTS, MADE, ["answer"])]


def test_several_are_added_up_by_their_weights(caplog: pytest.LogCaptureFixture) -> None:
    names = ["users_rewards:words", "users_rewards:some"]
    judges = load_judges(names, [1.0, -0.5])
    assert judges(PROMPTS, MADE, ANSWERS) == [1.0, 1.0, 2.0]  # None adds nothing
    assert judges.each(PROMPTS, MADE, ANSWERS) == [[1.0, 2.0, 3.0], [None, 2.0, 2.0]]
    with caplog.at_level(logging.WARNING):
        judges(PROMPTS, MADE, ANSWERS)
        assert not caplog.records
        alone = load_judges(["users_rewards:some"])
        alone(PROMPTS, MADE, ANSWERS), alone(PROMPTS, MADE, ANSWERS)
    assert [r.message for r in caplog.records] == [
        "some completions have no reward, as every function gave None: they count as 0"
    ]
    assert load_judges([lambda completions, **_: [1.0] * 3, "exact"], [2, 1])(
        PROMPTS, MADE, {"answer": ["one", "no", "no"]}
    ) == [3.0, 2.0, 2.0]


def line_of(text: str) -> int:
    return USERS.splitlines().index(text) + 1


@pytest.mark.parametrize(
    ("name", "line", "says"),
    [
        ("raises", "        found.append(1 / (len(said.split()) - 2))",
         "raised ZeroDivisionError: division by zero, at the completion 'two words'"),
        ("raises_at_once", '    raise KeyError("x")',
         "raised KeyError: 'x', among 3 completions, the first 'one'"),
        ("leaves", "    raise SystemExit(3)", "raised SystemExit: 3"),
        ("nan", "    return lambda completions, **columns: value",
         "gave nan for the completion 'two words'"),
        ("inf", "    return lambda completions, **columns: value",
         "gave -inf for the completion 'three more words'"),
        ("text", "    return lambda completions, **columns: value", "gave 'good' for the completion 'one'"),
        ("huge", "    return lambda completions, **columns: value", "gave a number out of range"),
        ("short", "    return lambda completions, **columns: value",
         "returned 1 rewards for 3 completions; return one for each"),
        ("one", "    return lambda completions, **columns: value",
         "returned a float; return a list of 3 numbers"),
        ("nothing", "    return lambda completions, **columns: value", "returned a NoneType; return"),
        ("wants", "def wants(completions, target, **columns):",
         "needs the column 'target', and the data has 'answer'"),
    ],
)  # fmt: skip
def test_what_is_no_reward_is_refused(name: str, line: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(RewardFailed) as caught:
        judged(f"users_rewards:{name}")
    text = str(caught.value)
    assert f"reward users_rewards:{name} ({tmp_path}/users_rewards.py:{line_of(line)})" in text
    assert says in text and "\n" not in text


@pytest.mark.parametrize("name", ["sleeps", "spins", "backtracks", "cancels"])
def test_a_function_that_never_returns_is_ended(name: str) -> None:
    before, threads = signal.getsignal(signal.SIGALRM), threading.active_count()
    start = time.monotonic()
    with pytest.raises(
        RewardFailed, match=r"users_rewards\.py:\d+\): did not return within 0.2 s"
    ) as e:
        judged(f"users_rewards:{name}", timeout=0.2)
    assert time.monotonic() - start < 5
    assert name != "sleeps" or "at the completion 'two words'" in str(e.value)
    assert signal.getsignal(signal.SIGALRM) is before and threading.active_count() == threads
    assert judged("users_rewards:words", timeout=5) == [1.0, 2.0, 3.0]
    # No alarm comes later: there is neither a timer nor a thread to send one.
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0.0 and threading.active_count() == threads


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_machine_that_stalls_leaves_no_alarm(
    monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    """The time is over before the call began: the alarm went off where nothing ended it, each second."""
    before, threads = signal.getsignal(signal.SIGALRM), threading.active_count()
    starts = threading.Thread.start

    def stalling(thread: threading.Thread) -> None:
        starts(thread)
        if not elsewhere or threading.current_thread() is not threading.main_thread():
            time.sleep(0.1)

    def call() -> None:
        with contextlib.suppress(Overdue):
            limited(lambda: None, 0.01)
        found.append(signal.getitimer(signal.ITIMER_REAL)[0])

    found: list[float] = []
    monkeypatch.setattr(threading.Thread, "start", stalling)
    if elsewhere:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join(10)
    else:
        call()
    assert found == [0.0] and signal.getsignal(signal.SIGALRM) is before
    assert threading.active_count() == threads


def test_in_another_thread_python_code_is_ended_too() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            judged("users_rewards:spins", timeout=0.2)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert not thread.is_alive() and isinstance(errors[0], RewardFailed)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("never_seen", "is not known; name exact"),
        ("never_seen:f", "no module 'never_seen', neither installed nor in"),
        ("users_rewards:absent", "has no 'absent'; its functions: words, with_answer"),
        ("users_rewards:number", "is a int, not a function"),
        ("users_rewards:later", "is async"),
        ("absent.py:f", "there is no file absent.py"),
        ("broken_rewards:f", "cannot be imported at"),
        ("broken_rewards.py:f", "broken_rewards.py:3 (AttributeError"),
        ("needs_more:f", "needs_more.py:1 (ModuleNotFoundError: No module named 'not_there_at_all')"),
        ("regex:(", "is no regular expression"),
        ("format:(", "is no regular expression"),
        ("length:none", "write length:WORDS"),
    ],
)  # fmt: skip
def test_names_that_are_none(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"^--reward {re.escape(name)}: .*{re.escape(says)}"):
        load_judges([name])


def test_weights_and_limits_that_are_none() -> None:
    for weights in ([1.0, 2.0], [], [float("nan")]):
        with pytest.raises(ConfigError, match="--reward-weights"):
            load_judges(["exact"], weights)
    with pytest.raises(ConfigError, match="names no function"):
        load_judges([])
    with pytest.raises(ConfigError, match="--reward-timeout 0"):
        load_judges(["exact"], timeout=0)


def test_columns_can_be_looked_for_ahead() -> None:
    judges = load_judges(["users_rewards:words", "users_rewards:wants", "exact"])
    judges.require(["answer", "target"])
    with pytest.raises(ConfigError, match=r"wants \(.*needs the column 'target', and the data has"):
        judges.require(["answer"])
    with pytest.raises(ConfigError, match=r"exact .*needs the column 'answer'"):
        judges.require(["target"])
