"""Pages of the site that are not in docs/: a hook of mkdocs, see mkdocs.yml.

README becomes the first page, and the API's is made from the package's public names. A link to another file
of the repository takes that file along, so a link works on the site wherever it works in the repository.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import tezo_ds

REPO = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()([^)#\s:]+)([#)])")
API = """# Python API

`import tezo_ds` gives these names; torch is imported when one of them is asked for.

{names}

Errors are of these classes, each message one line:

{errors}
"""


def site_path(path: str) -> str:
    """Returns where a file of the repository is on the site, both relative to their roots."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def repository_path(page: str) -> str:
    """Returns which file of the repository a page is made of, both relative to their roots."""
    if page == "index.md":
        return "README.md"
    return f"docs/{page}" if (REPO / "docs" / page).exists() else page


def linked(text: str, page: str) -> str:
    """Returns a page's text with links as the site has them."""
    here = posixpath.dirname(repository_path(page))

    def rewritten(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, match[2]))
        if not (REPO / target).is_file():
            return match[0]  # which mkdocs warns of
        link = posixpath.relpath(site_path(target), posixpath.dirname(page) or ".")
        return f"{match[1]}{link}{match[3]}"

    return LINK.sub(rewritten, text)


def api() -> str:
    """Returns the page of the API: a directive for each public name, errors last."""
    lines: dict[bool, list[str]] = {True: [], False: []}
    for thing in (getattr(tezo_ds, name) for name in tezo_ds.__all__):
        is_error = isinstance(thing, type) and issubclass(thing, tezo_ds.TezoError)
        lines[is_error].append(f"::: {thing.__module__}.{thing.__qualname__}")
    return API.format(names="\n\n".join(lines[False]), errors="\n\n".join(lines[True]))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the first page, the API's, and every file that a page links to."""
    files.append(File.generated(config, "api.md", content=api()))
    files.append(File.generated(config, "index.md", abs_src_path=str(REPO / "README.md")))
    waiting = [file.src_uri for file in files.documentation_pages() if file.src_uri != "api.md"]
    while waiting:
        page = waiting.pop()
        source = repository_path(page)
        for _, link, _ in LINK.findall((REPO / source).read_text()):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
            goal = site_path(target)
            if files.get_file_from_path(goal) or not (REPO / target).is_file():
                continue
            files.append(File.generated(config, goal, abs_src_path=str(REPO / target)))
            if goal.endswith(".md"):
                waiting.append(goal)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Writes a page's links as the site has them."""
    return linked(markdown, page.file.src_uri)
