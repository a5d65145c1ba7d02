"""A wheel that is built from a clone works outside the checkout, with everything that it ships."""

from __future__ import annotations

import email.parser
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# Building, installing and two starts of the program take 15 s, more where the machine is shared.
pytestmark = pytest.mark.slow


def run(*command: str, cwd: Path, environment: Mapping[str, str] | None = None) -> str:
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from the tracked files alone, without a network: what is not committed cannot be in it by accident."""
    if find_spec("pip") is None or find_spec("setuptools") is None:
        pytest.skip("building a wheel needs pip and setuptools in this environment")
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("the clone needs git and a checkout")
    folder = tmp_path_factory.mktemp("wheel")
    clone = folder / "clone"
    clone.mkdir()
    tracked = run("git", "ls-files", "-z", cwd=REPOSITORY).split("\0")
    for name in filter(None, tracked):
        source, target = REPOSITORY / name, clone / name
        # The links in qsparse_moe/shipped must be followed by the build, not by this copy.
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-index", "--no-build-isolation", "--no-deps"),
        *("--wheel-dir", str(folder), str(clone)),
        cwd=folder,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    run(
        *(sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", str(target), str(wheel)),
        cwd=target,
    )
    return target


def shipped_names() -> set[str]:
    files = [*(REPOSITORY / "configs").rglob("*"), *(REPOSITORY / "examples").glob("*")]
    return {
        path.relative_to(REPOSITORY).as_posix() for path in files if path.suffix in {".yaml", ".json", ".py", ".ipynb"}
    }


def test_wheel_contains_every_module_and_everything_that_is_shipped(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        path.relative_to(REPOSITORY).as_posix()
        for suffix in ("py", "cpp", "h")
        for path in (REPOSITORY / "qsparse_moe").rglob(f"*.{suffix}")
        if "shipped" not in path.parts
    }
    assert sources <= names, sorted(sources - names)
    assert {f"qsparse_moe/shipped/{name}" for name in shipped_names()} <= names
    assert "qsparse_moe/py.typed" in names
    assert not [name for name in names if name.startswith("tests/")]


def test_metadata_is_complete(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    (file,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    metadata = email.parser.Parser().parsestr(archive.read(file).decode("utf-8"))
    from qsparse_moe.version import __version__

    assert metadata["Name"] == "qsparse-moe" and metadata["Version"] == __version__
    assert metadata["Summary"] and metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("LICENSE") for name in names)
    assert "Typing :: Typed" in (metadata.get_all("Classifier") or [])
    requirements = metadata.get_all("Requires-Dist") or []
    assert any(requirement.startswith("torch>=") for requirement in requirements)
    assert set(metadata.get_all("Provides-Extra") or []) == {"hf", "ablation", "eval", "gpu", "docs", "dev"}
    assert "# qsparse_moe" in metadata.get_payload()
    (entry_points,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
    assert "qsparse-moe = qsparse_moe.__main__:main" in archive.read(entry_points).decode("utf-8")


def test_installed_wheel_writes_and_describes_a_configuration_in_an_empty_folder(
    installed: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = (sys.executable, str(installed / "bin" / "qsparse-moe"))
    where = run(
        *(sys.executable, "-c", "import qsparse_moe; print(qsparse_moe.__file__)"),
        cwd=tmp_path,
        environment=environment,
    )
    assert Path(where.strip()).is_relative_to(installed), "the checkout must not stand in for the wheel"
    run(*command, "init", cwd=tmp_path, environment=environment)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]
    schema = (tmp_path / "tiny.yaml").read_text(encoding="utf-8").splitlines()[0].partition("$schema=")[2]
    assert Path(schema).is_file() and Path(schema).is_relative_to(installed)
    described = run(*command, "describe", "tiny.yaml", cwd=tmp_path, environment=environment)
    assert "Parameters" in described and "Q-Sparse" in described
