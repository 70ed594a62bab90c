"""The pages of the site, and the code blocks on them."""

from __future__ import annotations

import re
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A code block, and what the page says that it prints: `None` if the page does not say."""

    line: int
    code: str
    printed: str | None


def with_code() -> list[str]:
    """Return the pages with Python blocks, by their paths in docs/.

    new_estimator.md is left out: tests/estimators/test_new_estimator.py runs its blocks where they belong.
    """
    pages = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
    return [page for page in pages if page != "new_estimator.md" and blocks(page)]


def blocks(page: str) -> list[Block]:
    """Return the Python blocks of a page. A block of kind `text` right after one of them is what it prints."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = list(_BLOCK.finditer(text))
    result = []
    for match, after in zip_longest(found, found[1:]):
        if match[1] == "python":
            adjoins = after is not None and after[1] == "text" and not text[match.end() : after.start()].strip()
            line = text.count("\n", 0, match.start()) + 2
            result.append(Block(line, match[2], after[2] if after is not None and adjoins else None))
    return result
