"""A pytest plugin for the tests of the command line; modules name it in `pytest_plugins`."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import WORDS, Given, Run, call
from tiny_tokenizer import save_tiny_llama


def make_given(folder: Path, **config: int) -> Given:
    """Makes a tiny Llama with its tokenizer, and 48 labelled films; config as of `save_tiny_llama`."""
    feelings = ("long", "dull", "slow", "fresh", "warm", "odd")
    rows = [
        {"text": f"film {i} felt {feelings[i % 6]}", "label": label}
        for i, label in enumerate(list(WORDS) * 16)
    ]
    (folder / "films.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [f"{row['text']} It was {word}" for row in rows for word in WORDS.values()]
    save_tiny_llama(folder / "model", texts, **config)
    return Given(folder / "model", folder / "films.jsonl")


def with_ragged_films(given: Given, path: Path) -> Given:
    """Writes films of texts of many lengths, and returns what a user of them has."""
    rows = given.data.read_text().splitlines()
    longer = [row.replace("felt", "felt" + " very" * (i % 9)) for i, row in enumerate(rows)]
    path.write_text("\n".join(longer) + "\n")
    return Given(given.model, path)


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return make_given(tmp_path_factory.mktemp("given"))


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return make_given(tmp_path_factory.mktemp("untied"), tie_word_embeddings=False)


def make_plain(given: Given, output: Path) -> Run:
    """Trains a finished run of one process."""
    assert call(*given.train(output, eval_every=4), drawn=True) == 0
    return Run(output)


@pytest.fixture(scope="session")
def plain(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_plain(given, tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture
def hearing_again() -> Iterator[None]:
    """Restores the signal handlers after a test, as an interrupted command ignores signals from then on."""
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)
