"""Imports point only downward, as docs/architecture.md says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "bilevel"


def layers() -> list[set[str]]:
    """The modules of each layer, from the table in the documentation, top first."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [line.split("|")[2] for line in text.splitlines() if line.startswith("|")][2:]
    return [set(re.findall(r"`([a-z_]+)/?`", row)) for row in rows]


def room_of(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "bilevel":
            names = [f"bilevel.{alias.name}" for alias in node.names] if node.module == "bilevel" else [node.module]
            found.update(room_of(name) for name in names)
        if isinstance(node, ast.Import):
            found.update(room_of(alias.name) for alias in node.names if alias.name.startswith("bilevel."))
    return found


def test_every_module_has_a_room() -> None:
    rooms = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in SOURCE.rglob("*.py")}
    documented = set().union(*layers())
    assert rooms - {"__init__", "__main__"} == documented


def test_imports_point_downward() -> None:
    level = {name: number for number, names in enumerate(layers()) for name in names}
    upward = []
    for path in SOURCE.rglob("*.py"):
        here = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if here in ("__init__", "__main__"):
            continue
        for there in imports(path) & level.keys():
            if level[there] < level[here]:
                upward.append(f"{path.relative_to(SOURCE)} imports {there}")
    assert not upward
