"""report.html: what it says is the run's, whatever is in a name; and it looks like something in a browser."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from command_line import STEPS, Given, Run, call
from PIL import Image

from tezo_ds.run.chart import Series, _scale, chart
from tezo_ds.run.folder import CONFIG, METRICS, REPORT, SUMMARY
from tezo_ds.run.page import page_of

pytest_plugins = ("cli_fixtures",)
HOSTILE = "</pre><script>alert(1)</script><img src=http://example.com/x>"
EMPTY = {"meta", "line", "polyline", "circle", "br"}  # elements without an end of their own
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Page(HTMLParser):
    """Elements and texts of a page; fails where an end is not of the element that is open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def hostile(plain: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run whose names, error and answers are markup, with its report."""
    folder = tmp_path_factory.mktemp("page") / "a <b> & run"
    shutil.copytree(plain.path, folder)
    config = json.loads((folder / CONFIG).read_text())
    config["settings"] |= {"model": HOSTILE, "template": HOSTILE}
    (folder / CONFIG).write_text(json.dumps(config))
    lines = (folder / METRICS).read_text().splitlines()
    last = {**json.loads(lines[-1]), "test_answers": [HOSTILE, ""], "test_metric": 0.5}
    (folder / METRICS).write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    summary = {**json.loads((folder / SUMMARY).read_text()), "error": HOSTILE}
    (folder / REPORT).write_text(page_of(folder, summary, "cpu"))
    yield folder


def test_nothing_in_a_run_is_markup_and_nothing_is_loaded(hostile: Path, plain: Run) -> None:
    page = Page((hostile / REPORT).read_text())
    assert {"script", "img", "link", "iframe", "a"}.isdisjoint(tag for tag, _ in page.elements)
    assert not any(name in ("src", "href") for _, given in page.elements for name in given)
    metas = [one for tag, one in page.elements if tag == "meta"]
    (policy,) = [one for one in metas if "http-equiv" in one]
    assert str(policy["content"]).startswith("default-src 'none'")
    text = "".join(page.texts)
    assert text.count(HOSTILE) >= 4 and "a <b> & run" in text and "(nothing)" in text
    folder = f"'{hostile}'"
    assert f"tezo-ds evaluate --run {folder}" in text and f"{hostile}-merged" in text


def test_it_shows_the_runs_own_numbers(hostile: Path, plain: Run) -> None:
    page, summary = Page((hostile / REPORT).read_text()), plain.summary
    text = "\n".join(page.texts)
    for name in ("accuracy", "test_loss"):
        form = "{:.1%}" if name == "accuracy" else "{:.4f}"
        both = (form.format(summary[f"{name}_{when}"]) for when in ("before", "after"))
        assert " → ".join(both) in text
    lines = [one for tag, one in page.elements if tag == "polyline"]
    (losses, *_) = [str(one["points"]).split() for one in lines if "faint" in str(one["class"])]
    heights = [-float(point.split(",")[1]) for point in losses]
    expected = [line["loss"] for line in plain.steps]
    assert len(losses) == STEPS
    order = sorted(range(STEPS), key=heights.__getitem__)
    assert order == sorted(range(STEPS), key=expected.__getitem__)
    for name in ("tezo block", "lr", "0.002", "torch", "Environment", "What to do next", "Samples"):
        assert name in page.texts, name


def test_train_prints_its_link(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*given.train(tmp_path / "a run", steps=2, metric="exact", max_new_tokens=2)) == 0
    link = (tmp_path / "a run" / REPORT).as_uri()
    assert f"report             {link}" in capsys.readouterr().out and "%20" in link
    page = Page((tmp_path / "a run" / REPORT).read_text())
    assert "Samples" in page.texts and "finished" in "".join(page.texts)


def test_scales_are_round_and_hold_all_values() -> None:
    for values in (
        [0.0],
        [3.0, 3.0],
        [-1e-7, 2e-7],
        [0.123, 0.987],
        [1e9, 3e9],
        [5.0, 5.0 + 1e-12],
    ):
        scale = _scale(values)
        assert 2 <= len(scale) <= 8 and scale[0] <= min(values) <= max(values) <= scale[-1]
        steps = [b - a for a, b in itertools.pairwise(scale)]
        assert all(math.isclose(step, steps[0], rel_tol=1e-6) for step in steps)
    assert chart("none", [Series("a", [], 0)]) == ""
    many = chart("many", [Series("<i>", [(float(i), 1.0) for i in range(5000)], 0)])
    (points,) = [one["points"] for tag, one in Page(many).elements if tag == "polyline"]
    assert 400 < len(str(points).split()) <= 600 and "&lt;i&gt;" in many


@pytest.mark.slow
def test_a_browser_draws_it_without_a_network(hostile: Path, tmp_path: Path) -> None:
    """A screenshot has the colours of curves and texts, from a browser that finds no host."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    shot = tmp_path / "shot.png"
    command: list[Any] = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'user'}", "--host-resolver-rules=MAP * ~NOTFOUND",
        "--window-size=900,1600", f"--screenshot={shot}", (hostile / REPORT).as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert shot.exists(), done.stderr
    with Image.open(shot) as picture:
        colours = dict((c, n) for n, c in picture.convert("RGB").getcolors(1 << 24) or [])
    for colour in ((0x2F, 0x6F, 0xDE), (0x27, 0x95, 0x6B), (0x1D, 0x25, 0x30)):
        assert colours.get(colour, 0) > 30, colour  # training, test, letters
    assert len(colours) > 200
