"""The shared set-up, with stand-ins for ``venv`` and ``pip`` that only write down how they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qsparse_moe

REPOSITORY = Path(qsparse_moe.__file__).parent.parent
TOOLS = ("bash", "cksum", "cut", "dirname", "ln", "mkdir")
FAKE_VENV = """
import os, pathlib, sys
folder = pathlib.Path(sys.argv[-1])
pathlib.Path(os.environ["CALLS"]).open("a").write(f"venv {sys.argv[1:-1]} {folder}\\n")
(folder / "bin").mkdir(parents=True, exist_ok=True)
(folder / "bin" / "python").unlink(missing_ok=True)
(folder / "bin" / "python").symlink_to(sys.executable)
(folder / "made-for.txt").unlink(missing_ok=True)
"""
FAKE_PIP = """
import os, pathlib, sys
pathlib.Path(os.environ["CALLS"]).open("a").write("pip " + " ".join(sys.argv[1:]) + "\\n")
"""
PIP_CALLS = [
    "pip install --quiet --constraint constraints.txt torch",
    "pip install --quiet --constraint constraints.txt --editable .[dev]",
]


class Machine:
    """A machine of our making: a repository, a PATH with a few programs, and a log of venv's and pip's calls."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.folder, self.repository = folder, repository
        self.bin = folder / "bin"
        self.bin.mkdir()
        for tool in TOOLS:
            self.add(tool, f'exec {shutil.which(tool)} "$@"')
        self.add("python3", f'exec {sys._base_executable} "$@"')
        self.add("c++", "exit 0")
        for module, text in (("venv", FAKE_VENV), ("pip", FAKE_PIP)):
            (folder / "modules" / module).mkdir(parents=True)
            (folder / "modules" / module / "__init__.py").touch()
            (folder / "modules" / module / "__main__.py").write_text(text)
        shutil.copytree(REPOSITORY / "launch", repository / "launch")
        (repository / "pyproject.toml").write_text("one")
        (repository / "constraints.txt").write_text("two")
        (repository / "show.sh").write_text(
            'set -euo pipefail\nsource launch/setup.sh\nprintf "%s\\n" "$python" "$CXX" "$PWD" "${PATH%%:*}"\n'
        )

    def add(self, name: str, body: str) -> None:
        program = self.bin / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)

    def run(self, script: str = "show.sh", **environment: str) -> subprocess.CompletedProcess[str]:
        fixed = {"PATH": str(self.bin), "HOME": str(self.folder), "CALLS": str(self.folder / "calls")}
        fixed["PYTHONPATH"] = str(self.folder / "modules")
        command = [str(self.bin / "bash"), script]
        return subprocess.run(
            command, cwd=self.repository, env=fixed | environment, capture_output=True, text=True, timeout=60
        )

    def calls(self) -> list[str]:
        """Return the calls since the previous call of this method."""
        log = self.folder / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path, tmp_path / "repository")


def test_environment_is_made_once_and_reused(machine):
    first = machine.run()
    python = machine.repository / ".venv" / "bin" / "python"
    assert first.stdout.splitlines() == [
        str(python),
        str(machine.bin / "c++"),
        str(machine.repository),
        str(python.parent),
    ], first.stderr
    assert machine.calls() == [f"venv ['--clear'] {python.parent.parent}", *PIP_CALLS]
    assert machine.run().stdout == first.stdout
    assert machine.calls() == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed_into_the_same_environment(machine, name):
    machine.run()
    machine.calls()
    (machine.repository / name).write_text("changed")
    machine.run()
    assert machine.calls() == PIP_CALLS
    machine.run()
    assert machine.calls() == []


def test_moved_repository_gets_a_new_environment(machine):
    machine.run()
    machine.calls()
    machine.repository = machine.repository.rename(machine.folder / "elsewhere")
    machine.run()
    assert machine.calls() == [f"venv ['--clear'] {machine.repository / '.venv'}", *PIP_CALLS]


def test_environment_whose_python_is_gone_is_recreated(machine):
    machine.run()
    machine.calls()
    python = machine.repository / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to(machine.folder / "gone")
    machine.run()
    assert machine.calls()[0].startswith("venv ['--clear']")


@pytest.mark.parametrize("script", ["show.sh", "launch/setup.sh"], ids=["sourced", "run alone"])
def test_failed_set_up_is_repeated(machine, script):
    pip = machine.folder / "modules" / "pip" / "__main__.py"
    pip.write_text("raise SystemExit(1)")
    assert machine.run(script).returncode == 1
    assert not (machine.repository / ".venv" / "made-for.txt").exists()
    machine.calls()
    pip.write_text(FAKE_PIP)
    assert machine.run(script).returncode == 0
    assert machine.calls() == PIP_CALLS


def test_path_with_a_space_is_reached_through_a_link_without_one(tmp_path):
    machine = Machine(tmp_path, tmp_path / "my own" / "clone")
    first = machine.run()
    python, _, folder, _ = first.stdout.splitlines()
    assert " " not in python and folder == str(machine.repository)
    assert Path(python).parent.resolve() == (machine.repository / ".venv" / "bin").resolve()
    machine.calls()
    assert machine.run().stdout == first.stdout
    assert machine.calls() == []


def test_two_repositories_with_spaces_have_two_links(tmp_path):
    machine = Machine(tmp_path, tmp_path / "my own" / "clone")
    first = machine.run().stdout.splitlines()[0]
    other = tmp_path / "my own" / "other"
    shutil.copytree(machine.repository, other, ignore=shutil.ignore_patterns(".venv"))
    machine.repository = other
    second = machine.run().stdout.splitlines()[0]
    assert first != second
    assert Path(first).parent.resolve() != Path(second).parent.resolve()


def fails_with_one_line(machine: Machine, **environment: str) -> str:
    result = machine.run(**environment)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert machine.calls() == []
    assert not (machine.repository / ".venv").exists()
    return line


def test_old_python_is_reported_in_one_line_with_the_remedy(machine):
    machine.add("python3", '[ "$1" = --version ] && echo Python 3.9.2 && exit; exit 1')
    line = fails_with_one_line(machine)
    assert line.startswith("Python 3.11 or newer is needed; python3 is Python 3.9.2: install one, or name it: PYTHON=")


def test_missing_python_is_reported_in_one_line_with_the_remedy(machine):
    (machine.bin / "python3").unlink()
    assert "python3 is not in PATH: install one" in fails_with_one_line(machine)


def test_python_named_by_the_user_is_used(machine):
    (machine.bin / "python3").unlink()
    assert machine.run(PYTHON=sys.executable).returncode == 0


def test_newer_python_beside_an_old_one_is_found(machine):
    (machine.bin / "python3").rename(machine.bin / "python3.11")
    machine.add("python3", "exit 1")
    assert machine.run().returncode == 0


def test_missing_compiler_is_reported_in_one_line_with_the_remedy(machine):
    (machine.bin / "c++").unlink()
    line = fails_with_one_line(machine)
    assert line.startswith("A C++ compiler is needed") and "apt install g++" in line and "CXX=" in line


def test_compiler_named_by_the_user_is_used(machine):
    machine.add("my-compiler", "exit 0")
    assert machine.run(CXX="my-compiler").stdout.splitlines()[1] == str(machine.bin / "my-compiler")


def test_python_without_headers_is_reported_in_one_line_with_the_remedy(machine):
    python = machine.bin / "bare"
    machine.add(
        "bare", f'case "$2" in *sysconfig*) echo /nowhere;; *_base*) echo {python};; *) {sys.executable} "$@";; esac'
    )
    line = fails_with_one_line(machine, PYTHON=str(python))
    assert (
        line
        == f"{python} has no /nowhere/Python.h, which C++ code for it needs (Debian, Ubuntu: apt install python3-dev)"
    )


def test_python_without_venv_is_reported_in_one_line_with_the_remedy(machine):
    (machine.folder / "modules" / "ensurepip.py").write_text("raise ImportError")
    line = fails_with_one_line(machine)
    assert "cannot create virtual environments" in line and "apt install python3-venv" in line


def test_spaces_in_every_path_are_reported_in_one_line_with_the_remedy(tmp_path):
    machine = Machine(tmp_path, tmp_path / "my own" / "clone")
    machine.add("mkdir", "exit 1")
    line = fails_with_one_line(machine)
    assert f"{machine.repository} has a space in its path" in line and "move the repository" in line


@pytest.mark.parametrize("script", ["test.sh", "quickstart.sh", "local.sh", "single_node.sh", "multi_node.sh"])
def test_every_script_begins_with_the_set_up(machine, script):
    (machine.bin / "c++").unlink()
    environment = {"PATH": str(machine.bin), "HOME": str(machine.folder), "PYTHONPATH": str(machine.folder / "modules")}
    command = [str(machine.bin / "bash"), str(machine.repository / "launch" / script)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "A C++ compiler is needed" in result.stderr


def test_scripts_pass_shellcheck():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    scripts = [*sorted((REPOSITORY / "launch").glob("*.s*")), REPOSITORY / ".ci" / "run"]
    assert len(scripts) >= 8
    result = subprocess.run([shellcheck, *scripts], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert os.access(shellcheck, os.X_OK)
