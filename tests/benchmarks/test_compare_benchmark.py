"""The regression guard: what it flags, what it lets pass, and its exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import compare
import pytest
from parts.scaling.report import save
from scaling_rows import row


def verdicts(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    found, gone, added = compare.compare([old], [new], memory=0.01)
    assert not gone and not added
    return {change.name: change.verdict for change in found if change.verdict}


def test_what_lies_within_the_spread_passes() -> None:
    assert not verdicts(row(), row())
    assert not verdicts(row(), row(step_s=2.4))  # 2.16–2.64 meets 1.8–2.2
    assert not verdicts(row(), row(update_s=0.2, rest_s=0.21))


def test_what_lies_outside_is_flagged_both_ways() -> None:
    assert verdicts(row(), row(step_s=2.5)) == {"step_s": "slower"}  # 2.25–2.75 does not
    assert verdicts(row(), row(step_s=1.6)) == {"step_s": "faster"}
    assert verdicts(row(), row(gather_s=1.5)) == {"gather_s": "slower"}, "a part alone"


def test_parts_of_no_length_are_noise() -> None:
    assert not verdicts(row(perturb_s=1e-6), row(perturb_s=9e-5))
    assert verdicts(row(perturb_s=1e-6), row(perturb_s=1e-3)) == {"perturb_s": "slower"}


def test_traffic_has_no_noise_and_memory_little() -> None:
    assert verdicts(row(), row(our_bytes=41)) == {"our_bytes": "larger"}
    assert verdicts(row(), row(gather_calls=2)) == {"gather_calls": "smaller"}
    assert not verdicts(row(), row(peak_bytes=1009))
    assert verdicts(row(), row(peak_bytes=1011)) == {"peak_bytes": "larger"}


@pytest.mark.parametrize(
    ("old", "new", "code", "says"),
    [
        ([row()], [row()], 0, "0 slower or larger, 0 faster or smaller, 0 rows gone, 0 new"),
        ([row()], [row(step_s=1.0)], 0, "1 faster or smaller"),
        ([row()], [row(step_s=3.0)], 1, "1 slower or larger"),
        ([row(), row(world=2)], [row()], 1, "1 rows gone"),
        ([row()], [row(), row(world=2)], 0, "1 new"),
        ([row()], [row(model="another")], 1, "no row is in both"),
    ],
)  # fmt: skip
def test_exit_codes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: Any, new: Any, code: int, says: str
) -> None:
    paths = tmp_path / "old.csv", tmp_path / "new.csv"
    for path, rows in zip(paths, (old, new), strict=True):
        save(path, [], rows)
    assert compare.main([str(path) for path in paths]) == code
    out = capsys.readouterr().out
    assert says in out and "old: here, 2 cores" in out
    assert ("only in" in out) == (len(old) != len(new) or "another" in str(new))


def test_files_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here, other = tmp_path / "here.csv", tmp_path / "other.csv"
    save(here, [], [row()])
    assert compare.main([str(here), str(other)]) == 2
    other.write_text("a,b\n1,2\n")
    assert compare.main([str(here), str(other)]) == 2
    assert "has no column model" in capsys.readouterr().out
