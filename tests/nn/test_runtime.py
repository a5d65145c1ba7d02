"""The implementation of the sites that a setting names is the one behind every function of the runtime."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.config.schema import SparsityConfig
from qsparse_moe.errors import BackendUnavailable
from qsparse_moe.kernels import native, tiles
from qsparse_moe.kernels.fused_glu import op as fused_glu
from qsparse_moe.kernels.int8_quantize.op import as_format_triton
from qsparse_moe.kernels.site_sums import op as site_sums
from qsparse_moe.kernels.topk_select import op as topk_select
from qsparse_moe.nn.runtime import resolve_site_runtime
from qsparse_moe.sparsity.quantize import as_format

CPU = torch.device("cpu")
PARTS = {
    "torch": (topk_select.select_rows_torch, None, site_sums.TORCH, as_format),
    "native": (topk_select.select_rows_native, fused_glu.NATIVE, site_sums.NATIVE, as_format),
    "triton": (topk_select.select_rows_triton, fused_glu.TRITON, site_sums.TORCH, as_format_triton),
}


@pytest.mark.parametrize("name", PARTS)
def test_every_function_is_that_of_the_named_implementation(name):
    if name == "triton" and tiles.why_not(CPU):
        pytest.skip(tiles.why_not(CPU))
    runtime = resolve_site_runtime(SparsityConfig(backend=name), CPU)
    found = (runtime.select_rows, runtime.fused_glu, runtime.site_sums, runtime.format_rows)
    assert runtime.name == name
    assert all(mine is own for mine, own in zip(found, PARTS[name], strict=True))


def test_the_operators_are_compiled_when_the_model_is_built_and_for_nothing_else(monkeypatch):
    def fails(library=None):
        raise BackendUnavailable("the compiler fails")

    monkeypatch.setattr(native, "load", fails)
    with pytest.raises(BackendUnavailable, match="the compiler fails"):
        resolve_site_runtime(SparsityConfig(backend="native"), CPU)
    assert resolve_site_runtime(SparsityConfig(backend="torch"), CPU).name == "torch"
