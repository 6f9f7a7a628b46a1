"""Built-in rewards, by hand."""

from __future__ import annotations

import pytest

from tezo_ds.rewards import load_judges


@pytest.mark.parametrize(
    ("name", "said", "right", "expected"),
    [
        ("exact", "The answer!", "answer", 1.0),
        ("exact", "an answer here", "answer", 0.0),
        ("f1", "the quick fox", "quick dog", 0.5),
        (r"regex:(\d+) apples", "3 apples, no 4 apples", "4 apples", 1.0),
        (r"regex:(\d+) apples", "4 pears", "4 apples", 0.0),
        ("number", "3 + 4 = 7.", "7", 1.0),
        ("number", "so it is 1,234.50 dollars", "#### 1234.5", 1.0),
        ("number", "7 or 8", "7", 0.0),
        ("number", "-3", "3", 0.0),
        ("number", "10-3", "3", 1.0),
        ("number", "0.5", ".50", 1.0),
        ("number", "1,2345", "2345", 1.0),
        ("number", "no number", "none either", 0.0),
        ("number", "12 x7y", "12", 1.0),
        (r"format:<a>.*</a>", " <a>one\ntwo</a>\n", "", 1.0),
        (r"format:<a>.*</a>", "so <a>one</a>", "", 0.0),
        ("length:4", "one two three four", "", 1.0),
        ("length:4", "one two three", "", 0.75),
        ("length:4", "a b c d e f", "", 0.5),
        ("length:4", "", "", 0.0),
        ("length:4", "a " * 20, "", 0.0),
    ],
)
def test_by_hand(name: str, said: str, right: str, expected: float) -> None:
    assert load_judges([name])(["?"], [said], {"answer": [right]}) == [pytest.approx(expected)]


def test_an_answer_that_is_a_number_is_taken_as_text() -> None:
    assert load_judges(["number"])(["?", "?"], ["7", "8"], {"answer": [7, 9]}) == [1.0, 0.0]
