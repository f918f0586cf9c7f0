"""Which module imports which, read from the source: nothing is imported or run."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

SOURCE = Path(__file__).parents[1] / "src"

Kind = Literal["top", "function", "typing"]
"""Where an import stands: run with the module, inside a function, or for type checkers only."""


@dataclass(frozen=True)
class Import:
    """One imported module. ``names`` are those that it gives to the module that imports it."""

    module: str
    kind: Kind
    line: int
    names: tuple[str, ...]


def _module(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES: dict[str, Path] = {_module(path): path for path in sorted((SOURCE / "hypersd_pipeline").rglob("*.py"))}
"""Every module of ours, and its file."""


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


@cache
def imports_of(module: str) -> tuple[Import, ...]:
    """All imports of one of our modules, those in functions and for type checkers too."""
    return tuple(_imports(tree_of(module), module, "top"))


def _imports(node: ast.AST, module: str, kind: Kind) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        inside: Kind = kind
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            inside = "typing"
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and kind == "top":
            inside = "function"
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, kind, child.lineno, ((alias.asname or alias.name).split(".")[0],)) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = _absolute(child, module)
            for alias in child.names:
                whole = f"{base}.{alias.name}"
                yield Import(whole if whole in MODULES else base, kind, child.lineno, (alias.asname or alias.name,))
        yield from _imports(child, module, inside)


def _absolute(node: ast.ImportFrom, module: str) -> str:
    if not node.level:
        return node.module or ""
    package = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
    return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])


def packages_above(module: str) -> list[str]:
    """The packages whose ``__init__.py`` runs before the module does."""
    parts = module.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def closure(modules: Iterable[str]) -> set[str]:
    """The modules and all that they import of ours, however deep, with the packages above. What is for type checkers only is left out."""
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += [item.module for item in imports_of(module) if item.module in MODULES and item.kind != "typing"]
            waiting += packages_above(module)
    return found
