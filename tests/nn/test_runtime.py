"""The implementation of the sites that a setting names is the one behind every function of the runtime."""

from __future__ import annotations

import logging

import pytest
import torch

from qsparse_moe.config.schema import SparsityConfig
from qsparse_moe.errors import BackendUnavailable
from qsparse_moe.kernels import native, tiles
from qsparse_moe.kernels.fused_glu import op as fused_glu
from qsparse_moe.kernels.int8_quantize.op import as_format_triton
from qsparse_moe.kernels.site_sums import op as site_sums
from qsparse_moe.kernels.topk_select import op as topk_select
from qsparse_moe.nn import runtime as runtime_module
from qsparse_moe.nn.runtime import SiteRuntime, resolve_site_runtime
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


def test_auto_takes_the_next_implementation_where_the_operators_cannot_be_compiled(monkeypatch, caplog):
    def fails(library=None):
        raise BackendUnavailable("the compiler fails")

    monkeypatch.setattr(native, "load", fails)
    monkeypatch.setattr(native, "why_not", lambda device: None)
    specs = [topk_select.TopKSelect("native", topk_select.select_rows_native, lambda device: None)]
    specs += [topk_select.TopKSelect("torch", topk_select.select_rows_torch, lambda device: None)]
    monkeypatch.setattr(runtime_module, "TOPK_SELECTS", tuple(specs))
    with caplog.at_level(logging.WARNING, "qsparse_moe"):
        runtime = resolve_site_runtime(SparsityConfig(backend="auto"), CPU)
    found = (runtime.select_rows, runtime.fused_glu, runtime.site_sums, runtime.format_rows)
    assert runtime.name == "torch" and all(mine is own for mine, own in zip(found, PARTS["torch"], strict=True))
    assert caplog.messages == [
        "model.sparsity.backend=auto: native cannot be built (the compiler fails); trying the next one"
    ]


def test_a_site_calls_every_function_of_the_runtime_that_makes_it():
    parts = {name: object() for name in ("select_rows", "fused_glu", "site_sums", "format_rows")}
    settings = SparsityConfig(selection="threshold")
    site = SiteRuntime("mine", **parts).make_site("expert_hidden", 8, settings, num_experts=3)
    assert (site.site, site.num_features, site.num_experts) == ("expert_hidden", 8, 3)
    assert site.settings is settings and site.site_sums is parts["site_sums"]
    for part in (site, site.ranking, site.comparison):
        assert part.format_rows is parts["format_rows"]
    assert site.ranking.select_rows is parts["select_rows"]
    assert len(site.ranking.num_selected_E) == len(site.comparison.threshold_bits_E) == 3
