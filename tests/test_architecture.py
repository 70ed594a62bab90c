"""Imports point only downward: between modules and between packages, also inside functions and for types alone."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest

import bilevel
from bilevel import errors, experimental

SOURCE = Path(__file__).parent.parent / "src" / "bilevel"
ENTRIES = {
    *("__init__", "__main__", "py.typed"),
    *(
        "problem",
        "vectorised_tasks",
        "batches",
        "epochs",
        "errors",
        "trees",
        "checks",
        "randomness",
        "philox",
        "experimental",
    ),
    *("autodiff", "models", "optim", "compilation", "solvers", "distributed", "unrolling", "directions", "estimators"),
    *("planning", "comparison", "checking", "training", "attribution", "integrations", "report", "cli", "tasks"),
}
"""What may lie in `src/bilevel`."""
SIDE_BY_SIDE = ("planning", "comparison", "checking", "training")
"""What people do with an estimator; none of these packages needs another."""
PUBLIC = "bilevel"
"""The list of public names, which imports whatever is public and is imported by no module."""


def name_of(path: Path) -> str:
    parts = ("bilevel", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in SOURCE.rglob("*.py")}


def imported(text: str, modules: Mapping[str, Path]) -> set[str]:
    """The modules of this package that a source text imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that they can be searched for"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(name if name in modules else str(node.module) for name in inside)
    return {name for name in found if name in modules}


def package_of(name: str) -> str:
    return name.split(".")[1] if "." in name else PUBLIC


GRAPH = {name: imported(path.read_text(encoding="utf-8"), MODULES) - {name} for name, path in MODULES.items()}


def cycle_in(graph: Mapping[str, set[str]]) -> list[str]:
    """The nodes of one cycle, in order; empty if there is none."""
    finished: set[str] = set()

    def visit(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in finished:
            return []
        for following in sorted(graph[node]):
            if found := visit(following, [*way, node]):
                return found
        finished.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def test_no_two_modules_import_each_other() -> None:
    # A package's own list of names is read with any of its modules, but no name in it is needed for that.
    lists = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    graph = {
        name: {there for there in targets if not (there in lists and name.startswith(f"{there}."))}
        for name, targets in GRAPH.items()
    }
    assert cycle_in(graph) == []


def test_packages_are_imported_in_one_direction() -> None:
    graph: dict[str, set[str]] = {package_of(name): set() for name in MODULES}
    for name, targets in GRAPH.items():
        graph[package_of(name)] |= {package_of(there) for there in targets} - {package_of(name)}
    assert cycle_in(graph) == []


def test_only_the_command_imports_tasks() -> None:
    importing = {name for name, targets in GRAPH.items() if any(package_of(there) == "tasks" for there in targets)}
    assert {package_of(name) for name in importing} <= {"tasks", "cli"}


@pytest.mark.parametrize("package", SIDE_BY_SIDE)
def test_uses_of_an_estimator_do_not_import_each_other(package: str) -> None:
    others = {
        f"{name} imports {there}"
        for name, targets in GRAPH.items()
        if package_of(name) == package
        for there in targets
        if package_of(there) in SIDE_BY_SIDE and package_of(there) != package
    }
    assert not others


def test_the_source_folder_holds_the_documented_entries() -> None:
    found = {
        path.name if path.suffix == ".typed" else path.stem for path in SOURCE.iterdir() if path.name != "__pycache__"
    }
    assert found <= ENTRIES
    text = (SOURCE.parent.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    undocumented = {name for name in found if f"`{name}" not in text} - {"__init__", "__main__", "py.typed"}
    assert not undocumented


@pytest.mark.parametrize(
    "text",
    [
        "from bilevel import trees",
        "import bilevel.trees",
        "from bilevel.trees import Tree",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from bilevel.trees import Tree",
        "def lazily():\n    from bilevel.trees import Tree",
    ],
)
def test_imports_are_found_wherever_they_stand(text: str) -> None:
    assert imported(text, MODULES) == {"bilevel.trees"}


def test_cycles_are_found() -> None:
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


# -- public names ------------------------------------------------------------------------------------------------------

MOST_PUBLIC_NAMES = 46
"""The largest number of names in `bilevel`. A new one has to be worth more than a look through all the others."""


def test_public_names_are_sorted_few_and_explained() -> None:
    assert bilevel.__all__ == sorted(bilevel.__all__)
    assert len(bilevel.__all__) <= MOST_PUBLIC_NAMES
    for name in bilevel.__all__:
        own = getattr(bilevel, name)
        assert inspect.getdoc(own), name
        inherited = [base.__doc__ for base in getattr(own, "__mro__", ())[1:]]
        assert own.__doc__ not in inherited, f"{name} has the docstring of a base class"
        assert not own.__doc__.startswith(f"{name}("), f"{name} has only the docstring that dataclass makes"


@pytest.mark.parametrize("module", [errors, experimental])
def test_errors_and_experimental_names_are_explained_and_nowhere_else(module: ModuleType) -> None:
    own = {name for name, value in vars(module).items() if inspect.isclass(value) or inspect.isfunction(value)}
    assert own
    assert not own & set(bilevel.__all__)
    for name in own:
        assert inspect.getdoc(getattr(module, name)), name
    assert getattr(module, "__all__", sorted(own)) == sorted(own)


def test_the_page_on_stability_names_what_there_is() -> None:
    text = (SOURCE.parent.parent / "docs" / "stability.md").read_text(encoding="utf-8")
    stable, unstable = text.split("## Experimental")
    rows = re.findall(r"^\| `(\w+)` \| `([\w.]+)` \|", stable, flags=re.MULTILINE)
    assert rows
    for name, module in rows:
        assert inspect.isclass(getattr(importlib.import_module(module), name))
        assert name not in bilevel.__all__
    first_cells = re.findall(r"^\| (`.*?) \|", unstable, flags=re.MULTILINE)
    assert {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)} == set(experimental.__all__)


def test_names_of_test_files_are_unique() -> None:
    """Pytest imports them by name alone, and refuses to collect two of one name."""
    names = [path.name for path in Path(__file__).parent.rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
