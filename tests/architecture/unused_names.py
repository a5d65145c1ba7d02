"""Names that a package defines and nothing in it uses, read from the syntax trees.

A use is a name that is read outside of its own definition, an import from its module, an attribute of that name, or a
string that ends in ``:name``, by which operations name their fast versions. The package's own ``__init__``, which lists
what users may import, is no use: what is there must be documented too.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.architecture.import_rules import PACKAGE, Module, read_modules

_TARGET = re.compile(r":(\w+)$")
CALLED_FROM_OUTSIDE = {
    "training.engines.extension_builds.BuildLock.try_acquire": "PyTorch calls it, in place of FileBaton's",
}
"""By full name, why a name without a use is used."""


@dataclass(frozen=True)
class Definition:
    """A function, class or constant of a module, or a public method of a class that has no base."""

    module: str
    name: str
    """With the name of its class where it is a method."""
    node: ast.stmt

    @property
    def full_name(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def short_name(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def is_reference(self) -> bool:
        """Return whether the module defines what a faster version must compute, which only the tests use."""
        return self.short_name.lower().endswith(("reference", "references"))


def unused(root: Path, *, documented: Collection[str], tests: str) -> list[str]:
    """Return the full names of what nothing uses.

    Args:
        root: the folder of the package.
        documented: full names, inside the package, of the documented interface, and of modules documented as a whole.
        tests: the text of all tests.
    """
    modules = {name: module for name, module in read_modules(root).items() if name}
    everywhere = _total(_read_names(module.tree) for module in modules.values())
    imported = Counter(pair for module in modules.values() for pair in _imported(module))
    found = []
    for module in modules.values():
        own = Counter(_loaded_names(module.tree))
        for definition in _definitions(module):
            name = definition.short_name
            inside = definition.node if not isinstance(definition.node, ast.Assign | ast.AnnAssign) else ast.Pass()
            uses = everywhere[name] - Counter(_read_names(inside))[name] + imported[definition.module, name]
            if "." not in definition.name:
                uses += own[name] - Counter(_loaded_names(inside))[name]
            if definition.is_reference:
                uses += len(re.findall(rf"\b{name}\b", tests))
            names = {definition.full_name, definition.module, definition.full_name.rpartition(".")[0]}
            if uses <= 0 and not names & {*documented, *CALLED_FROM_OUTSIDE}:
                found.append(definition.full_name)
    return found


def documented_names(pages: str) -> set[str]:
    """Return the names inside the package that ``::: name`` shows on the pages of the reference."""
    return {name.removeprefix(f"{PACKAGE}.") for name in re.findall(r"^::: (\S+)", pages, re.MULTILINE)}


def _definitions(module: Module) -> Iterator[Definition]:
    for node in module.tree.body:
        for name in _defined(node):
            if not name.startswith("__"):
                yield Definition(module.name, name, node)
        if isinstance(node, ast.ClassDef) and not node.bases:
            for method in node.body:
                for name in _defined(method) if isinstance(method, ast.FunctionDef) else ():
                    if not name.startswith("_"):
                        yield Definition(module.name, f"{node.name}.{name}", method)


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _read_names(tree: ast.AST) -> Iterator[str]:
    """Names that are used from anywhere: attributes, and targets in strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and (target := _TARGET.search(node.value)):
            yield target[1]


def _loaded_names(tree: ast.AST) -> Iterator[str]:
    return (node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load))


def _imported(module: Module) -> Iterator[tuple[str, str]]:
    """Module and name of every ``from module import name``."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{PACKAGE}."):
            yield from ((node.module.removeprefix(f"{PACKAGE}."), alias.name) for alias in node.names)


def _total(parts: Iterator[Iterator[str]]) -> Counter[str]:
    return Counter(name for part in parts for name in part)
