"""journal.jsonl: what a crash leaves counts as not written, any other damage is refused."""

from __future__ import annotations

import errno
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest

from tezo_ds.errors import StorageError
from tezo_ds.run.journal import READABLE, VERSION, Journal, read_journal

HEADER = {"examples": 5, "data": "ab"}


def line(step: int) -> dict[str, Any]:
    return {"step": step, "kappa": [0.1 * step, -1 / 3, math.nan], "lr": 1e-3, "loss": math.inf}


def write(path: Path, steps: int = 4) -> bytes:
    journal = Journal(path, HEADER)
    for step in range(steps):
        journal.append(line(step))
    journal.close()
    return path.read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def test_what_is_written_is_read(path: Path) -> None:
    lines = write(path).splitlines()
    found = read_journal(path)
    assert found.header is not None and found.torn is None
    assert (found.header["journal"], found.header["data"], found.size) == (
        VERSION, "ab", path.stat().st_size,
    )  # fmt: skip
    assert [step["step"] for step in found.steps] == [0, 1, 2, 3]
    assert found.steps[2]["kappa"] == [0.2, -1 / 3, None]  # exact; JSON has no NaN
    assert found.steps[2]["loss"] is None
    assert found.sum == json.loads(lines[-1])["sum"]


def test_it_goes_on_after_every_torn_end(path: Path, tmp_path: Path) -> None:
    """Hazard: the next line would be glued to what is left of the last one."""
    whole = write(path)
    ends = [len(whole.splitlines(keepends=True)[0])]
    for text in whole.splitlines(keepends=True)[1:]:
        ends.append(ends[-1] + len(text))
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        found = read_journal(path)
        kept = sum(end <= size for end in ends)
        assert len(found.steps) == max(0, kept - 1)
        assert (found.header is None) == (kept == 0)
        assert (found.torn is None) == (size in (0, *ends))
    path.write_bytes(whole[:-9])
    journal = Journal(path, HEADER, read_journal(path))
    journal.append(line(3))
    journal.close()
    assert path.read_bytes() == whole
    path.write_bytes(
        whole[:-9] + b"\n" + whole.splitlines(keepends=True)[-1]
    )  # without the handling
    with pytest.raises(StorageError, match="line 5 is damaged"):
        read_journal(path)


def test_no_flipped_bit_is_accepted(path: Path) -> None:
    whole = write(path)
    last = len(b"".join(whole.splitlines(keepends=True)[:-1]))
    for place in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            if place < last - 1:
                with pytest.raises(StorageError, match=r"line \d is damaged \(.*\); take the file"):
                    read_journal(path)
            else:  # the last line, or the end of the one before it, which makes them one
                found = read_journal(path)
                assert len(found.steps) == (3 if place >= last else 2) and found.torn is not None


def test_lines_lost_swapped_or_doubled_are_refused(path: Path) -> None:
    first, *steps, last = write(path, steps=5).splitlines(keepends=True)
    for texts in (
        [first, *steps[1:], last],
        [first, steps[1], steps[0], *steps[2:], last],
        [first, steps[0], *steps, last],
        [*steps, last],
    ):
        path.write_bytes(b"".join(texts))
        with pytest.raises(StorageError, match="is damaged"):
            read_journal(path)


def test_a_line_of_another_run_is_refused(path: Path, tmp_path: Path) -> None:
    """A line of the same step with its own right hash is refused, if it was written after other lines."""
    whole = write(path)
    Journal(tmp_path / "other", {**HEADER, "data": "cd"}).append({**line(0), "lr": 2e-3})
    other = (tmp_path / "other").read_bytes().splitlines(keepends=True)
    texts = whole.splitlines(keepends=True)
    path.write_bytes(b"".join([texts[0], other[1], *texts[2:]]))
    with pytest.raises(StorageError, match="line 2 is damaged"):
        read_journal(path)


def test_random_bytes_are_never_a_journal(path: Path) -> None:
    whole, generator = write(path), random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        start = generator.randrange(len(damaged))
        damaged[start : start + generator.randrange(1, 40)] = generator.randbytes(
            generator.randrange(60)
        )
        path.write_bytes(damaged)
        try:
            found = read_journal(path)
        except StorageError:
            continue
        texts = whole.splitlines()
        assert all(json.dumps(s) for s in found.steps)
        kept = 1 + len(found.steps) if found.header else 0
        assert damaged[: found.size].splitlines() == texts[:kept]


def test_a_disk_that_is_full_leaves_the_journal_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(path, HEADER)
    journal.append(line(0))
    before, write_all = path.read_bytes(), os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, text: write_all(file, text[:20]))
        with pytest.raises(StorageError, match=r"step 1 cannot be written \(No space left"):
            journal.append(line(1))
    assert path.read_bytes() == before
    with monkeypatch.context() as patch:

        def refuse(file: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        patch.setattr(os, "fsync", refuse)
        with pytest.raises(StorageError, match=r"step 1 cannot be written .*make room"):
            journal.append(line(1))
    journal.append(line(1))
    assert [step["step"] for step in read_journal(path).steps] == [0, 1]


def test_a_line_is_on_disk_when_append_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(path, HEADER)
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(path.stat().st_size))
    journal.append(line(0))
    assert synced == [path.stat().st_size]


def test_a_later_version_is_refused(path: Path) -> None:
    Journal(path, {**HEADER, "journal": VERSION + 1})
    with pytest.raises(StorageError, match="update it"):
        read_journal(path)


def of_many(step: int, count: int) -> dict[str, Any]:
    generator = random.Random(step)
    odd = [0.0, -0.0, 5e-324, 1.7976931348623157e308, 0.1, math.nan]
    kappa = odd + [generator.gauss(0, 50) for _ in range(count - len(odd))]
    return {**line(step), "kappa": tuple(kappa), "solved": tuple(-k for k in kappa)}


def test_slopes_of_many_directions_are_kept_to_the_bit_in_few_bytes(path: Path) -> None:
    journal, sizes = Journal(path, HEADER), [path.stat().st_size]
    counts = (READABLE, READABLE + 1, 4096)
    for step, count in enumerate(counts):
        journal.append(of_many(step, count))
        sizes.append(path.stat().st_size)
    journal.close()
    for step, (count, found) in enumerate(zip(counts, read_journal(path).steps, strict=True)):
        for name in ("kappa", "solved"):
            expected = [None if math.isnan(k) else k.hex() for k in of_many(step, count)[name]]
            assert [None if k is None else k.hex() for k in found[name]] == expected
    assert '"kappa":[' in path.read_text().splitlines()[1]
    assert '"kappa":"' in path.read_text().splitlines()[2]
    assert (
        sizes[3] - sizes[2] < 2 * 4096 * 11 + 200
    )  # 10.7 bytes a slope, where digits take about 19


def test_a_journal_of_an_earlier_version_goes_on_as_one(path: Path) -> None:
    """Hazard: that version, which the header names, would find text where it reads numbers."""
    Journal(path, {**HEADER, "journal": 1}).close()
    journal = Journal(path, HEADER, read_journal(path))
    journal.append(of_many(0, READABLE + 1))
    journal.close()
    assert isinstance(json.loads(path.read_text().splitlines()[1])["kappa"], list)
    (found,) = read_journal(path).steps
    assert found["kappa"][4] == 0.1 and len(found["kappa"]) == READABLE + 1


@pytest.mark.parametrize("text", ["AAAA", "not base64!", "AAAAAAAAAAA"])
def test_slopes_that_are_no_numbers_are_damage(path: Path, text: str) -> None:
    journal = Journal(path, HEADER)
    journal.append({**line(0), "kappa": [0.0] * 1})
    journal.close()
    journal = Journal(path, HEADER, read_journal(path))
    journal._append({**line(1), "kappa": text}, "a line with a checksum, and not of our making")
    journal.append(line(2))
    with pytest.raises(StorageError, match="line 3 is damaged") as caught:
        read_journal(path)
    assert "\n" not in str(caught.value)


def test_twenty_thousand_steps_of_eight_directions_are_small(path: Path) -> None:
    journal = Journal(path, HEADER)
    size = path.stat().st_size
    generator = random.Random(0)
    kappa = [generator.gauss(0, 50) for _ in range(8)]
    full = {"step": 19999, "kappa": kappa, "rho": 1e-3, "lr": 1.2345678901234e-6}
    journal.append({**full, "loss": generator.random(), "seen": 320000})
    assert (path.stat().st_size - size) * 20_000 < 10e6
