"""The benchmark of rewards at toy size, and the tasks that it writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import rewards
import torch
from parts.rewards.generated import TASKS, rows_of
from parts.rewards.report import MARKERS
from tiny_tokenizer import save_tiny_llama

from tezo_ds.tasks import BUILTIN_TASKS


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_a_seeds_own_and_in_one_part_alone(task: str) -> None:
    train, test = rows_of(task, 3, 30, 20)
    assert (train, test) == rows_of(task, 3, 30, 20) and train != rows_of(task, 4, 30, 20)[0]
    assert len({row["prompt"] for row in [*train, *test]}) == 50
    with pytest.raises(ValueError, match="different prompts, fewer than"):
        rows_of("sums", 3, 80, 20)


def test_answers_are_those_of_the_prompt() -> None:
    for row in rows_of("cities", 1, 40, 10)[0]:
        assert f"moved to{row['completion']} with" in row["prompt"]
    for row in rows_of("sums", 1, 40, 10)[0]:
        sum_of = row["prompt"].split("is ")[1].split("?")[0]
        assert eval(sum_of) == int(row["completion"])


def test_both_parts_at_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"text": f"What is thing {i} ?", "label": label}
        for i, label in enumerate(("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM") * 4)
    ]
    (tmp_path / "trec").mkdir()
    for name in ("train", "valid", "test"):
        lines = [json.dumps({**row, "text": f"{name} {row['text']}"}) + "\n" for row in rows]
        (tmp_path / "trec" / f"{name}.jsonl").write_text("".join(lines))
    monkeypatch.setattr(rewards, "load_splits", lambda *_: None)
    words = (BUILTIN_TASKS["trec"].verbalizers or {}).values()
    texts = [f"{row['text']} Answer: {word}" for row in rows for word in words]
    texts += [row["prompt"] + row["completion"] for row in rows_of("cities", 1, 12, 6)[0]]
    save_tiny_llama(tmp_path / "model", texts)
    page = tmp_path / "page.md"
    page.write_text("\n".join(["before", *MARKERS, "after"]))
    options = [
        "--model", str(tmp_path / "model"), "--cache", str(tmp_path), "--out", str(tmp_path / "runs.jsonl"),
        "--page", str(page), "--seeds", "1", "--objective-budget", "0.05", "--budget", "0.05", "--rows", "12",
        "--test-rows", "6", "--examples", "12", "--test-examples", "12", "--batch-size", "3",
        "--include", "last:1",
    ]  # fmt: skip
    rewards.main(options)
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    grids = sum(map(len, rewards.GRIDS.values()))
    assert len(runs) == grids + len(rewards.GRIDS) + 1 and all(r["steps_made"] for r in runs)
    text = page.read_text()
    assert "| accuracy |" in text and "| choices |" in text and "`cities`, exact match" in text
    assert (
        "| seed | reward before |" in text and text.startswith("before") and text.endswith("after")
    )
    monkeypatch.setattr(rewards, "trained", None)  # all are finished
    rewards.main(options)
    assert page.read_text() == text
