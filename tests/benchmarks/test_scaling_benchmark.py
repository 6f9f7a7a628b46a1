"""The benchmark of scaling: its clock, its efficiency, its CSV, its page, and the program itself."""

from __future__ import annotations

import os
import re
from pathlib import Path
from unittest import mock

import pytest
import scaling
from command_line import TIMEOUT, free_port
from fault_runs import server
from parts.scaling.measure import copies, examples_of, misfit, summary
from parts.scaling.report import MARKERS, draw, markdown, rates, read, save
from parts.scaling.split import PARTS, Split
from scaling_rows import row


def clocked(*times: float) -> Split:
    """Makes a split whose clock shows these times, one after the other."""
    split = Split()
    vars(split).update(_accelerator=False, _mark=mock.Mock(side_effect=times))
    return split


def test_a_part_within_a_part_counts_once() -> None:
    split = clocked(0, 1, 3, 7, 8, 10, 20, 25)
    with split.part("rest"), split.part("forward"):
        with split.part("gather"):
            pass
        assert split.now() == "forward"
    assert split.now() is None
    with split.part("rest"):  # from 20 to 25: what lies between two steps is nobody's
        pass
    found = split.seconds()
    assert found == {**dict.fromkeys(PARTS, 0), "rest": 1 + 2 + 5, "forward": 2 + 1, "gather": 4}
    assert not any(split.seconds().values()), "told once"


def test_a_step_is_the_slowest_ranks_and_its_parts_are_means() -> None:
    quick = [{**dict.fromkeys(PARTS, 0.0), "gather": t, "step": t} for t in (1.0, 2.0, 9.0)]
    slow = [{**dict.fromkeys(PARTS, 0.0), "gather": 0.0, "step": 3 * t} for t in (1.0, 2.0, 9.0)]
    found = summary([quick, slow])
    assert (found["step_s"], found["gather_s"], found["update_s"]) == (6.0, 1.0, 0.0)
    assert 3 < found["step_s_low"] < 6 < found["step_s_high"] < 27


def test_efficiency_is_by_worker_and_of_hybrids_by_what_they_are_hybrids_of() -> None:
    one, two = row(), row(world=2, workers=2, step_s=2.5)
    four = row(
        world=4, workers=2, step_s=5.0
    )  # four ranks on two cores: twice the time is all right
    hybrid = row(world=4, workers=2, step_s=4.0, sharding="zero3-hpz")
    alone = row(world=4, workers=2, step_s=4.0, sharding="fsdp2-hybrid")
    larger = row(world=2, workers=2, examples=4, step_s=1.0)  # of other work: compared with nothing
    rates([four, two, one, hybrid, alone, larger])
    assert one["tokens_per_s"] == 1 * 2 * 10 / 2.0 and two["tokens_per_s_rank"] == 2 * 10 / 2.5
    found = [record["efficiency"] for record in (one, two, four, hybrid, alone, larger)]
    assert found == pytest.approx([1, 0.8, 0.8, 1.0, 1, 1])


def test_strong_scaling_is_of_the_same_examples_in_all() -> None:
    one = row(mode="strong", examples=8)
    four = row(mode="strong", examples=2, world=4, workers=4, step_s=1.0)
    rates([one, four])
    assert four["efficiency"] == pytest.approx(2.0 / (4 * 1.0))


def test_a_csv_is_read_as_it_was_written_and_newer_rows_replace(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "scaling.csv"
    first = save(path, [], [row(), row(world=2, workers=2)])
    for found, expected in zip(read(path), first, strict=True):
        assert found == pytest.approx(expected)
    assert [r["efficiency"] for r in first] == [1, 1]
    save(path, read(path), [row(step_s=1.0)])  # the world of one was slow: the other's share falls
    assert [(r["world"], r["step_s"], r["efficiency"]) for r in read(path)] == [
        (1, 1, 1),
        (2, 2, 0.5),
    ]
    assert [p.name for p in path.parent.iterdir()] == ["scaling.csv"]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda text: text.replace("step_s,", "stop_s,"), "has no column step_s"),
        (lambda text: text[:-30], "line 2: command is None"),
        (lambda text: text.replace("1000", "many"), "line 2: peak_bytes is 'many'"),
    ],
)  # fmt: skip
def test_a_damaged_csv_is_named(tmp_path: Path, damage: object, expected: str) -> None:
    assert callable(damage)
    path = tmp_path / "scaling.csv"
    save(path, [], [row(command="c" * 20, machine="m" * 20)])
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=re.escape(f"{path}") + ".*" + re.escape(expected)):
        read(path)


def test_the_page_and_its_pictures(tmp_path: Path) -> None:
    assert markdown([]) == "Nothing was measured yet."
    page, csv = tmp_path / "scaling.md", tmp_path / "scaling.csv"
    page.write_text(f"before\n{MARKERS[0]}\nold\n{MARKERS[1]}\nafter\n")
    rows = [row(), row(world=2, nodes=2, workers=2), row(mode="strong", probe="inplace")]
    draw(save(csv, [], rows), page)
    scaling.main(["--report", "--csv", str(csv), "--page", str(page)])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| weak | ZeRO-3 | fused | 2 on 2 | 2 | 2 | 2 | 1.8–2.2 | 20 | 10 | 100 % | 0 |" in text
    assert text.count("here, 2 cores") == 1 and "`python benchmarks/scaling.py --a 1,2`" in text
    for name in ("scaling-efficiency.png", "scaling-split.png"):
        assert (tmp_path / name).stat().st_size > 5000


def test_what_fits_a_world() -> None:
    assert [n for n in range(1, 9) if misfit("zero3-hpz", n) is None] == [4, 6, 8]
    assert misfit("fsdp2-hybrid", 16, nodes=4) is None and copies("fsdp2-hybrid", 4) == 4
    assert "needs 4 copies" in str(misfit("fsdp2-hybrid", 4, nodes=4))
    args = scaling.checked(["--worlds", "2", "--global-batch", "8", "--batch-size", "3"])
    assert examples_of("weak", 2, args) == 3 and examples_of("strong", 2, args) == 4


def test_rows_of_late_layers_are_their_own() -> None:
    words = ["--worlds", "2", "--hidden", "128", "--layers", "3"]
    assert scaling.checked(words).name == "llama 128x3"
    late = scaling.checked([*words, "--include", "last:2", "*head*"])
    assert (late.name, late.include) == ("llama 128x3, last:2 *head*", ["last:2", "*head*"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--worlds", "3"], "--global-batch 8: 3 ranks do not divide it"),
        (["--worlds", "2", "--steps", "1"], "at least 2 each"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        scaling.checked(words)
    assert expected in capsys.readouterr().err


def test_a_launcher_sets_the_world(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert scaling.checked([]).worlds == [4] and scaling.checked(["--local_rank=1"]).launched
    with pytest.raises(SystemExit):
        scaling.checked(["--worlds", "2"])
    assert "the launcher sets the world" in capsys.readouterr().err


def run_rank(rank: int, port: int, words: list[str]) -> None:
    """Runs the benchmark as one of two ranks that a launcher has started."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(x) for name, x in place.items()}}
    scaling.main(words)


@pytest.mark.launches
def test_launched_ranks_append_rows(tmp_path: Path) -> None:
    csv = tmp_path / "scaling.csv"
    before = save(csv, [], [row(world=7)])
    words = ["--hidden", "128", "--layers", "1", "--steps", "2", "--length", "8", "--csv", str(csv)]
    words += ["--shardings", "fsdp2", "--probes", "fused", "--append"]
    port, context = free_port(), server()
    ranks = [context.Process(target=run_rank, args=(rank, port, words)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(TIMEOUT)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]
    old, weak, strong = read(csv)
    assert old == pytest.approx(before[0])
    assert [(r["mode"], r["world"], r["examples"]) for r in (weak, strong)] == [
        ("weak", 2, 2), ("strong", 2, 4),
    ]  # fmt: skip
    assert weak["our_bytes"] == 16 * 2 + 8 and weak["step_s"] > 0
