"""Import direction, owners of heavy libraries, no cycles, no torch where none is needed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import qsparse_moe
from tests.architecture.import_rules import PACKAGES, read_modules, violations

ROOT = Path(qsparse_moe.__file__).parent
REPOSITORY = ROOT.parent


def test_the_package_follows_every_rule():
    assert violations(ROOT) == []


def test_whole_package_is_read():
    modules = read_modules(ROOT)
    assert {"config.load", "sparsity.topk", "moe.layer", "model.transformer"} <= modules.keys()
    imported = {target.target for module in modules.values() for target in module.imports}
    assert {"torch", "qsparse_moe.config.schema", "yaml"} <= imported


def test_the_order_of_packages_is_the_documented_one():
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    paragraph = next(part for part in text.split("\n\n") if part.startswith("`errors` →"))
    documented = re.findall(r"`(\w+)`", paragraph)
    assert documented == [package for package in PACKAGES if package in documented]
    existing = {module.package for module in read_modules(ROOT).values()} - {"", "__main__", "version"}
    assert existing <= set(documented), "a package is missing in docs/architecture.md"


CLEAN = {
    "__init__.py": '"""Package."""\nfrom qsparse_moe.version import __version__\n',
    "version.py": '__version__ = "0"\n',
    "config/__init__.py": '"""Settings."""\n',
    "config/schema.py": "import pydantic\n",
    "data/__init__.py": '"""Data."""\n',
    "data/loader.py": "import datasets\nfrom qsparse_moe.config.schema import X\n",
    "model/__init__.py": '"""Model."""\n',
    "model/block.py": "import torch\nfrom ..config import schema\n",
    "cli/__init__.py": '"""Verbs."""\n',
    "cli/train.py": "def train():\n    from qsparse_moe.model.block import Block\n    import torch\n",
}

BROKEN = {
    "upwards import": ("config/rules.py", "from qsparse_moe.data.loader import x\n", "config imports data"),
    "upwards import by name": ("config/rules.py", "from qsparse_moe import data\n", "config imports data"),
    "relative upwards import": ("config/rules.py", "from ..data import loader\n", "config imports data"),
    "upwards import in a function": (
        "config/rules.py",
        "def f():\n    import qsparse_moe.data\n",
        "config imports data",
    ),
    "upwards import for types": (
        "config/rules.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from qsparse_moe.data.loader import x\n",
        "config imports data",
    ),
    "upwards import by string": (
        "config/rules.py",
        "from importlib import import_module\nm = import_module('qsparse_moe.data.loader')\n",
        "config imports data",
    ),
    "someone else's library": ("model/x.py", "import deepspeed\n", "deepspeed belongs to bench and training"),
    "someone else's library, from": ("model/x.py", "from triton.language import dot\n", "triton belongs to kernels"),
    "someone else's library, in a function": (
        "cli/x.py",
        "def f():\n    import transformers\n",
        "transformers belongs",
    ),
    "tensorboard through torch": (
        "model/x.py",
        "from torch.utils.tensorboard import SummaryWriter\n",
        "torch.utils.tensorboard belongs to metrics",
    ),
    "tensorboard through torch.utils": (
        "model/x.py",
        "from torch.utils import tensorboard\n",
        "torch.utils.tensorboard belongs to metrics",
    ),
    "utils": ("model/utils.py", "x = 1\n", "utils.py says nothing"),
    "import in an __init__": ("model/__init__.py", '"""Model."""\nimport os\n', "an __init__.py holds a docstring"),
    "__init__ without a docstring": ("model/__init__.py", "", "an __init__.py holds a docstring"),
    "unknown package": ("attic/x.py", "x = 1\n", "attic is no package"),
    "torch in config": ("config/rules.py", "import torch\n", "config.rules loads torch"),
    "torch below a try": (
        "config/rules.py",
        "try:\n    from torch import nn\nexcept ImportError:\n    pass\n",
        "torch",
    ),
    "torch at the start of a verb": ("cli/x.py", "from qsparse_moe.model.block import B\n", "cli.x loads torch"),
    "torch at the package's own import": (
        "__init__.py",
        '"""Package."""\nfrom qsparse_moe.model.block import B\n',
        "qsparse_moe loads torch",
    ),
    "cycle": ("config/rules.py", "from qsparse_moe.config import rules2\n", "a cycle: config.rules -> config.rules2"),
}
ALSO_NEEDED = {"cycle": ("config/rules2.py", "from qsparse_moe.config.rules import x\n")}


def _write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "qsparse_moe" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root / "qsparse_moe"


def test_clean_tree_has_no_violation(tmp_path):
    assert violations(_write_tree(tmp_path, CLEAN)) == []


@pytest.mark.parametrize("case", BROKEN)
def test_broken_rule_is_found(case, tmp_path):
    name, text, expected = BROKEN[case]
    also = dict([ALSO_NEEDED[case]]) if case in ALSO_NEEDED else {}
    found = violations(_write_tree(tmp_path, CLEAN | {name: text} | also))
    assert any(expected in message for message in found), found


@pytest.mark.parametrize(
    "statement",
    [
        "import qsparse_moe; qsparse_moe.__version__; dir(qsparse_moe)",
        "import qsparse_moe; qsparse_moe.load_config('configs/tiny.yaml', ['training.steps=50'])",
        "import qsparse_moe; qsparse_moe.RunConfig; qsparse_moe.SparsityPlan",
        "import qsparse_moe.accounting.parameters",
        "import qsparse_moe.cli.app",
        "import qsparse_moe.cli.checks",
    ],
)
def test_no_torch_is_loaded(statement):
    heavy = "{'torch', 'numpy', 'datasets', 'deepspeed'} & set(sys.modules)"
    code = f"import sys; {statement}; heavy = {heavy}; assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=60)


def test_every_public_name_resolves():
    for name in qsparse_moe.__all__:
        assert getattr(qsparse_moe, name) is not None


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = qsparse_moe.nonsense
