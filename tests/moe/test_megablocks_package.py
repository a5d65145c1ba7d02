"""The import of the installed MegaBlocks: with its CUDA extension, with its replacement, or not at all."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qsparse_moe
from qsparse_moe.errors import BackendUnavailable
from qsparse_moe.kernels import tiles
from qsparse_moe.moe.backends import megablocks_package, megablocks_stand_in

REPOSITORY = Path(qsparse_moe.__file__).parent.parent


def test_replacement_sorts_stably_counts_and_sums():
    x = torch.tensor([3, 0, 3, 1, 0, 7], dtype=torch.int32)
    values, order, sums = (torch.empty_like(x) for _ in range(3))
    megablocks_stand_in.sort(x, 3, values, order)
    assert (values.tolist(), order.tolist()) == ([0, 0, 1, 3, 3, 7], [1, 4, 3, 0, 2, 5])
    counts = megablocks_stand_in.histogram(x, 8)
    assert (counts.tolist(), counts.dtype) == ([2, 1, 0, 2, 0, 0, 0, 1], torch.int32)
    megablocks_stand_in.inclusive_cumsum(x[None], 1, sums[None])
    assert sums.tolist() == [3, 3, 6, 7, 7, 14]
    with pytest.raises(
        BackendUnavailable,
        match="no replacement for replicate_forward of MegaBlocks' CUDA extension.*bash launch/megablocks.sh",
    ):
        megablocks_stand_in.replicate_forward(x, x, x)
    assert not hasattr(megablocks_stand_in, "__path__")


@pytest.mark.gpu
def test_replacement_gives_what_the_extension_gives():
    if not megablocks_package.has_extension():
        pytest.skip("megablocks_ops is not installed")
    torch.manual_seed(0)
    x = torch.randint(0, 60, (1000,), device="cuda", dtype=torch.int32)
    ops = megablocks_package.load().ops
    values, order = torch.empty_like(x), torch.empty_like(x)
    megablocks_stand_in.sort(x, 6, values, order)
    assert all(map(torch.equal, ops.sort(x, 6), (values, order)))
    assert torch.equal(ops.histogram(x, 60), megablocks_stand_in.histogram(x, 60))
    sums = torch.empty_like(x)
    megablocks_stand_in.inclusive_cumsum(x[None], 1, sums[None])
    assert torch.equal(ops.inclusive_cumsum(x, 0), sums)


@pytest.fixture
def freshly_loaded():
    """``load`` as in a process that has not called it; what it puts into ``sys.modules`` is taken back."""
    before = {name: sys.modules.pop(name) for name in megablocks_modules()}
    yield megablocks_package.load.__wrapped__
    for name in megablocks_modules():
        del sys.modules[name]
    sys.modules.update(before)


def megablocks_modules():
    return [name for name in sys.modules if name.split(".")[0] in ("megablocks", "megablocks_ops")]


def test_a_replacement_of_a_missing_extension_is_loaded_and_logged(freshly_loaded, caplog):
    if megablocks_package.has_extension():
        pytest.skip("megablocks_ops is installed")
    with caplog.at_level(logging.INFO, logger=megablocks_package.__name__):
        package = freshly_loaded()
    assert sys.modules["megablocks_ops"] is megablocks_stand_in
    assert not megablocks_package.has_extension(), "the replacement does not count as the extension"
    assert "megablocks_ops, the CUDA extension of MegaBlocks, is not installed" in caplog.text
    assert "matrix products by torch grouped_mm" in caplog.text
    kernels = package.backend.kernels
    num_configs = {len(kernel.configs) for kernel in (kernels._padded_copy, kernels._padded_copy_wgrad)}
    assert num_configs == ({1} if tiles.interpreted() else {5})


def test_a_package_that_cannot_be_imported_is_a_clear_error(freshly_loaded, monkeypatch):
    def broken(name):
        raise ImportError(f"undefined symbol in {name}")

    monkeypatch.setattr(megablocks_package, "has_extension", lambda: True)
    monkeypatch.setattr(megablocks_package, "import_module", broken)
    with pytest.raises(
        BackendUnavailable, match=r"cannot be imported \(undefined symbol in megablocks\); bash launch/"
    ):
        freshly_loaded()


FAKE_EXTENSION = """
from qsparse_moe.moe.backends.megablocks_stand_in import histogram, inclusive_cumsum, sort
"""


def test_an_installed_extension_is_left_in_its_place(tmp_path):
    (tmp_path / "megablocks_ops.py").write_text(FAKE_EXTENSION)
    code = """if True:
        import sys, torch
        from qsparse_moe.config.schema import ModelConfig
        from qsparse_moe.moe.backends import megablocks, megablocks_package
        megablocks_package.load()
        print(sys.modules["megablocks_ops"].__file__)
        print(megablocks.why_not(ModelConfig(), torch.device("cpu")))
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    where, reason = done.stdout.splitlines()
    assert where == str(tmp_path / "megablocks_ops.py")
    assert reason == "its CUDA extension is installed, which does not support tensors on the device cpu; use cuda"


@pytest.mark.slow
def test_its_permutation_compiles_for_ampere_and_hopper(tmp_path):
    # A process of its own: the one of the tests has imported Triton to interpret.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.moe.compile_megablocks"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    for sizes in json.loads(done.stdout).values():
        assert set(sizes) == {"_padded_copy", "_padded_copy_wgrad"}
        assert all(size > 1000 for size in sizes.values())
