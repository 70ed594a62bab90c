"""What the site does besides mkdocs: it takes in pages that lie outside of docs/, and follows links to them.

CHANGELOG.md and CONTRIBUTING.md become pages, and so does every table in benchmarks/results/. In the repository the
links between all these files are relative paths; here they are rewritten to the pages that the files become.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Files outside of docs/, by their paths in the repository, and the pages that they become."""
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def pages() -> dict[str, str]:
    """Return the path in the repository of every page that lies outside of docs/, and its path on the site."""
    results = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
    return {**OUTSIDE, **{f"benchmarks/results/{path.name}": f"benchmarks/results/{path.name}" for path in results}}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside of docs/."""
    for source, page in pages().items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite links between files of the repository; a link to a file that is no page becomes its path."""
    sources = {site: source for source, site in pages().items()}
    here = page.file.src_uri
    in_repository = sources.get(here, f"docs/{here}")

    def rewritten(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), target))
        site = pages().get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if site is not None and files.get_file_from_path(site) is not None:
            return f"[{text}]({posixpath.relpath(site, posixpath.dirname(here) or '.')}{anchor})"
        if (ROOT / path).exists():
            return text if path in text else f"{text} (`{path}`)"
        return match[0]  # a dead link, which the strict build reports

    return LINK.sub(rewritten, markdown)
