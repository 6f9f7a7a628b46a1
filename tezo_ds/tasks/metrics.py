"""Metrics of generated answers beside the right ones: built in, by a pattern, or a user's function."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from tezo_ds.errors import ConfigError, one_line
from tezo_ds.user_functions import user_function

Metric = Callable[[Sequence[str], Sequence[str]], float]
OfPair = Callable[[str, str], float]
NONE = "none"
KINDS = "exact, f1, rouge-l, regex:PATTERN, module:function or file.py:function"
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def metric_of(name: str) -> Metric:
    """Returns a function (predictions, references) -> float, the mean over examples.

    Args:
        name: one of `of_pairs`, or "module:function" or "file.py:function", a user's.

    Raises:
        ConfigError: the name is none of these, the pattern is no pattern, a package is not there, or the
            user's function cannot be had.
    """
    if (of_pair := of_pairs(name)) is not None:
        return _mean(of_pair)
    return _of_user(name)


def of_pairs(name: str, option: str = "--metric") -> OfPair | None:
    """Returns a function (prediction, reference) -> float, in [0, 1]; None for a name that is not built in.

    Args:
        name: "exact" and "f1" compare words without case, punctuation and articles, as SQuAD does; "rouge-l"
            is the F measure of the longest common subsequence, by the package rouge-score; "regex:PATTERN"
            compares the last match in each, its first group if it has one.
        option: where the name was given, for errors.

    Raises:
        ConfigError: the pattern is no pattern, or a package is not there.
    """
    if name == "exact":
        return lambda said, right: float(_words(said) == _words(right))
    if name == "f1":
        return _f1
    if name == "rouge-l":
        return _rouge_l(option)
    kind, _, pattern = name.partition(":")
    return _regex(pattern, option) if kind == "regex" and pattern else None


def _mean(of_one: OfPair) -> Metric:
    def metric(predictions: Sequence[str], references: Sequence[str]) -> float:
        each = [of_one(said, right) for said, right in zip(predictions, references, strict=True)]
        return sum(each) / len(each)

    return metric


def _words(text: str) -> list[str]:
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return _ARTICLES.sub(" ", kept).split()


def _f1(said: str, right: str) -> float:
    ours, theirs = _words(said), _words(right)
    common = sum((Counter(ours) & Counter(theirs)).values())
    if not common:
        return float(ours == theirs)
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def _rouge_l(option: str) -> OfPair:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ConfigError(
            f"{option} rouge-l: needs the package rouge-score; pip install rouge-score"
        ) from None
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return lambda said, right: float(scorer.score(right, said)["rougeL"].fmeasure)


def _regex(pattern: str, option: str) -> OfPair:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{option} regex:{pattern}: is no regular expression ({error})") from None

    def found(text: str) -> str | None:
        matches = compiled.findall(text)
        if not matches:
            return None
        last = matches[-1]
        return str(last if isinstance(last, str) else last[0])

    def right(said: str, wanted: str) -> float:
        return float(found(said) is not None and found(said) == found(wanted))

    return right


def _of_user(name: str) -> Metric:
    function = user_function(name, "--metric", KINDS)

    def metric(predictions: Sequence[str], references: Sequence[str]) -> float:
        try:
            return float(function(predictions, references))
        except Exception as error:  # the user's own
            raise ConfigError(f"--metric {name}: raised {one_line(error)}") from error

    return metric
