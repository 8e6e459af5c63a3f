"""Hook of mkdocs: pages from files outside ``docs/``, and links to such files.

Pages link to files of the repository by relative paths, as the code host expects them. On the site a link to a file
without a page becomes the address of the file on the code host.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
BRANCH = "main"
OUTSIDE_PAGES = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "paper-recipe.md": "examples/paper_recipe/README.md",
}
"""Pages of the site whose source lies elsewhere in the repository: path below ``docs/``, path of the source."""

_FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()[^()\s]+(?=\))|(?<=src=\")[^\"]+(?=\")|(?<=href=\")[^\"]+(?=\")")


def source_of(page: str) -> str:
    """Return the path in the repository of the source of a page, which is named below ``docs/``."""
    return OUTSIDE_PAGES.get(page, f"docs/{page}")


def page_of(path: str) -> str | None:
    """Return the name below ``docs/`` under which a path of the repository is on the site, or ``None``."""
    for page, source in OUTSIDE_PAGES.items():
        if path == source:
            return page
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def address(path: str, repository: str) -> str:
    """Return the address of a path of the repository on the code host.

    Raises:
        PluginError: the repository has no such path.
    """
    target = ROOT / path
    if not target.exists():
        raise PluginError(f"a page links to {path}, which does not exist")
    return f"{repository.rstrip('/')}/{'tree' if target.is_dir() else 'blob'}/{BRANCH}/{path.rstrip('/')}"


def site_link(link: str, page: str, repository: str) -> str:
    """Return a link of a page's source as the site needs it.

    Args:
        link: the link in the source: relative to the source, with or without an anchor, or an address.
        page: path of the page below ``docs/``.
        repository: address of the repository on the code host.
    """
    parts = urlsplit(link)
    if parts.scheme or parts.netloc or not parts.path or link.startswith("/"):
        return link
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source_of(page)), parts.path))
    anchor = f"#{parts.fragment}" if parts.fragment else ""
    name = page_of(path)
    if name is None:
        return address(path, repository) + anchor
    return posixpath.relpath(name, posixpath.dirname(page) or ".") + anchor


def with_site_links(markdown: str, page: str, repository: str) -> str:
    """Return the text of a page with the links that the site needs; code blocks stay as they are."""
    done, start = [], 0
    for fence in [*_FENCE.finditer(markdown), None]:
        end = fence.start() if fence else len(markdown)
        done.append(_LINK.sub(lambda match: site_link(match[0], page, repository), markdown[start:end]))
        if fence:
            done.append(fence[0])
            start = fence.end()
    return "".join(done)


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the pages whose sources lie outside ``docs/``."""
    for page, source in OUTSIDE_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Rewrite the links of a page."""
    return with_site_links(markdown, page.file.src_uri, config.repo_url or "")
