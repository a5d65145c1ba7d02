"""The installation of MegaBlocks, with stand-ins for torch and pip: every machine that the script knows."""

from __future__ import annotations

import re
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

import qsparse_moe

REPOSITORY = Path(qsparse_moe.__file__).parent.parent
TOOLS = ("bash", "dirname", "grep", "mktemp", "rm", "sed")
FAKE_TORCH = """
from types import SimpleNamespace
version = SimpleNamespace(cuda={cuda!r})
cuda = SimpleNamespace(is_available=lambda: {has_gpu})
"""
# Installs by writing what importlib.metadata reads, and the extension where one is compiled.
FAKE_PIP = """
import io, os, pathlib, sys, tarfile
site, calls = pathlib.Path(os.environ["SITE"]), pathlib.Path(os.environ["CALLS"])
arguments = [a for a in sys.argv[1:] if a not in os.environ["IGNORED"].split()]
calls.open("a").write(" ".join(arguments) + f" [{os.environ.get('TORCH_CUDA_ARCH_LIST')}]\\n")
if arguments[0] == "download":
    archive = pathlib.Path(arguments[arguments.index("--dest") + 1]) / "megablocks-0.10.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        text = os.environ["SETUP"].encode()
        member = tarfile.TarInfo("megablocks-0.10.0/setup.py")
        member.size = len(text)
        tar.addfile(member, io.BytesIO(text))
else:
    wanted = arguments[-1]
    compiles = wanted.startswith(("megablocks==", "grouped_gemm=="))
    if os.path.isdir(wanted):
        assert (pathlib.Path(wanted) / "setup.py").read_text() == "if False:\\n    compile()\\n"
        wanted = "megablocks==0.10.0"
    name, _, version = wanted.partition("==")
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Name: {name}\\nVersion: {version}\\n")
    if compiles and os.environ.get("COMPILER") != "broken":
        (site / ("megablocks_ops.py" if name == "megablocks" else f"{name}.py")).write_text("")
"""
SETUP = "if 'cu' in torch.__version__ and CUDA_HOME is not None:\n    compile()\n"
# What every call carries, and what is the same on every machine.
IGNORED = "install --quiet --no-deps --no-build-isolation --no-cache-dir --force-reinstall"
STK, WITHOUT = "stanford-stk==0.7.1", "download --no-binary :all: --dest FOLDER megablocks==0.10.0"
COMPILED, GEMM = "--no-binary megablocks megablocks==0.10.0", "grouped_gemm==0.3.0"


class Machine:
    """A machine of our making: CUDA that torch is built for, nvcc, a GPU; and what pip was called with on it."""

    def __init__(self, folder: Path, *, cuda: str | None = None, nvcc: bool = False, has_gpu: bool = False) -> None:
        self.folder = folder
        self.site, self.bin, self.toolkit = folder / "site", folder / "bin", folder / "cuda"
        for module in ("torch/utils", "pip", "setuptools"):
            (self.site / module).mkdir(parents=True)
            (self.site / module / "__init__.py").touch()
        # Without a pip of its own: where the stand-in is not found nothing is installed.
        venv.create(folder / "venv", with_pip=False)
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        (self.site / "pip" / "__main__.py").write_text(FAKE_PIP)
        (self.site / "setuptools" / "__init__.py").write_text('__version__ = "84.2.1"')
        self.has_torch(cuda, has_gpu)
        (self.site / "torch" / "utils" / "cpp_extension.py").write_text(f"CUDA_HOME = {str(self.toolkit)!r}")
        if nvcc:
            (self.toolkit / "bin").mkdir(parents=True)
            (self.toolkit / "bin" / "nvcc").write_text("")
            (self.toolkit / "bin" / "nvcc").chmod(0o755)

    def has_torch(self, cuda: str | None, has_gpu: bool = False) -> None:
        (self.site / "torch" / "__init__.py").write_text(FAKE_TORCH.format(cuda=cuda, has_gpu=has_gpu))

    def run(self, *, code: int = 0, **environment: str) -> tuple[str, list[str]]:
        """Return the output of the script, and pip's calls."""
        calls = self.folder / "calls"
        calls.write_text("")
        fixed = {"PATH": str(self.bin), "PYTHONPATH": str(self.site), "SITE": str(self.site)}
        fixed["PYTHON"] = str(self.folder / "venv" / "bin" / "python")
        fixed |= {"CALLS": str(calls), "IGNORED": IGNORED, "SETUP": SETUP, "TMPDIR": str(self.folder)}
        command = [str(self.bin / "bash"), str(REPOSITORY / "launch" / "megablocks.sh")]
        done = subprocess.run(command, env=fixed | environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stdout + done.stderr
        lines = [re.sub(rf"{self.folder}\S+", "FOLDER", line) for line in calls.read_text().splitlines()]
        return done.stdout + done.stderr, lines


def test_on_a_cpu_it_is_installed_once_without_the_extension(tmp_path):
    machine = Machine(tmp_path)
    printed, calls = machine.run()
    assert calls == [f"{part} [8.0;9.0]" for part in (STK, WITHOUT, "FOLDER")]
    assert "installed megablocks 0.10.0" in printed
    assert "its CUDA extension is not installed (torch is a CPU build): PyTorch is used instead" in printed
    assert "torch's grouped product multiplies" in printed
    assert not list(tmp_path.glob("tmp.*")), "what was downloaded is left behind"
    printed, calls = machine.run()
    assert not calls and "was installed already" in printed


def test_before_cuda_13_the_extension_is_compiled_for_the_installed_gpu(tmp_path):
    machine = Machine(tmp_path, cuda="12.8", nvcc=True, has_gpu=True)
    printed, calls = machine.run()
    assert calls == [f"{part} [None]" for part in (STK, COMPILED)]
    assert "its CUDA extension is installed" in printed
    assert machine.run()[1] == []
    assert machine.run(EXTENSION="no")[1] == [], "an extension that is there stays"


def test_without_a_gpu_the_extension_is_compiled_for_named_ones(tmp_path):
    assert Machine(tmp_path, cuda="12.8", nvcc=True).run()[1][-1] == f"{COMPILED} [8.0;9.0]"


def test_architectures_named_by_the_user_are_used(tmp_path):
    machine = Machine(tmp_path, cuda="12.8", nvcc=True)
    assert machine.run(TORCH_CUDA_ARCH_LIST="10.0")[1][-1] == f"{COMPILED} [10.0]"


@pytest.mark.parametrize(
    ("machine", "environment", "reason"),
    [
        (
            {"cuda": "13.0", "nvcc": True},
            {},
            "does not compile with CUDA 13 or newer, and torch is built for CUDA 13.0",
        ),
        ({"cuda": "12.8"}, {}, "there is no nvcc; install the CUDA 12.8 toolkit, or name its folder: CUDA_HOME=/path"),
        ({"cuda": "12.8", "nvcc": True}, {"EXTENSION": "no"}, "(EXTENSION=no)"),
    ],
)
def test_the_reason_is_printed_if_the_extension_cannot_be_compiled(machine, environment, reason, tmp_path):
    printed, calls = Machine(tmp_path, has_gpu=True, **machine).run(**environment)
    assert calls == [f"{part} [None]" for part in (STK, WITHOUT, "FOLDER")]
    assert reason in printed and "PyTorch is used instead" in printed


def test_an_extension_is_added_to_what_was_installed_without(tmp_path):
    machine = Machine(tmp_path, cuda="12.8", nvcc=True, has_gpu=True)
    machine.run(EXTENSION="no")
    assert machine.run()[1] == [f"{COMPILED} [None]"]


def test_an_extension_for_another_torch_is_replaced(tmp_path):
    machine = Machine(tmp_path, cuda="12.8", nvcc=True, has_gpu=True)
    machine.run()
    (machine.site / "megablocks_ops.py").write_text("raise ImportError('undefined symbol')")
    assert machine.run()[1] == [f"{COMPILED} [None]"]


def test_a_compiler_that_leaves_no_extension_is_an_error_with_the_way_out(tmp_path):
    printed, _ = Machine(tmp_path, cuda="12.8", nvcc=True, has_gpu=True).run(COMPILER="broken", code=2)
    assert "the CUDA extension was not compiled; EXTENSION=no installs megablocks without it" in printed


def test_another_setup_py_is_an_error(tmp_path):
    printed, calls = Machine(tmp_path).run(SETUP="compile()\n", code=2)
    assert "megablocks 0.10.0 has another setup.py than this script knows" in printed
    assert calls[-1].startswith(WITHOUT)


def test_grouped_gemm_is_compiled_on_request(tmp_path):
    machine = Machine(tmp_path, cuda="13.0", nvcc=True, has_gpu=True)
    machine.run()
    printed, calls = machine.run(GROUPED_GEMM="1")
    assert calls == [f"{GEMM} [None]"] and "grouped_gemm multiplies bf16 rows" in printed
    assert machine.run(GROUPED_GEMM="1")[1] == []


def test_grouped_gemm_without_a_gpu_is_refused(tmp_path):
    printed, calls = Machine(tmp_path).run(GROUPED_GEMM="1", code=2)
    assert "GROUPED_GEMM=1 needs an NVIDIA GPU and nvcc" in printed
    assert f"{GEMM} [8.0;9.0]" not in calls


def test_a_python_without_torch_is_refused(tmp_path):
    machine = Machine(tmp_path)
    (machine.site / "torch" / "__init__.py").write_text("raise ImportError")
    printed, calls = machine.run(code=2)
    assert "has no torch that can be imported; PYTHON=/path/to/python names one that has" in printed and not calls


def test_old_setuptools_are_refused_with_the_way_out(tmp_path):
    machine = Machine(tmp_path)
    (machine.site / "setuptools" / "__init__.py").write_text('__version__ = "65.5.0"')
    printed, calls = machine.run(code=2)
    assert "needs setuptools 71 or newer" in printed and "-m pip install 'setuptools>=71'" in printed and not calls
