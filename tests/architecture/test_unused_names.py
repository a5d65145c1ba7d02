"""Nothing is defined that nothing uses: a check that no code calls, a constant that no code reads."""

from __future__ import annotations

import pkgutil
from pathlib import Path

import pytest

import qsparse_moe
from tests.architecture.unused_names import CALLED_FROM_OUTSIDE, documented_names, unused

ROOT = Path(qsparse_moe.__file__).parent
REPOSITORY = ROOT.parent


def api() -> set[str]:
    return documented_names((REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8"))


def test_everything_that_the_package_defines_is_used_or_documented():
    others = [path for path in sorted((REPOSITORY / "tests").rglob("*.py")) if path.parent.name != "architecture"]
    tests = "\n".join(path.read_text(encoding="utf-8") for path in others)
    assert unused(ROOT, documented=api(), tests=tests) == []


def test_every_documented_name_and_every_name_called_from_outside_exists():
    for name in {*api(), *CALLED_FROM_OUTSIDE}:
        assert pkgutil.resolve_name(f"qsparse_moe.{name}") is not None
    documented = {name.rpartition(".")[2] for name in api()}
    assert set(qsparse_moe.__all__) - {"__version__"} <= documented, "what can be imported is documented"


CLEAN = {
    "__init__.py": "from qsparse_moe.config.rules import check_all\n",
    "config/rules.py": "LIMIT = 3\ndef _check(x):\n    return x < LIMIT\ndef check_all(x):\n    return _check(x)\n",
    "cli/train.py": "from qsparse_moe.config.rules import check_all\ncheck_all(2)\n",
}
CASES = {
    "nothing": ("", []),
    "a check that nothing calls": ("def check_vocabulary(x):\n    return x\n", ["config.more.check_vocabulary"]),
    "one that only itself calls": ("def check(x):\n    return check(x - 1)\n", ["config.more.check"]),
    "a constant": ("FIGURES = ('a.png',)\n", ["config.more.FIGURES"]),
    "an annotated constant": ("SIZE: int = 3\n", ["config.more.SIZE"]),
    "a private function": ("def _left():\n    pass\n", ["config.more._left"]),
    "a class": ("class Row:\n    pass\n", ["config.more.Row"]),
    "a method": ("class Row:\n    def width(self): pass\nrow = Row()\nprint(row)\n", ["config.more.Row.width"]),
    "a method that is called": ("class Row:\n    def width(self): pass\nprint(Row().width())\n", []),
    "a method that a library calls": ("import abc\nclass Row(abc.ABC):\n    def emit(self): pass\nRow()\n", []),
    "a target of a string": ("def fast(): pass\nF = 'qsparse_moe.config.more:fast'\nprint(F)\n", []),
    "a name of another module": ("def _check(x):\n    return x\n", ["config.more._check"]),
    "a reference that a test uses": ("def topk_reference(): pass\n", []),
    "a reference that no test uses": ("def rescale_reference(): pass\n", ["config.more.rescale_reference"]),
    "what is documented": ("def load(): pass\n", []),
    "a module that is documented": ("class Error(Exception): pass\n", [], "config.more"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_nothing_uses_is_found(tmp_path, case):
    text, expected, *documented = CASES[case]
    for name, content in {**CLEAN, "config/more.py": text}.items():
        path = tmp_path / "qsparse_moe" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    found = unused(
        tmp_path / "qsparse_moe",
        documented=documented_names("::: qsparse_moe.config.more.load\n") | set(documented),
        tests="assert topk_reference()",
    )
    assert found == expected


def test_an_export_table_is_no_use(tmp_path):
    for name, content in CLEAN.items():
        path = tmp_path / "qsparse_moe" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if name == "cli/train.py" else content)
    assert unused(tmp_path / "qsparse_moe", documented=(), tests="") == ["config.rules.check_all"]
