"""The site of the documentation: built without a warning, with every page and public name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tezo_ds

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the site as `mkdocs build --strict` does: a warning is an error."""
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        from mkdocs.commands.build import build
        from mkdocs.config import load_config

        folder = tmp_path_factory.mktemp("site")
        config = load_config(str(REPO / "mkdocs.yml"), site_dir=str(folder), strict=True)
        build(config)
    return folder


def test_every_page_and_file_that_one_links_to_is_there(site: Path) -> None:
    pages = {path.stem for path in (REPO / "docs").glob("*.md")}
    assert pages and not {page for page in pages if not (site / page / "index.html").exists()}
    for file in ("ds_configs/index.html", "examples/own_loop.py", "CHANGELOG/index.html"):
        assert (site / file).exists()
    first = (site / "index.html").read_text()
    assert "<h1" in first and 'href="output-layer/"' in first and "docs/" not in hrefs(first)
    nothing_outside = [link for path in site.rglob("*.html") for link in fetched(path.read_text())]
    assert nothing_outside == []


def test_the_api_has_every_public_name_with_what_it_takes_and_raises(site: Path) -> None:
    text = (site / "api" / "index.html").read_text()
    for name in tezo_ds.__all__:
        thing = getattr(tezo_ds, name)
        assert f'id="{thing.__module__}.{thing.__qualname__}"' in text, name
    assert "Raises:" in text and "Parameters:" in text and "Attributes:" in text


def hrefs(text: str) -> str:
    return " ".join(re.findall(r'href="([^"#]*)"', text))


def fetched(text: str) -> list[str]:
    """Returns addresses that a reader's browser would fetch from elsewhere."""
    return re.findall(
        r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]*)"', text
    )


def test_links_are_rewritten_where_the_repository_has_their_files() -> None:
    site_pages = pytest.importorskip("site_pages", exc_type=ImportError)
    linked = site_pages.linked
    assert linked("[a](docs/trunk.md#b) [c](CHANGELOG.md)", "index.md") == (
        "[a](trunk.md#b) [c](CHANGELOG.md)"
    )
    assert linked("[a](../ds_configs/README.md)", "planning.md") == "[a](ds_configs/README.md)"
    assert linked("[a](../docs/doctor.md)", "ds_configs/README.md") == "[a](../doctor.md)"
    for text in ("[a](no-such.md)", "[a](https://x.org/y.md)", "[a](#here)", "x](y z)"):
        assert linked(text, "index.md") == text
