"""The check for a GPU, at toy size: its rows, tries of their own, time limits, and its page."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import gpu_check
import pytest
from command_line import TIMEOUT
from fault_runs import server
from parts.gpu_check import bits, forward, generation, learning, quantised, speed
from parts.gpu_check.report import MARKERS
from parts.gpu_check.rows import FAILED, MEASURED, PASSED, SKIPPED, Options, Rows, Skip, read
from rich.console import Console
from task_files import write
from tiny_tokenizer import save_tiny_llama

QUESTIONS = [
    {"text": f"Who wrote number {i} of these?", "label": ("HUM", "LOC", "NUM")[i % 3]} for i in range(12)
]  # fmt: skip


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    folder = tmp_path_factory.mktemp("gpu")
    save_tiny_llama(
        folder / "model", [row["text"] for row in QUESTIONS], max_position_embeddings=512
    )
    (folder / "trec").mkdir()
    write(folder / "trec" / "train.jsonl", QUESTIONS[:9])
    write(folder / "trec" / "test.jsonl", QUESTIONS[9:])
    return Options(True, folder / "model", folder / "trec", folder / "work", 0.2)


class Forked:
    """A process that the check starts, forked instead: importing takes seconds."""

    def __init__(self, words: Sequence[str], **_: Any) -> None:
        self._read, write = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            out, code = io.StringIO(), 1
            try:
                with redirect_stdout(out):
                    code = gpu_check.main(words[2:])
            except BaseException:
                out.write(traceback.format_exc())
            finally:
                os.write(write, out.getvalue().encode())
                os._exit(code)
        os.close(write)
        self.returncode: int | None = None

    def communicate(self) -> tuple[str, str]:
        with os.fdopen(self._read) as pipe:
            out = pipe.read()
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return out, out


def run_forked(words: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
    process = Forked(words)
    out, err = process.communicate()
    assert process.returncode is not None
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def run_parts(options: Options) -> None:
    """Runs every part in this process, which joins a world of one."""
    sys.argv = ["gpu_check.py"]
    speed.MODELS, speed.SHAPES = ("llama-7b", "opt-13b"), ("16x32", "16x400")
    learning.SEEDS = (1,)
    forward.EXAMPLES, forward.LONGEST, forward.ROUNDS, forward.SHAPES = 5, 17, 2, ("16x32",)
    subprocess.run, subprocess.Popen = run_forked, Forked  # type: ignore[misc,assignment]
    options.work.mkdir()
    for part in (bits, speed, forward, learning, generation, quantised):
        name = part.__name__.rpartition(".")[2]
        part.run(Rows(name, options.work / f"{name}.jsonl"), options)


@pytest.fixture(scope="module")
def found(options: Options) -> dict[str, list[Any]]:
    process = server().Process(target=run_parts, args=(options,))
    process.start()
    process.join(TIMEOUT)
    process.kill()
    assert process.exitcode == 0
    return {part: read(options.work / f"{part}.jsonl") for part in gpu_check.PARTS}


def test_every_part_runs_on_a_cpu(found: dict[str, list[Any]]) -> None:
    odd = [row for rows in found.values() for row in rows if row.status not in (PASSED, MEASURED)]
    assert {row.part for row in odd} <= {"quantised", "forward"}
    assert all(row.status == SKIPPED for row in odd)
    ways = {row.name.split(": ")[1]: row for row in found["forward"]}
    assert len(found["forward"]) == 3 + 4 and ways["CUDA graphs"].told == "needs a CUDA GPU"
    losses = [ways[name].found["loss"] for name in ("padded, sdpa", "end to end, sdpa")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)  # of bfloat16
    assert ways["compiled"].found["loss"] == pytest.approx(ways["eager"].found["loss"], rel=1e-2)
    assert len(found["quantised"]) == 8
    assert len(found["bits"]) == 11 and all(row.status == PASSED for row in found["bits"])
    assert len(found["speed"]) == 2 * (1 + 7 + 5)
    steps = [row.found for row in found["speed"] if "weights" not in row.name]
    assert all(step["ratio"] > 0 and step["tokens_per_second"] > 0 for step in steps)
    assert [step["published"][0] for step in steps if step["published"]] == [0.088] * 7 + [
        2.702
    ] * 5
    assert [row.name for row in found["learning"]] == [f"{m}, seed 1" for m in learning.METHODS]
    assert all(row.found["steps"] >= 1 and row.found["examples"] == 3 for row in found["learning"])
    assert [row.found["ratio"] > 0 for row in found["generation"]] == [True, True]


def test_a_failure_hides_no_other(tmp_path: Path, options: Options) -> None:
    rows = Rows("bits", tmp_path / "rows")

    def fails() -> str:
        raise ValueError("two\nlines")

    def skips() -> str:
        raise Skip("not here")

    for name, run in (("a", fails), ("b", skips), ("c", lambda: "well")):
        rows.check(name, run)
    a, b, c = read(tmp_path / "rows")
    assert (a.status, b.status, c.status) == (FAILED, SKIPPED, PASSED)
    assert "ValueError" in a.told and "\n" not in a.told and "two\nlines" in a.found["traceback"]
    gone = Options(True, tmp_path, tmp_path, tmp_path, 1.0)
    with pytest.raises(Skip, match=r"launch/prepare_quickstart\.py makes it"):
        gone.small_model()


def test_a_killed_run_that_goes_on_otherwise_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(words: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        folder, until, kill = Path(words[3]), int(words[4]), int(words[5])
        with (folder / "slopes").open("a") as file:
            print(folder.name == "killed" and not kill, until, file=file)
        return subprocess.CompletedProcess(words, -9 if kill else 0, "", "")

    monkeypatch.setattr(subprocess, "run", spoilt)
    with pytest.raises(AssertionError, match="slopes after the kill are others"):
        bits.killed_run(tmp_path)


def test_a_part_whose_time_is_over_is_said_and_the_page_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "describe", lambda: "a GPU")
    out = ["--out", str(tmp_path)]
    # Each is ended at once, and its rows of an earlier run do not count.
    (tmp_path / "bits.jsonl").write_text("not a row")
    assert gpu_check.main([*out, "--parts", "bits", "speed", "--patience", "0.0001"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("was ended after") == 2 and "2 failed" in printed
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["status"] for row in found["rows"]] == [FAILED, FAILED]
    page = tmp_path / "page.md"
    page.write_text("\n".join(["before", *MARKERS, "after"]))
    gpu_check.main(["--report", str(tmp_path / "gpu.json"), "--page", str(page)])
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after")
    assert "| speed | all of it | FAILED | was ended after" in text and "Toy sizes" in text


def test_a_part_that_breaks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    args = gpu_check.arguments().parse_args(["--out", str(tmp_path), "--parts", "bits"])
    (broken,) = gpu_check.check(args, Console(quiet=True))
    assert broken.told == "ended with exit code 1; see bits.log"
