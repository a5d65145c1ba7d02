"""The rules of docs/architecture.md about who imports whom, read from the syntax trees of a package.

``violations(root)`` takes any folder laid out as ``qsparse_moe/`` is, so that the tests can show a broken tree to it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = "qsparse_moe"
PACKAGES = (
    "version",
    "errors",
    "locks",
    "config",
    "data",
    "sparsity",
    "kernels",
    "nn",
    "moe",
    "model",
    "accounting",
    "runs",
    "training",
    "metrics",
    "interop",
    "inference",
    "ablation",
    "bench",
    "cli",
)
OWNERS = {
    # The benchmark measures datasets.map and the tokenizer alone as peers.
    "datasets": {"data", "bench"},
    "tokenizers": {"data", "bench"},
    "triton": {"kernels"},
    "megablocks": {"moe"},
    # The benchmark measures its MoE layer as a peer; no part of training is there.
    "deepspeed": {"training", "bench"},
    "tensorboard": {"metrics"},
    "torch.utils.tensorboard": {"metrics"},
    # Figures of grids, and the heat maps that TensorBoard shows.
    "matplotlib": {"ablation", "metrics"},
    "scipy": {"ablation"},
    # The benchmark measures transformers' Mixtral as a peer; it reads and writes none of its checkpoints. Data renders
    # chat templates, programs from the hub, in transformers' sandbox: the same text and the same protection.
    "transformers": {"interop", "bench", "data"},
    "safetensors": {"interop"},
    "einops": {"model"},
    # Its tasks ask for log-likelihoods and for generated text, so they stand where generation does.
    "lm_eval": {"inference"},
}
# What must work before torch is imported: modules, or packages as a whole.
WITHOUT_TORCH = ("", "errors", "locks", "config", "accounting", "cli", "sparsity.plan", "sparsity.schedule")
# By name, what the __init__.py of a package does in addition to its docstring.
ACTING_PACKAGES = {"interop": "import qsparse_moe.interop registers the model type with transformers"}
SHAPELESS_NAMES = {"utils", "util", "helpers", "common", "misc"}


@dataclass(frozen=True)
class Import:
    """One imported module: where, what, and whether that happens when the file is imported."""

    line: int
    target: str
    at_import_time: bool


@dataclass(frozen=True)
class Module:
    """A source file, its dotted name inside the package (empty: the package itself) and what it imports."""

    path: Path
    name: str
    tree: ast.Module
    imports: tuple[Import, ...]

    @property
    def package(self) -> str:
        return self.name.split(".")[0]


def read_modules(root: Path) -> dict[str, Module]:
    """Every module below the package folder ``root``, by its name inside the package."""
    modules = {}
    for path in sorted(root.rglob("*.py")):
        module = _read_module(path, root, path.read_text(encoding="utf-8"))
        modules[module.name] = module
    return modules


@cache
def _read_module(path: Path, root: Path, text: str) -> Module:
    parts = path.relative_to(root).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    tree = ast.parse(text)
    return Module(path, name, tree, tuple(_imports(tree, parts[:-1], at_import_time=True)))


def _imports(node: ast.AST, package: tuple[str, ...], *, at_import_time: bool) -> Iterator[Import]:
    for below in ast.iter_child_nodes(node):
        for target in _targets(below, package):
            yield Import(below.lineno, target, at_import_time)
        deferred = isinstance(below, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types = isinstance(below, ast.If) and "TYPE_CHECKING" in ast.unparse(below.test)
        yield from _imports(below, package, at_import_time=at_import_time and not (deferred or for_types))


def _targets(node: ast.AST, package: tuple[str, ...]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = package[: len(package) - node.level + 1]
            base = ".".join([PACKAGE, *above, *([node.module] if node.module else [])])
        # `from a import b` may name the module a.b: both are checked.
        return [base, *(f"{base}.{alias.name}" for alias in node.names)]
    if isinstance(node, ast.Call) and _called_name(node.func) in {"import_module", "__import__"}:
        first = node.args[0] if node.args else None
        return [first.value] if isinstance(first, ast.Constant) and isinstance(first.value, str) else []
    return []


def _called_name(function: ast.expr) -> str | None:
    """``f`` of ``f()`` and ``a.b.f()``."""
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else None


def _inside(target: str, modules: dict[str, Module]) -> str | None:
    """The package's own module that ``target`` names, or None."""
    if target == PACKAGE:
        return ""
    name = target.removeprefix(f"{PACKAGE}.")
    return name if name != target and name in modules else None


def violations(root: Path) -> list[str]:
    """Return one sentence for every broken rule; an empty list if the tree follows them all."""
    modules = read_modules(root)
    found = []
    for module in modules.values():
        where = f"{root.name}/{module.path.relative_to(root)}"
        found += [f"{where}: {message}" for message in _file_rules(module)]
        for imported in module.imports:
            found += [f"{where}:{imported.line}: {message}" for message in _import_rules(module, imported, modules)]
    return found + _cycles(modules) + _torch_reached(modules)


def _file_rules(module: Module) -> Iterator[str]:
    if module.package and module.package != "__main__" and module.package not in PACKAGES:
        yield f"{module.package} is no package of the list"
    if module.path.stem in SHAPELESS_NAMES:
        yield f"{module.path.name} says nothing of what it holds"
    # The folder of a kernel declares its operation in its __init__.
    is_kernel = module.package == "kernels" and module.name != "kernels"
    if module.path.name == "__init__.py" and module.name and not is_kernel and module.name not in ACTING_PACKAGES:
        body = module.tree.body
        if len(body) != 1 or ast.get_docstring(module.tree) is None:
            yield "an __init__.py holds a docstring and nothing else"


def _import_rules(module: Module, imported: Import, modules: dict[str, Module]) -> Iterator[str]:
    for library, owners in OWNERS.items():
        if _names(imported.target, library) and module.package not in owners:
            yield f"{library} belongs to {' and '.join(sorted(owners))}"
    target = _inside(imported.target, modules)
    if target is None or module.name in {"", "__main__"}:
        return
    package = target.split(".")[0]
    if package in PACKAGES and module.package in PACKAGES and PACKAGES.index(package) > PACKAGES.index(module.package):
        yield f"{module.package} imports {package}, which stands below it"


def _names(target: str, library: str) -> bool:
    return target == library or target.startswith(f"{library}.")


def _edges(module: Module, modules: dict[str, Module], *, lazy: bool) -> set[str]:
    """Return the package's modules that ``module`` imports when it is imported; with ``lazy``, inside functions too."""
    targets = {_inside(found.target, modules) for found in module.imports if lazy or found.at_import_time}
    return {target for target in targets if target and target != module.name}


def _cycles(modules: dict[str, Module]) -> list[str]:
    # An import inside a function closes a cycle too: the modules cannot be understood one after the other.
    edges = {name: _edges(module, modules, lazy=True) for name, module in modules.items()}
    found: list[str] = []
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            found.append("a cycle: " + " -> ".join([*trail[trail.index(name) :], name]))
        elif name not in done:
            for following in sorted(edges[name]):
                visit(following, (*trail, name))
            done.add(name)

    for name in sorted(modules):
        visit(name, ())
    return found


def _torch_reached(modules: dict[str, Module]) -> list[str]:
    """Modules that must load without torch but import it, by themselves or through others, when they are imported."""
    imports_torch = {
        name: [i.line for i in module.imports if i.at_import_time and _names(i.target, "torch")]
        for name, module in modules.items()
    }
    found = []
    for name in modules:
        if name and not any(_names(name, free) for free in WITHOUT_TORCH if free):
            continue
        for reached in _closure(name, modules):
            found += [
                f"{name or PACKAGE} loads torch through {reached}, line {line}" for line in imports_torch[reached]
            ]
    return found


def _closure(name: str, modules: dict[str, Module]) -> set[str]:
    reached, waiting = set(), [name]
    while waiting:
        current = waiting.pop()
        if current not in reached:
            reached.add(current)
            waiting += _edges(modules[current], modules, lazy=False)
    return reached
