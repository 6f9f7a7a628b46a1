"""README: short, with the measured numbers of docs/quickstart.csv in its table and its picture."""

from __future__ import annotations

import re
from pathlib import Path

import quickstart_picture

REPO = Path(__file__).resolve().parents[2]
README = (REPO / "README.md").read_text()


def test_the_table_and_the_picture_show_the_numbers_that_are_kept(tmp_path: Path) -> None:
    picture = REPO / "docs" / "quickstart.svg"
    assert f"](docs/{picture.name})" in README and picture.stat().st_size < 100_000
    told = re.findall(r">([^<>\n]+)</text>", picture.read_text())
    table = re.findall(r"^\| (.+?) \| \**([\d.]+ %)\** \|$", README, re.MULTILINE)
    rows = quickstart_picture.rows()
    assert len(table) == len(rows) and all(row["command"] and row["machine"] for row in rows)
    for row, (what, percent) in zip(rows, table, strict=True):
        assert what.startswith(quickstart_picture.told(row)), what
        assert percent == quickstart_picture.percent(row) and percent in told
        assert row["commit"] in README
    quickstart_picture.draw(tmp_path / "again.svg")
    again = re.findall(r">([^<>\n]+)</text>", (tmp_path / "again.svg").read_text())
    assert again == told, "run `python launch/quickstart_picture.py`"


def test_it_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) < 110
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README):
        assert (REPO / link).exists(), link
    pages = (REPO / "docs" / "contents.md").read_text()
    for page in (REPO / "docs").glob("*.md"):
        assert page.name == "contents.md" or f"]({page.name})" in pages, page.name
