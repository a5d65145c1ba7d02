"""``doctor`` reports what is installed and what is missing, instead of failing."""

from __future__ import annotations

import importlib.metadata
import json
import re
import tomllib
from pathlib import Path

import pytest

from qsparse_moe.cli import checks
from qsparse_moe.cli.app import run
from qsparse_moe.moe.backends.registry import BACKENDS

REPOSITORY = Path(__file__).parents[2]


def findings(capsys, *, code):
    assert run(["doctor", "--json"]) == code
    content = json.loads(capsys.readouterr().out)
    return content["ready"], {finding["name"]: finding for finding in content["findings"]}


def test_this_machine_is_ready(capsys):
    ready, found = findings(capsys, code=0)
    assert ready
    assert found["torch"]["detail"] == importlib.metadata.version("torch")
    assert found["C++ compiler"]["runs"]
    assert {f"model.moe.backend={backend.name}" for backend in BACKENDS} <= found.keys()
    assert all(finding["runs"] or finding["detail"] for finding in found.values()), "a no without its reason"


def test_the_table_contains_the_same(capsys):
    assert run(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"torch +yes +\d", printed)
    assert re.search(r"model\.moe\.backend=loop +yes", printed)
    assert printed.endswith("Ready: train, evaluate, and generate run on this machine.\n")


def test_missing_extra_is_no_failure(capsys, monkeypatch):
    hide(monkeypatch, "scipy")
    ready, found = findings(capsys, code=0)
    assert ready
    assert (found["scipy"]["runs"], found["scipy"]["detail"]) == (
        False,
        'not installed; pip install "qsparse-moe[ablation]"',
    )


def test_the_name_of_an_extra_is_in_the_table(capsys, monkeypatch):
    hide(monkeypatch, "scipy")
    assert run(["doctor"]) == 0
    assert re.search(r'scipy +no +not installed; pip install "qsparse-moe\[ablation\]"', capsys.readouterr().out)


def test_a_missing_requirement_ends_with_code_1_and_its_remedy(capsys, monkeypatch):
    hide(monkeypatch, "deepspeed")
    ready, found = findings(capsys, code=1)
    assert not ready
    assert found["deepspeed"]["detail"] == 'not installed; pip install "deepspeed>=0.19.8"'
    assert run(["doctor"]) == 1
    assert "Not ready: deepspeed missing" in capsys.readouterr().out


def test_an_outdated_requirement_ends_with_code_1(capsys, monkeypatch):
    monkeypatch.setattr(checks, "installed_version", lambda package: "0.19.7" if package == "deepspeed" else "99")
    _, found = findings(capsys, code=1)
    assert found["deepspeed"]["detail"] == '0.19.7 is older than 0.19.8; pip install "deepspeed>=0.19.8"'


def test_the_other_checks_run_without_torch(capsys, monkeypatch):
    hide(monkeypatch, "torch")
    _, found = findings(capsys, code=1)
    assert not found["torch"]["runs"]
    assert "CPU" not in found
    assert found["scipy"]["runs"]


def test_missing_compiler_is_found(capsys, monkeypatch):
    monkeypatch.setattr(checks.shutil, "which", lambda program: None)
    _, found = findings(capsys, code=1)
    assert found["C++ compiler"]["detail"].startswith("not found; DeepSpeed compiles with it at first use")


def test_old_python_is_found(capsys, monkeypatch):
    monkeypatch.setattr(checks, "_PYTHON", (3, 99))
    _, found = findings(capsys, code=1)
    assert found["python"]["detail"].endswith("; install Python 3.99 or newer")


@pytest.mark.parametrize(("version", "numbers"), [("2.13.0+cpu", (2, 13, 0)), ("2.21", (2, 21)), ("1.0rc1", (1, 0, 1))])
def test_versions_are_compared_as_numbers(version, numbers):
    assert checks._numbers(version) == numbers


def test_version_limits_are_those_of_the_project():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = dict(requirement.split(">=") for requirement in project["dependencies"] if ">=" in requirement)
    assert {package: declared[package] for package in checks.NEEDED_PACKAGES} == checks.NEEDED_PACKAGES
    extras = project["optional-dependencies"]
    for package, extra in checks.EXTRA_PACKAGES.items():
        assert any(requirement.startswith(package) for requirement in extras[extra])
    assert project["requires-python"] == ">=" + ".".join(map(str, checks._PYTHON))


def test_each_missing_part_of_megablocks_is_reported_with_its_remedy(capsys, monkeypatch):
    find = checks.importlib.util.find_spec
    parts = ("megablocks", "stk", "grouped_gemm")
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None if name in parts else find(name))
    monkeypatch.setattr(checks, "has_extension", lambda: False)
    ready, found = findings(capsys, code=0)
    assert ready
    details = {name: found[name]["detail"] for name in ("megablocks", "stanford-stk", "megablocks_ops", "grouped_gemm")}
    assert not any(found[name]["runs"] for name in details)
    assert details["megablocks"] == "not installed; bash launch/megablocks.sh installs it for the installed torch"
    assert details["stanford-stk"] == "not installed; megablocks imports it: bash launch/megablocks.sh"
    assert "PyTorch is used instead. bash launch/megablocks.sh compiles it" in details["megablocks_ops"]
    assert "torch's grouped_mm is used instead. GROUPED_GEMM=1 bash launch/m" in details["grouped_gemm"]
    backend = found["model.moe.backend=megablocks"]
    assert not backend["runs"] and backend["detail"].startswith(
        "megablocks is not installed; bash launch/megablocks.sh"
    )


def test_installed_parts_of_megablocks_are_reported(capsys, monkeypatch):
    monkeypatch.setattr(checks, "has_extension", lambda: True)
    _, found = findings(capsys, code=0)
    assert (found["megablocks"]["runs"], found["megablocks"]["detail"]) == (True, "0.10.0")
    assert found["stanford-stk"]["detail"] == "0.7.1"
    assert found["megablocks_ops"] | {"runs": True, "detail": "MegaBlocks' CUDA extension"} == found["megablocks_ops"]


def hide(monkeypatch, missing):
    real = checks.installed_version
    monkeypatch.setattr(checks, "installed_version", lambda package: None if package == missing else real(package))
